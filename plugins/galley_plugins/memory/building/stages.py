"""Stages on disk, each a folder that is whole once it says so.

A stage's key follows from its settings and the key of the stage before it: whatever is changed, that stage
and those behind it are made anew, and nothing else. Files are written as `NAME.partial` and renamed when they
are whole; `stage.json` is written last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from galley_plugins.models.store import sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

DONE, PROGRESS = "stage.json", "progress.json"


class StageError(ValueError):
    """A stage cannot be made; the message says why. Earlier stages stay usable."""


class Stage:
    """One folder of a build.

    Args:
        folder: of the stage.
        settings: what its result depends on, as JSON has it.
        after: the stage whose result it is made from.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], after: Stage | None = None) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        text = json.dumps([self.settings, after.key if after is not None else ""], sort_keys=True)
        self.key: str = hashlib.sha256(text.encode()).hexdigest()

    @property
    def done(self) -> bool:
        """All of it is there, of these settings."""
        values = _read(self.folder / DONE)
        if values.get("key") != self.key:
            return False
        sizes: dict[str, int] = values["files"]
        return all(_size(self.folder / name) == size for name, size in sizes.items())

    @property
    def result(self) -> dict[str, Any]:
        """What `finish` was given."""
        found: dict[str, Any] = _read(self.folder / DONE)["result"]
        return found

    def begin(self) -> dict[str, Any]:
        """Prepare the folder; how far an interrupted run of these settings came, empty for a new one."""
        progress = _read(self.folder / PROGRESS)
        if progress.get("key") == self.key and not (self.folder / DONE).exists():
            self._take_back()
            found: dict[str, Any] = progress["progress"]
            return found
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return {}

    def note(self, progress: Mapping[str, Any]) -> None:
        """Note how far it is; what it rests on must be on the disk."""
        _write(self.folder / PROGRESS, {"key": self.key, "progress": dict(progress)})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Rename what is partial, and say that the stage is whole."""
        for path in self.folder.glob("*.partial"):
            sync(path)
            path.rename(path.with_suffix(""))
        files = {path.name: path.stat().st_size for path in self._files()}
        values = {"key": self.key, "settings": self.settings, "result": dict(result), "files": files}
        _write(self.folder / DONE, values)
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def _take_back(self) -> None:
        """Files that were renamed by a run that ended before it could say that all are whole."""
        for path in self._files():
            if path.suffix != ".partial":
                path.rename(path.with_name(f"{path.name}.partial"))

    def _files(self) -> list[Path]:
        found = (path for path in sorted(self.folder.iterdir()) if path.is_file())
        return [path for path in found if path.name not in (DONE, PROGRESS) and path.name[0] != "."]

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """A file that is mapped to be written: what an interrupted run has written of it is kept.

        Raises:
            StageError: the disk has no room for it.
        """
        path = self.folder / f"{name}.partial"
        size = max(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
        with explained(path, size):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, size)
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
        return np.memmap(path, dtype, "r+", shape=shape) if min(shape) else np.empty(shape, dtype)

    def read(self, name: str, dtype: str, *width: int) -> np.ndarray:
        """[rows, *width] of a whole stage, mapped."""
        path = self.folder / name
        rows = path.stat().st_size // (int(np.prod(width, dtype=np.int64)) * np.dtype(dtype).itemsize)
        return np.memmap(path, dtype, "r", shape=(rows, *width)) if rows else np.empty((0, *width), dtype)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process works in the folder; the lock is gone with the process that has it.

    Raises:
        StageError: another one does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{folder}: found another build at work there, expected none") from None
        yield
    finally:
        os.close(descriptor)


def opened(folder: Path) -> Stage | None:
    """A whole stage, whatever its settings; None if there is none."""
    values = _read(folder / DONE)
    stage = Stage(folder, values.get("settings", {}))
    stage.key = values.get("key", "")
    return stage if values and stage.done else None


class explained:  # noqa: N801 -- a context manager
    """Says which file the disk had no room for.

    Args:
        size: bytes that were wanted, if it is known.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self._path, self._size = path, size

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if _number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(self._path.parent).free
            wanted = "" if self._size is None else f" of {self._size / 1e6:.0f} MB"
            raise StageError(
                f"no room for {self._path}{wanted}: {free / 1e6:.0f} MB are free; the stages before are "
                "whole, the same command goes on from them"
            ) from None


def _number(error: BaseException | None) -> int | None:
    """That of the operating system, which safetensors has in its text."""
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    return error.errno if isinstance(error, OSError) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with explained(path):
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
