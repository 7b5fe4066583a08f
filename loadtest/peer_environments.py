"""Virtual environments of peers whose packages clash with Galley's, in Galley's cache folder."""

from __future__ import annotations

import os
import subprocess
import venv
from dataclasses import dataclass
from typing import TYPE_CHECKING

from galley.paths import cache_root

if TYPE_CHECKING:
    from pathlib import Path

INSTALL_SECONDS = 1800.0
SCRIPT = "python loadtest/quantization_peers.py"


class PeerError(RuntimeError):
    """A peer cannot be had here; the message says what to do."""


@dataclass(frozen=True)
class PeerEnvironment:
    """
    Attributes:
        name: of its folder.
        packages: what pip is told, one call each: a later one finds what an earlier one installed.
    """

    name: str
    packages: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return cache_root() / "peers" / self.name

    def python(self) -> Path:
        """Its interpreter.

        Raises:
            PeerError: it was not made.
        """
        found = self.folder / "bin" / "python"
        if not found.is_file():
            raise PeerError(f"{found} is not there: `{SCRIPT}` makes it")
        return found

    def make(self) -> Path:
        """Create it, or complete what is there; returns its interpreter.

        Raises:
            PeerError: a step failed.
        """
        python = self.folder / "bin" / "python"
        doing = "creating a virtual environment"
        try:
            if not python.is_file():
                venv.create(self.folder, with_pip=True)
            for package in self.packages:
                doing = f"installing {package}"
                command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
                subprocess.run(
                    [*command, *package.split()],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=INSTALL_SECONDS,
                    env=own_environment(),
                )
        except (subprocess.SubprocessError, OSError) as error:
            raise PeerError(f"{doing}: {getattr(error, 'stderr', None) or error}") from error
        return python


def own_environment() -> dict[str, str]:
    """This process's variables without those that would bring its packages along."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
