from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from galley_plugins.embedding.adapter import AdapterSettings, Base, save_adapter
from galley_plugins.embedding.methods import make_method
from galley_plugins.embedding.options import EmbeddingOptions

if TYPE_CHECKING:
    from pathlib import Path

LLAMA_2 = SimpleNamespace(model_type="llama", vocab_size=32_000, num_hidden_layers=32)
LLAMA_3 = SimpleNamespace(model_type="llama", vocab_size=128_256, num_hidden_layers=32)
SMOLLM2 = SimpleNamespace(model_type="llama", vocab_size=49_152, num_hidden_layers=30)
UNKNOWN = SimpleNamespace(model_type="other", vocab_size=1000, num_hidden_layers=10)


def method(config: Any = SMOLLM2, **options: Any) -> Any:
    return make_method(EmbeddingOptions(**options), config)


@pytest.mark.parametrize(
    ("config", "layers", "output"),
    [(LLAMA_2, range(1, 7), 27), (LLAMA_3, range(1, 3), 31), (UNKNOWN, range(1, 2), 9)],
)
def test_token_prepending_has_the_layers_of_its_papers_models(
    config: Any, layers: range, output: int
) -> None:
    found = method(config, method="token-prepending")
    assert found.copy_layers == layers
    assert found.layer == output
    assert found.whole_prompt
    assert found.own_cache


def test_layers_can_be_chosen() -> None:
    found = method(method="token-prepending", start_layer=3, exit_layer=9, output_layer=-1)
    assert found.copy_layers == range(3, 9)
    assert found.layer is None  # the last, normalised one
    assert method(method="last", output_layer=-2).layer == 29
    assert method(method="prompt-eol", output_layer=0).layer == 0


@pytest.mark.parametrize("name", ["mean", "last", "prompt-eol", "echo", "splade"])
def test_all_others_run_in_chunks_beside_a_cache_that_chats_share(name: str) -> None:
    found = method(method=name)
    assert not found.whole_prompt
    assert not found.own_cache
    assert not found.copy_layers
    assert "{placeholder}" not in found.template.pieces


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "last", "output_layer": 31}, r"output_layer: found 31, expected -31 to 30 for 30 layers"),
        ({"method": "token-prepending", "exit_layer": 31}, r"exit_layer: found 31, expected at most 30"),
        (
            {"method": "token-prepending", "prompt": "echo"},
            r"prompt: found 'echo', expected \{placeholder\} before",
        ),
        ({"method": "echo", "prompt": "plain"}, r"prompt: found 'plain', expected \{text\} twice"),
        ({"method": "echo", "output_layer": 4}, r"output_layer: echo pools the last layer, expected none"),
        ({"method": "mean", "exit_layer": 4}, r"exit_layer: only token-prepending has it, not mean"),
        (
            {"method": "token-prepending", "start_layer": 4, "exit_layer": 4},
            r"exit_layer: found 4, expected more than start_layer 4",
        ),
        ({"method": "token-prepending", "start_layer": 0}, r"start_layer: found 0, expected at least 1"),
        ({"max_tokens": 1}, r"max_tokens: found 1, expected at least 16"),
        ({"instruction_template": "x"}, r"instruction_template: found 'x', expected \{instruction\} in it"),
        ({"prompt": "no text"}, r"prompt: found 'no text', expected \{text\} in it"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_was_found_and_expected(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=rf"^embedding\.{problem}"):
        method(**options)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="embedding: unknown option banana"):
        EmbeddingOptions.from_values({"method": "mean", "banana": 1})


def trained(folder: Path, name: str, **sizes: Any) -> Any:
    save_adapter(folder, AdapterSettings(name, Base("llama", 576, 30, "abc"), "1", sizes=sizes), {})
    return make_method(EmbeddingOptions.from_values({"adapter": str(folder)}), SMOLLM2)


def test_gem_changes_its_special_tokens_alone_and_shares_the_rest_with_chats(tmp_path: Path) -> None:
    found = trained(tmp_path / "a", "gem", tokens=3, combine="concat")
    assert (found.lora, found.specials, found.combine) == ("last", 3, "concat")
    assert (found.uncached_tail, found.own_cache, found.whole_prompt) == (1, False, False)


def test_causal2vec_and_nv_embed_keep_keys_and_values_to_themselves(tmp_path: Path) -> None:
    causal2vec = trained(tmp_path / "a", "causal2vec", parts="raw")
    nv_embed = trained(tmp_path / "b", "nv-embed", heads=8)
    assert causal2vec.own_cache
    assert nv_embed.own_cache
    assert causal2vec.context
    assert not causal2vec.whole_prompt  # its first token depends on no later one
    assert nv_embed.bidirectional
    assert nv_embed.whole_prompt


def test_nv_embed_without_an_adapter_is_for_its_own_checkpoint() -> None:
    options = EmbeddingOptions(method="nv-embed")
    with pytest.raises(ValueError, match="galley embed train nv-embed"):
        make_method(options, SMOLLM2)
    public = SimpleNamespace(model_type="nvembed", vocab_size=32_000, num_hidden_layers=32)
    found = make_method(options, public)
    assert found.lora == "none"
    assert found.head == "latent-attention"
