from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from galley_plugins.worker import device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def machine(
    tmp_path: Path, distributions: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Makes this machine one with these distributions installed and these paths present."""

    def become(*paths: str, **installed: str) -> None:
        root = tmp_path / "machine"
        for path in paths:
            (root / path.lstrip("/")).mkdir(parents=True)
        distributions(**installed)
        monkeypatch.setattr(device, "Path", lambda path: root / path.lstrip("/"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return become


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that passes for a model, as far as a launcher looks."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def read_by_vllm() -> Callable[[list[str]], Any]:
    """vLLM's own parser of the server's command line; a test fails where it refuses one."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:
        pytest.fail(f"vLLM refuses the command line: {message}")

    parser = make_arg_parser(FlexibleArgumentParser(prog="galley worker"))
    parser.error = refuse

    def read(arguments: list[str]) -> Any:
        values = parser.parse_args(arguments)
        validate_parsed_serve_args(values)
        return values

    read.parser = parser  # type: ignore[attr-defined]
    return read
