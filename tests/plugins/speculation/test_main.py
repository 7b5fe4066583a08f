"""The command `python -m galley_plugins.speculation`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from galley_plugins.speculation import __main__ as command
from galley_plugins.speculation.corpus import load_corpus
from galley_plugins.speculation.store import tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; gives (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["speculation", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            command.main()
        return end.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("a b c a b d a b c\n")
    return path


def test_builds_a_table_and_says_what_it_is(
    run: Run, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table"
    status, said, errors = run("build-table", corpus, out, "--tokenizer", tokenizer_folder)
    assert (status, errors) == (0, "")
    assert said == f"{out}: 6 tri-grams of 5 bi-grams, {out.stat().st_size} bytes\n"
    assert len(load_corpus(out, tokenizer_hash(tokenizer_folder), 8).tokens) == 6


def test_options_reach_the_table(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "table"
    corpus.write_text('{"body": "a b c a b d a b c"}\n')
    options = ("--tokenizer", tokenizer_folder, "--text-field", "body")
    status, said, errors = run(
        "build-table", corpus, out, *options, "--limit-successors", 1, "--table-bytes", 80
    )
    assert (status, errors) == (0, "4 bi-grams did not fit into 80 bytes\n")
    assert said.startswith(f"{out}: 1 tri-grams of 1 bi-grams, ")


def test_errors_are_a_line_and_status_2(
    run: Run, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table"
    for arguments, message in (
        ((tmp_path / "nothing", out, "--tokenizer", tokenizer_folder), "nothing does not exist"),
        ((corpus, out, "--tokenizer", "builtin:nope"), "no built-in model is called 'builtin:nope'"),
        ((corpus, out, "--tokenizer", tmp_path), "has no config.json"),
    ):
        status, said, errors = run("build-table", *arguments)
        assert (status, said) == (2, "")
        assert errors.startswith("error: ")
        assert message in errors
    assert not out.exists()


def test_arguments_are_checked_before_anything_is_counted(
    run: Run, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tokenizer_folder / "tokenizer.json").unlink()
    for arguments in (
        (corpus, tmp_path / "no" / "table", "--tokenizer", tokenizer_folder),
        (corpus, tmp_path, "--tokenizer", tokenizer_folder),
        (corpus, tmp_path / "table", "--tokenizer", tokenizer_folder),
        (corpus, tmp_path / "table", "--tokenizer", tokenizer_folder, "--limit-successors", 33),
        (corpus, tmp_path / "table"),
        (),
    ):
        status, said, errors = run("build-table", *arguments)
        assert (status, said) == (2, "")
        assert "Usage" in errors


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "galley_plugins.speculation", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    assert "build-table" in result.stdout
