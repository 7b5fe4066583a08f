"""From an input of `/v1/embeddings` to the token ids that the engine runs, and where in them the text is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from galley_plugins.embedding.templates import INSTRUCTION, PLACEHOLDER, TEXT, Template, clean

if TYPE_CHECKING:
    from collections.abc import Sequence

Side = Literal["start", "end"]
Input = str | list[int]


class InputError(ValueError):
    """An input cannot be embedded; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One input as the engine runs it.

    Attributes:
        ids: token ids.
        start, stop: where the text lies in them, the last copy of it if there are several, together with what
            the tokenizer itself puts before or after a text that nothing else surrounds.
        placeholder: position of the placeholder, None without one.
    """

    ids: list[int]
    start: int
    stop: int
    placeholder: int | None = None


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A prompt as a string; the characters of the text's last copy, and the placeholder's first one or -1."""

    prompt: str
    start: int
    stop: int
    placeholder: int


class PromptBuilder:
    """Builds prompts by one template.

    A string is tokenized together with its template, as the papers do it, so that a token may straddle the
    seam of the two. An input of token ids, and a text that must be cut, is put between the template's own
    tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        placeholder: the token that stands for `{placeholder}`.
        prefix, suffix: ids before and after everything else.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        placeholder: str = "",
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._placeholder = placeholder
        self._heads, self._tails = _special_tokens(tokenizer)

    def build(
        self, inputs: Sequence[Input], limit: int, *, instruction: str = "", cut: Side | None = None
    ) -> list[Prompt]:
        """Build the prompts of a request.

        Args:
            inputs: texts or lists of token ids.
            limit: the most tokens that a prompt may have.
            instruction: what stands before the text, already as the model is to read it.
            cut: drop tokens of the text's "start" or "end" where a prompt is too long.

        Raises:
            InputError: an input is empty, or too long and `cut` is None.
        """
        for index, entry in enumerate(inputs):
            if not len(entry):
                raise InputError(f"input[{index}]: found no text, expected at least one character or token")
        texts = {index: self._clean(entry) for index, entry in enumerate(inputs) if isinstance(entry, str)}
        whole = dict(zip(texts, self._encode(list(texts.values()), instruction), strict=True))
        prompts = []
        for index, entry in enumerate(inputs):
            prompt = whole.get(index)
            if prompt is None:
                assert not isinstance(entry, str)
                prompt = self._assemble(list(entry), instruction)
            if len(prompt.ids) > limit:
                if cut is None:
                    raise InputError(
                        f"input[{index}]: found {len(prompt.ids)} tokens with its prompt, expected at most "
                        f"{limit}; `truncate` drops the rest"
                    )
                text = self._plain_ids(texts[index]) if isinstance(entry, str) else list(entry)
                prompt = self._cut(text, instruction, limit, cut)
            prompts.append(prompt)
        return prompts

    def _clean(self, text: str) -> str:
        return clean(text) if self._template.clean else text

    def _encode(self, texts: list[str], instruction: str) -> list[Prompt]:
        """Prompts of strings, tokenized whole."""
        if not texts:
            return []
        rendered = [self._render(text, instruction) for text in texts]
        encoded = self._tokenizer([entry.prompt for entry in rendered], return_offsets_mapping=True)
        return [
            self._locate(*row)
            for row in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
        ]

    def _render(self, text: str, instruction: str) -> _Rendered:
        values = {TEXT: text, INSTRUCTION: instruction, PLACEHOLDER: self._placeholder}
        prompt = ""
        start = stop = 0
        placeholder = -1
        for piece in self._template.pieces:
            if piece == TEXT:
                start, stop = len(prompt), len(prompt) + len(text)
            elif piece == PLACEHOLDER:
                placeholder = len(prompt)
            prompt += values.get(piece, piece)
        return _Rendered(prompt, start, stop, placeholder)

    def _locate(self, ids: list[int], offsets: list[tuple[int, int]], rendered: _Rendered) -> Prompt:
        """Find the text's tokens by their characters; a token that straddles a seam belongs to the text."""
        inside = [
            place
            for place, (left, right) in enumerate(offsets)
            if left < rendered.stop and right > rendered.start
        ]
        start = 0 if rendered.start == 0 or not inside else inside[0]
        stop = len(ids) if rendered.stop == len(rendered.prompt) or not inside else inside[-1] + 1
        placeholder = None
        if rendered.placeholder >= 0:
            placeholder = next(
                place for place, (left, right) in enumerate(offsets) if left == rendered.placeholder < right
            )
        return self._within(ids, start, stop, placeholder)

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _assemble(self, text: list[int], instruction: str) -> Prompt:
        """A prompt of the template's own tokens around `text`."""
        ids = list(self._heads)
        start = stop = 0
        placeholder = None
        for piece in self._template.pieces:
            if piece == TEXT:
                start = len(ids)
                ids += text
                stop = len(ids)
            elif piece == PLACEHOLDER:
                placeholder = len(ids)
                ids += self._plain_ids(self._placeholder)
            else:
                ids += self._plain_ids(instruction if piece == INSTRUCTION else piece)
        if start == len(self._heads):
            start = 0
        if stop == len(ids):
            stop += len(self._tails)
        return self._within([*ids, *self._tails], start, stop, placeholder)

    def _within(self, ids: list[int], start: int, stop: int, placeholder: int | None) -> Prompt:
        """A prompt between prefix and suffix, which are not part of its text."""
        shift = len(self._prefix)
        if placeholder is not None:
            placeholder += shift
        return Prompt([*self._prefix, *ids, *self._suffix], start + shift, stop + shift, placeholder)

    def _cut(self, text: list[int], instruction: str, limit: int, side: Side) -> Prompt:
        empty = len(self._assemble([], instruction).ids)
        room = (limit - empty) // self._template.copies
        if room < 1:
            raise InputError(
                f"the prompt around a text has {empty} tokens, expected fewer than the limit of {limit}"
            )
        return self._assemble(text[:room] if side == "end" else text[-room:], instruction)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and after a text."""
    probe: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    around: list[int] = tokenizer("a")["input_ids"]
    place = next(
        (
            index
            for index in range(len(around) - len(probe) + 1)
            if around[index : index + len(probe)] == probe
        ),
        0,
    )
    return around[:place], around[place + len(probe) :]
