"""A stage is whole or not there, whenever the process that makes it ends."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors import SafetensorError

from galley_plugins.memory.building import stages
from galley_plugins.memory.building.stages import DONE, PROGRESS, Stage, StageError, explained, opened

if TYPE_CHECKING:
    from pathlib import Path


class Killed(BaseException):
    """In place of the end of the process."""


def made(folder: Path, settings: dict[str, Any] | None = None, after: Stage | None = None) -> Stage:
    """With two files, [6] and [3, 2]."""
    stage = Stage(folder, settings or {"a": 1}, after)
    stage.begin()
    stage.array("one", "int32", (6,))[:] = range(6)
    stage.array("two", "float16", (3, 2))[:] = 0.5
    stage.finish({"count": 6})
    return stage


def test_a_whole_stage_gives_what_was_written(tmp_path: Path) -> None:
    made(tmp_path / "stage")
    stage = Stage(tmp_path / "stage", {"a": 1})
    assert stage.done
    assert stage.result == {"count": 6}
    assert stage.read("one", "int32").tolist() == [0, 1, 2, 3, 4, 5]
    assert stage.read("two", "float16", 2).tolist() == [[0.5, 0.5]] * 3
    assert sorted(path.name for path in stage.folder.iterdir()) == ["one", DONE, "two"]


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_a_file_of_another_size_makes_a_stage_anew(tmp_path: Path, damage: str) -> None:
    stage = made(tmp_path / "stage")
    path = stage.folder / "two"
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, 4 if damage == "shorter" else 40)
    assert not stage.done
    assert opened(stage.folder) is None
    assert stage.begin() == {}
    assert list(stage.folder.iterdir()) == []


def test_a_stage_of_other_settings_is_made_anew(tmp_path: Path) -> None:
    first = made(tmp_path / "first")
    second = made(tmp_path / "second", {"b": [1, 2.5]}, first)
    assert Stage(second.folder, {"b": (1, 2.5)}, first).done
    assert not Stage(second.folder, {"b": [1, 3]}, first).done
    assert not Stage(second.folder, {"b": [1, 2.5]}, Stage(first.folder, {"a": 2})).done
    assert not Stage(second.folder, {"b": [1, 2.5]}).done
    other = Stage(second.folder, {"b": None}, first)
    assert other.begin() == {}
    assert list(second.folder.iterdir()) == []
    assert first.done


def test_an_interrupted_stage_keeps_what_was_noted(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", {"a": 1})
    assert stage.begin() == {}
    stage.array("one", "int32", (6,))[:4] = 7
    stage.note({"rows": 4})
    assert not stage.done
    again = Stage(tmp_path / "stage", {"a": 1})
    assert again.begin() == {"rows": 4}
    assert again.array("one", "int32", (6,)).tolist() == [7, 7, 7, 7, 0, 0]
    assert Stage(tmp_path / "stage", {"a": 2}).begin() == {}


@pytest.mark.parametrize("call", range(6))
def test_a_stage_that_was_ended_while_finishing_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    stage = Stage(tmp_path / "stage", {"a": 1})
    stage.begin()
    stage.array("one", "int32", (6,))[:] = range(6)
    stage.array("two", "int32", (6,))[:] = range(6)
    stage.note({"rows": 6})
    calls: list[Any] = []
    whole = stages.sync

    def sync(path: Path) -> None:
        calls.append(path)
        if len(calls) == call + 1:
            raise Killed
        whole(path)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(stages, "sync", sync)
        stage.finish({"rows": 6})
    again = Stage(tmp_path / "stage", {"a": 1})
    if not again.done:
        assert again.begin() == {"rows": 6}
        for name in ("one", "two"):
            assert again.array(name, "int32", (6,)).tolist() == [0, 1, 2, 3, 4, 5]
        again.finish({"rows": 6})
    assert Stage(tmp_path / "stage", {"a": 1}).done
    assert again.read("one", "int32").tolist() == again.read("two", "int32").tolist() == [0, 1, 2, 3, 4, 5]
    assert not list(again.folder.glob("*.partial"))


def test_a_whole_stage_that_was_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    stage = made(tmp_path / "stage")
    stage.note({"rows": 6})  # as it is where the process ended before the note went
    assert stage.done
    (stage.folder / "one").unlink()
    assert Stage(stage.folder, {"a": 1}).begin() == {}
    assert list(stage.folder.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
@pytest.mark.parametrize("name", [DONE, PROGRESS])
def test_a_damaged_note_is_no_stage(tmp_path: Path, name: str, text: str) -> None:
    stage = made(tmp_path / "stage")
    (stage.folder / DONE).unlink()
    (stage.folder / name).write_text(text)
    assert not stage.done
    assert opened(stage.folder) is None
    assert stage.begin() == {}


def test_empty_files_are_whole_too(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", {})
    stage.begin()
    assert stage.array("none", "float32", (0, 3)).shape == (0, 3)
    stage.finish({})
    assert stage.done
    assert stage.read("none", "float32", 3).shape == (0, 3)
    assert stage.read("none", "float32", 3).dtype == np.float32


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    stage = Stage(tmp_path / "stage", {})
    stage.begin()
    with pytest.raises(StageError, match=r"no room for .*one\.partial of 4 MB: \d+ MB are free"):
        stage.array("one", "float32", (1_000_000,))
    assert not stage.done


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: str(error),
)
def test_no_room_is_explained(tmp_path: Path, error: Exception) -> None:
    said = r"no room for .*file: \d+ MB are free; the stages before are whole"
    with pytest.raises(StageError, match=said), explained(tmp_path / "file"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), SafetensorError("header"), KeyError("x")])
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained(tmp_path / "file"):
        raise error
    assert caught.value is error
