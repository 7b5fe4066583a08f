"""Tables on disk: safetensors files that say what they are, written whole or not at all.

A file carries its format, its kind, the tokenizer that its token ids belong to and a checksum, so that a file
of another model, of another version or off a damaged disk is never taken for the right one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from galley_plugins.models.store import sync

if TYPE_CHECKING:
    from collections.abc import Mapping

    Layout = Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
    """Tensors by name: their dtype and shape, with None for a length that is free."""

FORMAT = "galley-tables"
VERSION = 1


class TableFileError(Exception):
    """A file of tables cannot be written, or is not what was expected; the message says what was found."""


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a vocabulary: of its tokens and ids, sorted, added ones included.

    The vocabulary and not the file `tokenizer.json`: what a learned id means depends on nothing else, and a
    tokenizer in memory gives the same hash as its folder.

    Args:
        tokenizer: anything with Hugging Face's `get_vocab`, or a folder or hub id to load one from.

    Raises:
        OSError, ValueError: there is no tokenizer at that path, as transformers says it.
    """
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(os.fspath(tokenizer))
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def save_tables(
    path: str | os.PathLike[str],
    kind: str,
    tokenizer: str,
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, int],
) -> None:
    """Write tensors and numbers; a failure leaves the file that was there.

    Args:
        kind: what the tables are; asked for at loading.
        tokenizer: the hash of the tokenizer, as `tokenizer_hash` gives it.
        tensors: contiguous, on any device.

    Raises:
        TableFileError: the file cannot be written.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": kind,
        "tokenizer": tokenizer,
        "numbers": json.dumps(numbers, sort_keys=True),
    }
    metadata["sha256"] = _checksum(tensors, metadata)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise TableFileError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_tables(
    path: str | os.PathLike[str], kind: str, tokenizer: str, layout: Layout | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Read what `save_tables` wrote. The tensors may be private views of the mapped file.

    Args:
        layout: the tensors that must be there, and no others; None takes any.

    Raises:
        FileNotFoundError: there is no such file.
        TableFileError: the file is damaged, or of another format, version, kind or tokenizer, or its tensors
            are not those of `layout`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            for name, expected in (
                ("format", FORMAT),
                ("version", str(VERSION)),
                ("kind", kind),
                ("tokenizer", tokenizer),
            ):
                if metadata.get(name) != expected:
                    raise TableFileError(f"{path}: {name} is {metadata.get(name)!r}, expected {expected!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TableFileError(f"{path} is no readable safetensors file: {error}") from error
    checksum = metadata.pop("sha256", None)
    found = _checksum(tensors, metadata)
    if checksum != found:
        raise TableFileError(f"{path} is damaged: its content has sha256 {found}, expected {checksum}")
    if layout is not None:
        _check_layout(path, tensors, layout)
    numbers: dict[str, int] = json.loads(metadata["numbers"])
    return tensors, numbers


def _check_layout(path: Path, tensors: dict[str, torch.Tensor], layout: Layout) -> None:
    if set(tensors) != set(layout):
        raise TableFileError(f"{path}: tensors are {sorted(tensors)}, expected {sorted(layout)}")
    for name, (dtype, shape) in layout.items():
        tensor = tensors[name]
        fits = len(tensor.shape) == len(shape) and all(
            wanted is None or length == wanted for length, wanted in zip(tensor.shape, shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            wanted = ["any" if length is None else length for length in shape]
            raise TableFileError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {wanted}"
            )


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
