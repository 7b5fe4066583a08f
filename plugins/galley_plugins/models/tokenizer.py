"""A GGUF's byte-level BPE tokenizer as the files that Hugging Face's tokenizers read.

The files are written as plain JSON, so that nothing between the GGUF and the disk can rearrange them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from galley_plugins.models.errors import ConversionError

if TYPE_CHECKING:
    from pathlib import Path

    from galley_plugins.models.gguf_file import GgufFile

CONTROL_TOKEN = 3
"""The token type that GGUF gives to special tokens."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

# How text is split before merging, by llama.cpp's name for it.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    },
}


def write_tokenizer(source: GgufFile, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json; `max_length` is in tokens.

    Raises:
        ConversionError: the tokenizer is of another kind, or adds tokens of its own around a text.
    """
    _check_kind(source)
    tokens: list[str] = source.get("tokenizer.ggml.tokens", list)
    types: list[int] = source.get("tokenizer.ggml.token_type", list)
    special = [index for index, kind in enumerate(types) if kind == CONTROL_TOKEN]
    _write(folder / "tokenizer.json", _tokenizer(source, tokens, special))
    _write(folder / "tokenizer_config.json", _tokenizer_config(source, tokens, special, max_length))


def special_token_ids(source: GgufFile) -> dict[str, int]:
    """The ids of the tokens that begin, end and pad a text, under the names of Hugging Face's configuration.

    The end is what ends a turn of a chat, which is what GGUF's eos is for a chat model.
    """
    return {
        f"{name}_token_id": source.get(f"tokenizer.ggml.{key}_token_id", int)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def _check_kind(source: GgufFile) -> None:
    for key, expected in (
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.add_bos_token", False),
        ("tokenizer.ggml.add_space_prefix", False),
    ):
        found = source.get(key, type(expected), expected)
        if found != expected:
            raise ConversionError(f"{source.path}: {key} is {found!r}, expected {expected!r}")


def _tokenizer(source: GgufFile, tokens: list[str], special: list[int]) -> dict[str, Any]:
    split = source.get("tokenizer.ggml.pre", str)
    if split not in PRE_TOKENIZERS:
        raise ConversionError(
            f"{source.path}: tokenizer.ggml.pre is {split!r}, expected one of {sorted(PRE_TOKENIZERS)}"
        )
    merges: list[str] = source.get("tokenizer.ggml.merges", list)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **_added(tokens[index])} for index in special],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[split],
        "post_processor": None,
        "decoder": BYTE_LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _tokenizer_config(
    source: GgufFile, tokens: list[str], special: list[int], max_length: int
) -> dict[str, Any]:
    ids = special_token_ids(source)
    return {
        # a class that takes tokenizer.json as it is; GPT2Tokenizer would put its own splitting in its place
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(index): _added(tokens[index]) for index in special},
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[source.get("tokenizer.ggml.unknown_token_id", int)],
        "chat_template": source.get("tokenizer.chat_template", str),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }


def _added(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
