"""Environments of peers; pip and venv are stood in for."""

from __future__ import annotations

import subprocess
import venv
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.peer_environments import PeerEnvironment, PeerError

if TYPE_CHECKING:
    from pathlib import Path

PEER = PeerEnvironment("peer-1", ("torch==2", "peer==1 extra"))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders in which an environment was created."""
    folders: list[Path] = []
    monkeypatch.setenv("GALLEY_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "galley")
    monkeypatch.setattr(venv, "create", lambda folder, **_: folders.append(folder))
    return folders


def test_packages_are_installed_one_after_the_other_apart_from_galleys(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> None:
        assert "PYTHONPATH" not in env
        asked.append(command[command.index("--quiet") + 1 :])

    monkeypatch.setattr(subprocess, "run", run)
    assert PEER.make() == tmp_path / "peers" / "peer-1" / "bin" / "python"
    assert made == [tmp_path / "peers" / "peer-1"]
    assert asked == [["torch==2"], ["peer==1", "extra"]]


@pytest.mark.usefixtures("made")
def test_what_pip_says_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="no such version")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PeerError, match="installing torch==2: no such version"):
        PEER.make()
    with pytest.raises(PeerError, match="makes it"):
        PEER.python()
