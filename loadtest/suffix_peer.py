#!/usr/bin/env python
"""Builds what vLLM's `suffix` speculation imports: `arctic_inference.suffix_decoding`, and nothing else.

The package as a whole needs CUDA and patches vLLM as a plugin. Here an empty `arctic_inference` holds the one
subpackage, compiled by the source distribution's own CMake file, without the metadata that makes it a plugin.
Needs pip's package index and a C++20 compiler; every other tool is installed into a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from galley.paths import cache_root

VERSION = "0.1.1"  # the one that vLLM 0.32 asks for
SHA256 = "36857e2fbe3ead34821a04be98dfab95086050c1e38199c8fdfe308234fdcf63"
TOOLS = ("cmake==4.4.4", "nanobind==2.9.2", "ninja==1.13.0", "setuptools==80.9.0", "wheel==0.45.1")
MODULES = ("__init__.py", "cache.py")
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class PeerError(RuntimeError):
    """The package cannot be built here; the message says what to do."""


def suffix_peer_path(directory: Path | None = None) -> Path:
    """The folder to put on PYTHONPATH, built if it is not there.

    Args:
        directory: the folder; by default one in Galley's cache.

    Raises:
        PeerError: no compiler, no download, or a build that failed.
    """
    directory = (directory or cache_root() / "peers" / f"arctic-inference-{VERSION}").expanduser().absolute()
    if _ready(directory):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PeerError(f"{directory} has no {EXTENSION}, which this Python needs: remove it or name another")
    _check_compiler()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".suffix-peer-", dir=directory.parent) as scratch:
        built = _build(Path(scratch))
        try:
            built.rename(directory)
        except OSError:
            if not _ready(directory):  # else another process was faster
                raise
    return directory


def _ready(directory: Path) -> bool:
    return (directory / "arctic_inference" / "suffix_decoding" / EXTENSION).is_file()


def _check_compiler() -> None:
    named = os.environ.get("CXX", "").split()[:1]
    if not any(map(shutil.which, named or ("c++", "g++", "clang++"))):
        missing = f"CXX names {named[0]}, which is not there" if named else "there is no C++ compiler"
        raise PeerError(f"{missing}; on Debian and Ubuntu: apt-get install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise PeerError("Python's headers are needed; on Debian and Ubuntu: apt-get install python3-dev")


def _build(scratch: Path) -> Path:
    """Lay the package out below `scratch`; returns the folder that holds it."""
    tools = scratch / "tools"
    try:
        venv.create(tools, with_pip=True)
    except subprocess.CalledProcessError as error:
        message = "cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        raise PeerError(message) from error
    pip = [str(tools / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--only-binary", ":all:", *TOOLS], "installing the build tools")

    source = _download(scratch, pip)
    package = scratch / "built" / "arctic_inference"
    target = package / "suffix_decoding"
    target.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(source / "LICENSE", package)
    for module in MODULES:
        shutil.copy(source / "arctic_inference" / "suffix_decoding" / module, target)

    binaries = tools / "bin"
    configure = [str(binaries / "cmake"), "-S", str(source / "csrc" / "suffix_decoding"), "-B"]
    configure += [str(scratch / "objects"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={binaries / 'ninja'}"]
    configure += [f"-DPython_EXECUTABLE={binaries / 'python'}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
    _run([*configure, "-DCMAKE_BUILD_TYPE=Release"], "configuring the extension")
    _run([str(binaries / "cmake"), "--build", str(scratch / "objects")], "compiling the extension")
    _run(
        [sys.executable, "-B", "-c", "import arctic_inference.suffix_decoding"],
        "importing the result",
        PYTHONPATH=str(package.parent),
    )
    return package.parent


def _download(scratch: Path, pip: list[str]) -> Path:
    """Unpack the source distribution, which pip checks against `SHA256` before it runs anything in it."""
    # pip asks every source distribution for its metadata, and this one's setup.py imports torch without need.
    stub = scratch / "stub"
    stub.mkdir()
    (stub / "torch.py").touch()
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"arctic-inference=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    archives = scratch / "archives"
    download = [*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    download += ["--require-hashes", "--requirement", str(requirement), "--dest", str(archives)]
    _run(download, f"downloading arctic-inference {VERSION}", PYTHONPATH=str(stub))
    (archive,) = archives.iterdir()
    shutil.unpack_archive(archive, scratch / "source")
    (source,) = (scratch / "source").iterdir()
    return source


def _run(command: list[str], doing: str, **variables: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command,
        env={**kept, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PeerError(f"{doing} failed:\n{done.stdout[-4000:].strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", nargs="?", type=Path, help="to put on PYTHONPATH; default: one in Galley's cache"
    )
    try:
        print(suffix_peer_path(parser.parse_args().directory))
    except PeerError as error:
        sys.exit(f"suffix_peer: {error}")


if __name__ == "__main__":
    main()
