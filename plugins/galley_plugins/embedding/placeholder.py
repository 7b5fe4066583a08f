"""The token that stands for a template's `{placeholder}`."""

from __future__ import annotations

from typing import Any

# Tokens of model families that no text uses, by preference; Token Prepending's authors add the first one.
UNUSED = ("<PST>", "<repo_name>", "<|fim_pad|>", "<unused0>", "<|reserved_special_token_0|>")


def placeholder_of(tokenizer: Any) -> str:
    """The token that stands for `{placeholder}`: one that texts do not use, or else the end of a text."""
    vocabulary = tokenizer.get_added_vocab()
    for token in UNUSED:
        if token in vocabulary:
            return token
    return str(tokenizer.eos_token or tokenizer.unk_token)
