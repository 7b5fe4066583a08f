import errno
import logging
import os
import shutil
from pathlib import Path

import filelock
import pytest

from galley_plugins.models import store
from galley_plugins.models.errors import CacheError
from galley_plugins.models.store import MANIFEST, CheckedFolder, State, cache_root

CONTENT = {"a.bin": b"weights" * 1000, "b.json": b"{}"}


def build(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def refuse(folder: Path) -> None:
    raise AssertionError("built again")


def files_in(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name != MANIFEST}


def leftovers_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.endswith(".tmp")]


@pytest.fixture
def folder(tmp_path: Path) -> CheckedFolder:
    return CheckedFolder(tmp_path / "models" / "thing-1", origin="thing", size=1000)


def test_builds_once_and_then_gives_the_same_folder(folder: CheckedFolder) -> None:
    assert folder.state() is State.ABSENT
    path = folder.ensure(build)
    assert folder.state() is State.READY
    assert folder.ensure(refuse) == path == folder.path
    assert files_in(path) == CONTENT
    assert leftovers_in(path.parent) == []


def test_a_folder_of_a_read_only_cache_is_used_without_a_lock(folder: CheckedFolder) -> None:
    folder.ensure(build)
    with filelock.FileLock(folder.path.with_name(f".{folder.path.name}.lock")):
        assert folder.ensure(refuse) == folder.path


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / "a.bin").read_bytes())
    content[123] ^= 1
    (path / "a.bin").write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path / "a.bin", 10)


def remove_a_file(path: Path) -> None:
    (path / "b.json").unlink()


def add_a_file(path: Path) -> None:
    (path / "adapter.safetensors").touch()


def put_a_folder_in_place_of_a_file(path: Path) -> None:
    (path / "b.json").unlink()
    (path / "b.json").mkdir()


def remove_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def break_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("{")


def empty_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("[]")


def put_a_file_in_place_of_the_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, "a.bin"),
        (truncate, "a.bin"),
        (remove_a_file, "b.json"),
        (add_a_file, "adapter.safetensors"),
        (put_a_folder_in_place_of_a_file, "b.json"),
        (remove_the_manifest, MANIFEST),
        (break_the_manifest, MANIFEST),
        (empty_the_manifest, MANIFEST),
        (put_a_file_in_place_of_the_folder, MANIFEST),
    ],
)
def test_a_damaged_folder_is_rebuilt_and_the_reason_logged(
    folder: CheckedFolder, damage, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.ensure(build)
    damage(folder.path)
    assert folder.state() is State.DAMAGED
    with caplog.at_level(logging.WARNING):
        folder.ensure(build)
    assert "rebuilding" in caplog.text
    assert reason in caplog.text
    assert files_in(folder.path) == CONTENT
    assert leftovers_in(folder.path.parent) == []


def test_a_folder_made_from_something_else_is_rebuilt(folder: CheckedFolder) -> None:
    folder.ensure(build)
    newer = CheckedFolder(folder.path, origin="thing, revised", size=1000)
    newer.ensure(build)
    assert newer.state() is State.READY
    assert folder.state() is State.DAMAGED


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(folder: CheckedFolder, error: BaseException) -> None:
    def half(target: Path) -> None:
        (target / "a.bin").touch()
        raise error

    with pytest.raises(type(error)):
        folder.ensure(half)
    assert folder.state() is State.ABSENT
    assert leftovers_in(folder.path.parent) == []


def test_nothing_stands_under_the_final_name_while_it_is_built(folder: CheckedFolder) -> None:
    seen = []

    def look(target: Path) -> None:
        build(target)
        seen.append(folder.path.exists())

    folder.ensure(look)
    assert seen == [False]


def test_leftovers_of_this_folder_only_are_removed(folder: CheckedFolder) -> None:
    parent = folder.path.parent
    parent.mkdir()
    (parent / ".thing-1.0badcafe.tmp").mkdir()
    (parent / ".thing-1.0badcafe.tmp" / "a.bin").touch()
    (parent / ".thing-2.0badcafe.tmp").mkdir()
    folder.ensure(build)
    assert leftovers_in(parent) == [".thing-2.0badcafe.tmp"]


def test_too_little_space_is_refused_before_building(
    folder: CheckedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_500, 500))
    with pytest.raises(CacheError, match=r"models is full: 270 MB needed"):
        CheckedFolder(folder.path, "thing", size=270_000_000).ensure(refuse)


def test_a_disk_that_fills_up_is_explained_and_cleaned(folder: CheckedFolder) -> None:
    def fill(target: Path) -> None:
        build(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CacheError, match=r"models is full: 0 MB needed; make room, or set GALLEY_CACHE_DIR"):
        folder.ensure(fill)
    assert leftovers_in(folder.path.parent) == []


def test_a_cache_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = CheckedFolder(tmp_path / "file" / "models" / "thing-1", "thing", 270_000_000)
    with pytest.raises(CacheError, match=r"cannot write to .*/file/models .*GALLEY_CACHE_DIR .*270 MB"):
        folder.ensure(refuse)


def test_a_lock_held_for_too_long_is_an_error(folder: CheckedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.1)
    folder.path.parent.mkdir()
    held = filelock.FileLock(folder.path.with_name(f".{folder.path.name}.lock"))
    with held, pytest.raises(CacheError, match=r"another process has held .*thing-1.lock"):
        folder.ensure(refuse)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GALLEY_CACHE_DIR": "/one", "XDG_CACHE_HOME": "/two"}, "/one"),
        ({"GALLEY_CACHE_DIR": "~/one"}, "/home/cook/one"),
        ({"GALLEY_CACHE_DIR": "", "XDG_CACHE_HOME": "/two"}, "/two/galley"),
        ({"XDG_CACHE_HOME": "relative, so ignored"}, "/home/cook/.cache/galley"),
        ({}, "/home/cook/.cache/galley"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GALLEY_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/cook"} | environment).items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)
