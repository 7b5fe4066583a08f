"""Where galley keeps files of its own on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$GALLEY_CACHE_DIR`, else `$XDG_CACHE_HOME/galley`, else `~/.cache/galley`."""
    own = os.environ.get("GALLEY_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "galley"
