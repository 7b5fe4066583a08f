"""Prompts with the built-in model's real tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from galley_plugins.embedding.prompts import InputError, PromptBuilder
from galley_plugins.embedding.templates import TEMPLATES, Template
from galley_plugins.models import resolve

TEXTS = ["A man is playing a guitar.", "Two dogs run, fast.", "Ünïcödé 東京 🙂.", "x."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("builtin:smollm2-135m-instruct"))


def builder(tokenizer: Any, name: str, **options: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, Template.named(name), placeholder="<repo_name>", **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("instruction", ["", "Instruct: find it\nQuery: "])
def test_a_prompt_holds_the_text_where_it_says(tokenizer: Any, name: str, instruction: str) -> None:
    for text, prompt in zip(
        TEXTS, builder(tokenizer, name).build(TEXTS, 512, instruction=instruction), strict=True
    ):
        rendered = (
            TEMPLATES[name].replace("{instruction}", "").replace("{placeholder}", "<repo_name>")
        ).replace("{text}", text)
        assert tokenizer.decode(prompt.ids) == instruction + rendered
        assert prompt.ids == tokenizer(instruction + rendered)["input_ids"]
        inside = tokenizer.decode(prompt.ids[prompt.start : prompt.stop])
        assert text in inside
        assert len(inside) <= len(text) + 2  # a token may straddle the seam
        if "{placeholder}" in TEMPLATES[name]:
            assert tokenizer.decode(prompt.ids[prompt.placeholder]) == "<repo_name>"
        else:
            assert prompt.placeholder is None


def test_a_plain_text_is_all_of_its_prompt(tokenizer: Any) -> None:
    (prompt,) = builder(tokenizer, "plain").build([TEXTS[0]], 512)
    assert (prompt.start, prompt.stop) == (0, len(prompt.ids))


@pytest.mark.parametrize("name", TEMPLATES)
def test_token_ids_stand_between_the_templates_own_tokens(tokenizer: Any, name: str) -> None:
    ids = [101, 2024, 4242]
    (prompt,) = builder(tokenizer, name).build([ids], 512, instruction="Say: ")
    assert prompt.ids[prompt.start : prompt.stop] == ids
    around = "{instruction}" + TEMPLATES[name].replace("{instruction}", "")
    around = around.replace("{instruction}", "Say: ").replace("{placeholder}", "<repo_name>")
    before = around.split("{text}")[0]
    assert tokenizer.decode(prompt.ids).startswith(before)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("side", ["start", "end"])
def test_a_long_text_is_cut_and_its_prompt_is_not(tokenizer: Any, name: str, side: Any) -> None:
    words = [f"word{number}" for number in range(200)]
    limit = 100
    (prompt,) = builder(tokenizer, name).build([" ".join(words)], limit, cut=side)
    assert limit - 4 <= len(prompt.ids) <= limit
    kept = tokenizer.decode(prompt.ids[prompt.start : prompt.stop])
    assert kept in " ".join(words) + "."
    assert (words[0] in kept.split()) == (side == "end")
    end = TEMPLATES[name].split("{text}")[-1]
    assert tokenizer.decode(prompt.ids).endswith(end)


def test_a_suffix_comes_last_and_counts(tokenizer: Any) -> None:
    (prompt,) = builder(tokenizer, "plain", suffix=[5, 6]).build([[9, 9, 9, 9]], 5, cut="end")
    assert prompt.ids == [9, 9, 9, 5, 6]
    assert (prompt.start, prompt.stop) == (0, 3)


def test_inputs_that_cannot_be_embedded_are_named(tokenizer: Any) -> None:
    build = builder(tokenizer, "plain").build
    with pytest.raises(InputError, match=r"^input\[1\]: found no text, expected at least one"):
        build(["a", ""], 8)
    with pytest.raises(InputError, match=r"^input\[0\]: found no text, expected at least one"):
        build([[]], 8)
    with pytest.raises(InputError, match=r"^input\[2\]: found 9 tokens with its prompt, expected at most 8;"):
        build(["a", [1] * 8, [1] * 9], 8)
    with pytest.raises(
        InputError, match=r"the prompt around a text has \d+ tokens, expected fewer than the limit of 6"
    ):
        builder(tokenizer, "prompt-eol").build(["a " * 40], 6, cut="end")


class WithEnds:
    """A tokenizer that adds tokens around each text, as Llama's adds one before it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, text: Any, *, add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        found = self._inner(text, **options)
        if not add_special_tokens:
            return found
        if isinstance(text, str):
            return {"input_ids": [1, *found["input_ids"], 2]}
        return {
            "input_ids": [[1, *ids, 2] for ids in found["input_ids"]],
            "offset_mapping": [[(0, 0), *places, (0, 0)] for places in found["offset_mapping"]],
        }


def test_what_the_tokenizer_adds_belongs_to_a_text_that_nothing_else_surrounds(tokenizer: Any) -> None:
    plain = builder(WithEnds(tokenizer), "plain")
    ids = tokenizer("Two dogs")["input_ids"]
    for entry in ("Two dogs", ids):
        (prompt,) = plain.build([entry], 64)
        assert prompt.ids == [1, *ids, 2]
        assert (prompt.start, prompt.stop) == (0, len(prompt.ids))
        (prompt,) = plain.build([entry], 64, instruction="Say:\n")
        assert prompt.ids[0] == 1
        assert prompt.ids[-1] == 2
        assert prompt.stop == len(prompt.ids)
        assert prompt.start > 1
