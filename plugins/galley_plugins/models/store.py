"""Folders in the user's cache that are either whole or not there.

A folder is built beside its final place and renamed into it, and carries a manifest with the size and SHA-256
of every file, compared at each use. One process builds at a time; the others wait and use what it built.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galley_plugins.models.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

MANIFEST = "galley-manifest.json"

LOCK_TIMEOUT_S = 600.0
"""How long to wait for another process that builds the same folder; a build takes seconds."""


def cache_root() -> Path:
    """`$GALLEY_CACHE_DIR`, or `galley` in `$XDG_CACHE_HOME` or `~/.cache`; absolute, not created."""
    own = os.environ.get("GALLEY_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "galley"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class State(StrEnum):
    """What lies at the place of a folder."""

    READY = "ready"
    ABSENT = "absent"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class CheckedFolder:
    """A folder that is built once and verified at each use."""

    path: Path
    origin: str  # what it is built from; a folder with another origin is built anew
    size: int  # bytes it needs, about

    def ensure(self, build: Callable[[Path], None]) -> Path:
        """Gives the path of the whole folder, calling `build` with an empty folder to fill if there is none.

        Raises:
            CacheError: the cache cannot be read or written, is full, or another process holds it too long.
        """
        if self.state() is State.READY:
            return self.path
        with self._explained("write to"), self._locked():
            self._remove_leftovers()
            if self.path.exists():
                reason = self._damage()
                if reason is None:  # another process built it while this one waited
                    return self.path
                logger.warning("rebuilding %s: %s", self.path, reason)
                self._remove()
            self._require_space()
            self._build(build)
        return self.path

    def state(self) -> State:
        """Verifies what is there, changing nothing; raises CacheError if it cannot be read."""
        with self._explained("read"):
            if not self.path.exists():
                return State.ABSENT
            return State.READY if self._damage() is None else State.DAMAGED

    def _damage(self) -> str | None:
        """Why the existing folder cannot be used, or None if every file is what the manifest says."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            origin, files = manifest["origin"], dict(manifest["files"])
            if origin != self.origin:
                return f"it was made from {origin!r}, expected {self.origin!r}"
            present = {entry.name for entry in self.path.iterdir()} - {MANIFEST}
            if present != set(files):
                return f"it holds {sorted(present)}, expected {sorted(files)}"
            for name, expected in sorted(files.items()):
                found = _record(self.path / name, expected)
                if found != expected:
                    return f"{name} is {found}, expected {expected}"
        except (ValueError, TypeError, KeyError) as error:
            return f"{MANIFEST} is unreadable ({error!r})"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            return f"{error.filename} is not there as a file"
        return None

    def _build(self, build: Callable[[Path], None]) -> None:
        temporary = self._beside()
        temporary.mkdir()
        try:
            build(temporary)
            files = {file.name: _record(file) for file in sorted(temporary.iterdir())}
            manifest = {"origin": self.origin, "files": files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            temporary.rename(self.path)
            sync(self.path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _remove(self) -> None:
        """Renames first, so that nobody sees a half-deleted folder under the final name."""
        aside = self._beside()
        self.path.rename(aside)
        _delete(aside)

    def _beside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")

    def _remove_leftovers(self) -> None:
        """Only the holder of the lock makes such folders, so any that exists was left by a killed process."""
        for leftover in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            logger.info("removing %s, left by an interrupted run", leftover)
            _delete(leftover)

    def _require_space(self) -> None:
        if shutil.disk_usage(self.path.parent).free < self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import filelock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            logger.info("another process prepares %s; waiting for it", self.path)
            try:
                lock.acquire(timeout=LOCK_TIMEOUT_S)
            except filelock.Timeout:
                raise CacheError(
                    f"another process has held {lock.lock_file} for {LOCK_TIMEOUT_S:.0f} s; end it and retry"
                ) from None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Turns an OSError into a CacheError that names the folder and the space needed."""
        try:
            yield
        except OSError as error:
            needed = f"{self.size / 1e6:.0f} MB"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                text = f"{self.path.parent} is full: {needed} needed; make room, or set GALLEY_CACHE_DIR"
            else:
                text = (
                    f"cannot {verb} {self.path.parent} ({error}); "
                    f"set GALLEY_CACHE_DIR to a folder with {needed} to write"
                )
            raise CacheError(text) from error


def _record(path: Path, expected: Any = None) -> dict[str, Any]:
    """Size in bytes and checksum of a file; a size other than the expected one spares the checksum."""
    size = path.stat().st_size
    if isinstance(expected, dict) and expected.get("size") != size:
        return {"size": size}
    return {"size": size, "sha256": sha256_of(path)}


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once it is whole and on the disk.

    If filling fails, it is gone and `folder` as it was. One process fills a folder at a time.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was ended
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
