"""Prompts around a text: literal strings with `{text}`, and `{placeholder}` or `{instruction}` where wanted.

Source: Token Prepending (arXiv 2412.11556) and its code for the first three, with its cleaning of texts; Echo
embeddings' README for the last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TEXT, PLACEHOLDER, INSTRUCTION = "{text}", "{placeholder}", "{instruction}"

_ONE_WORD = 'sentence : {placeholder} "{text}" means in one word:"'
TEMPLATES = {
    "plain": "{instruction}{text}",
    "prompt-eol": f"This {_ONE_WORD}",
    "pretended-cot": f"After thinking step by step , this {_ONE_WORD}",
    "knowledge": (
        "The essence of a sentence is often captured by its main subjects and actions, while descriptive "
        f"terms provide additional but less central details. With this in mind , this {_ONE_WORD}"
    ),
    "echo": "{instruction}Query:{text}\nQuery again:{text}",
}
CLEANED = {"prompt-eol", "pretended-cot", "knowledge"}  # texts stand in quotation marks there

_SLOTS = re.compile(r"(\{text\}|\{placeholder\}|\{instruction\})")


@dataclass(frozen=True)
class Template:
    """A template in pieces: literals and slots in turn.

    Attributes:
        pieces: literal strings and `TEXT`, `PLACEHOLDER`, `INSTRUCTION`; an instruction comes first where the
            template does not place it.
        clean: texts are to be cleaned.
    """

    pieces: tuple[str, ...]
    clean: bool = False

    @classmethod
    def parse(cls, text: str, *, clean: bool = False) -> Template:
        """
        Raises:
            ValueError: `text` lacks `{text}`, or has another slot than once.
        """
        pieces = tuple(piece for piece in _SLOTS.split(text) if piece)
        if TEXT not in pieces:
            raise ValueError(f"embedding.prompt: found {text!r}, expected {TEXT} in it, or one of {_names()}")
        for slot in (PLACEHOLDER, INSTRUCTION):
            if pieces.count(slot) > 1:
                raise ValueError(
                    f"embedding.prompt: found {slot} {pieces.count(slot)} times, expected it once"
                )
        if INSTRUCTION not in pieces:
            pieces = (INSTRUCTION, *pieces)
        return cls(pieces, clean)

    @classmethod
    def named(cls, name: str, *, clean: bool | None = None) -> Template:
        """The template of that name, or the one that `name` itself is."""
        if name in TEMPLATES:
            return cls.parse(TEMPLATES[name], clean=name in CLEANED if clean is None else clean)
        return cls.parse(name, clean=bool(clean))

    def without_placeholder(self) -> Template:
        """The same prompt without the placeholder and the space after it."""
        if PLACEHOLDER not in self.pieces:
            return self
        place = self.pieces.index(PLACEHOLDER)
        before, after = self.pieces[:place], self.pieces[place + 1 :]
        if after and after[0].startswith(" "):
            after = (after[0][1:], *after[1:])
        if before and after and before[-1] not in _SPECIAL and after[0] not in _SPECIAL:
            before, after = before[:-1], (before[-1] + after[0], *after[1:])
        return Template((*before, *(piece for piece in after if piece)), self.clean)

    @property
    def copies(self) -> int:
        return self.pieces.count(TEXT)


_SPECIAL = {TEXT, PLACEHOLDER, INSTRUCTION}


def _names() -> str:
    return ", ".join(TEMPLATES)


def clean(text: str) -> str:
    """`text` as a sentence that can stand in quotation marks."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text
