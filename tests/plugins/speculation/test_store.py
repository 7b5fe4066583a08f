"""Files of tables: what is written comes back, and anything else is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from galley_plugins.speculation import store
from galley_plugins.speculation.store import TableFileError, load_tables, save_tables, tokenizer_hash

TENSORS = {
    "keys": torch.tensor([1, 2**62, -3]),
    "tokens": torch.arange(24, dtype=torch.int32).reshape(3, 8),
    "weights": torch.linspace(0, 1, 24).reshape(3, 8),
    "odd": torch.tensor([5], dtype=torch.uint8),
    "half": torch.tensor([0.5], dtype=torch.bfloat16),
    "none": torch.empty((0, 8)),
}
LAYOUT = {
    "keys": (torch.int64, (3,)),
    "tokens": (torch.int32, (None, 8)),
    "weights": (torch.float32, (3, 8)),
    "odd": (torch.uint8, (None,)),
    "half": (torch.bfloat16, (1,)),
    "none": (torch.float32, (None, None)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tables.safetensors"
    save_tables(path, "thing", "abc", TENSORS, {"clock": 12345678901})
    return path


def test_what_is_written_comes_back(path: Path) -> None:
    tensors, numbers = load_tables(path, "thing", "abc", LAYOUT)
    assert numbers == {"clock": 12345678901}
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert list(path.parent.iterdir()) == [path]


def test_loaded_tensors_may_be_changed_without_changing_the_file(path: Path) -> None:
    tensors, _ = load_tables(path, "thing", "abc")
    tensors["tokens"].zero_()
    save_tables(path, "thing", "abc", TENSORS, {})  # and the file may be replaced meanwhile
    assert not tensors["tokens"].any()
    assert torch.equal(load_tables(path, "thing", "abc")[0]["tokens"], TENSORS["tokens"])


@pytest.mark.parametrize(
    ("kind", "tokenizer", "message"),
    [
        ("other", "abc", "kind is 'thing', expected 'other'"),
        ("thing", "xyz", "tokenizer is 'abc', expected 'xyz'"),
    ],
)
def test_another_kind_or_tokenizer_is_refused(path: Path, kind: str, tokenizer: str, message: str) -> None:
    with pytest.raises(TableFileError, match=message):
        load_tables(path, kind, tokenizer)


def test_another_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "VERSION", 2)
    with pytest.raises(TableFileError, match="version is '1', expected '2'"):
        load_tables(path, "thing", "abc")


def test_a_foreign_safetensors_file_is_refused(path: Path) -> None:
    save_file(TENSORS, path)
    with pytest.raises(TableFileError, match="format is None, expected 'galley-tables'"):
        load_tables(path, "thing", "abc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": (torch.int64, (4,))}, r"keys is torch.int64 \[3\], expected torch.int64 \[4\]"),
        ({"keys": (torch.int32, (3,))}, r"keys is torch.int64 \[3\], expected torch.int32 \[3\]"),
        ({"tokens": (torch.int32, (None,))}, r"tokens is torch.int32 \[3, 8\], expected .* \['any'\]"),
        ({"more": (torch.int32, (None,))}, r"expected \[.*'more'.*\]"),
    ],
)
def test_another_layout_is_refused(path: Path, change: store.Layout, message: str) -> None:
    with pytest.raises(TableFileError, match=message):
        load_tables(path, "thing", "abc", {**LAYOUT, **change})


def test_tensors_that_nobody_expects_are_refused(path: Path) -> None:
    layout = {name: entry for name, entry in LAYOUT.items() if name != "odd"}
    with pytest.raises(TableFileError, match="'odd'"):
        load_tables(path, "thing", "abc", layout)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(path: Path, length: int) -> None:
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    with pytest.raises(TableFileError, match="no readable safetensors file"):
        load_tables(path, "thing", "abc")


def test_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"not a table" * 100)
    with pytest.raises(TableFileError, match="no readable safetensors file"):
        load_tables(path, "thing", "abc")
    path.unlink()
    path.mkdir()
    with pytest.raises(TableFileError, match="no readable safetensors file"):
        load_tables(path, "thing", "abc")


def test_a_changed_byte_is_found(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TableFileError, match="is damaged: its content has sha256"):
        load_tables(path, "thing", "abc")


def test_changed_numbers_are_found(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"12345678901", b"12345678902"))
    with pytest.raises(TableFileError, match="is damaged"):
        load_tables(path, "thing", "abc")


def test_a_missing_file_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_tables(tmp_path / "nothing", "thing", "abc")


@pytest.mark.parametrize("step", ["save_file", "sync", "replace"])
def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(Path if step == "replace" else store, step, fail)
    with pytest.raises(TableFileError, match=r"cannot write .*: disk on fire"):
        save_tables(path, "thing", "abc", {"keys": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def write_some(_: object, place: Path, __: object) -> None:
        place.write_bytes(before[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "save_file", write_some)
    with pytest.raises(KeyboardInterrupt):
        save_tables(path, "thing", "abc", TENSORS, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableFileError, match=r"cannot write .*nowhere/tables"):
        save_tables(tmp_path / "nowhere" / "tables", "thing", "abc", TENSORS, {})


def test_a_file_is_plain_safetensors(path: Path) -> None:
    assert torch.equal(load_file(path)["keys"], TENSORS["keys"])


def test_a_tokenizer_has_the_same_hash_in_memory_and_on_disk(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    expected = hashlib.sha256(vocabulary.encode()).hexdigest()
    assert tokenizer_hash(tokenizer) == tokenizer_hash(tokenizer_folder) == expected
    assert tokenizer_hash(str(tokenizer_folder)) == expected
    tokenizer.add_tokens(["more"])
    assert tokenizer_hash(tokenizer) != expected
