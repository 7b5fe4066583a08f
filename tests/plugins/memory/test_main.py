"""The command line: what it prints, where it stops, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from galley_plugins.memory.__main__ import app
from galley_plugins.memory.checkpoint import load_settings
from tests.plugins.memory.conftest import save_model, sentences, word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = ["--context", "16", "--neighbours", "20", "--hidden", "24", "--device", "cpu", "--epochs", "1"]


@pytest.fixture(scope="module")
def out(model_folder: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build, made by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("memory") / "out"
    command = [sys.executable, "-m", "galley_plugins.memory", "build", str(corpus_file), str(folder)]
    ran = subprocess.run(
        [*command, "--model", str(model_folder), *OPTIONS, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    printed = json.loads(line)
    assert printed["out"] == str(folder)
    assert printed["seconds"] > 0
    settings = load_settings(folder / "memory")
    assert printed["memory"]["weight"] == settings.weight
    assert printed["memory"]["corpus"] == settings.corpus
    for stage in ("tokens", "datastore", "index", "teacher", "train", "weigh"):
        assert f"\n{stage}: " in f"\n{ran.stderr}"
    assert f"nats a token at weight {settings.weight:.2f}" in ran.stderr
    return folder


@pytest.mark.parametrize("stage", ["datastore", "index", "teacher", "train", "weigh", "build"])
def test_commands_go_on_with_what_is_there(
    stage: str, out: Path, model_folder: Path, corpus_file: Path
) -> None:
    ran = CliRunner().invoke(app, [stage, str(corpus_file), str(out), "--model", str(model_folder), *OPTIONS])
    assert ran.exit_code == 0, ran.output
    assert "to do" not in ran.stderr
    assert ran.stderr.count("there already") == {"datastore": 2, "index": 3, "teacher": 4, "train": 5}.get(
        stage, 6
    )
    assert ran.stdout == ""


def test_a_stage_command_prints_where_it_is(model_folder: Path, corpus_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ran = CliRunner().invoke(
        app, ["datastore", str(corpus_file), str(folder), "--model", str(model_folder), *OPTIONS, "--json"]
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout).keys() == {"out", "seconds"}
    assert sorted(path.name for path in folder.iterdir()) == ["datastore", "tokens"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--held-out", "1.5"], "held_out: found 1.5, expected a share between 0 and 1"),
        (["--held-out-text", "/nowhere"], "/nowhere does not exist"),
        (["--layer", "9"], "layer: found 9, expected -4 to 3"),
        (["--text-field", "body", "--most-bad", "2"], "more than 2 rows are wrong, the last is"),
        (["--alpha", "2"], "alpha: found 2.0"),
        (["--model", "builtin:none"], "none"),
        (["--hidden", "0"], "hidden: found 0, expected 1 or more"),
    ],
)
def test_what_is_wrong_is_said(
    more: list[str], message: str, model_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    ran = CliRunner().invoke(
        app, ["build", str(corpus_file), str(tmp_path / "out"), "--model", str(model_folder), *OPTIONS, *more]
    )
    assert ran.exit_code == 2
    assert "error: " in ran.stderr
    assert message in ran.stderr


def test_names_with_brackets_are_said_as_they_are(model_folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "[bold][/red]"
    ran = CliRunner().invoke(app, ["build", str(corpus), str(tmp_path / "out"), "--model", str(model_folder)])
    assert ran.exit_code == 2
    assert f"error: {corpus} does not exist" in ran.stderr


def test_five_bad_rows_are_shown_and_all_counted(model_folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = ["5", *(json.dumps({"text": text}) for text in sentences(30)), *["oops"] * 7]
    corpus.write_text("\n".join(rows))
    ran = CliRunner().invoke(
        app, ["datastore", str(corpus), str(tmp_path / "out"), "--model", str(model_folder), *OPTIONS]
    )
    assert ran.exit_code == 0, ran.output
    assert ran.stderr.count("left out: ") == 5
    assert "8 rows of the corpus were left out" in ran.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(12, seed=3)))
    return path


def plain_nats(model_folder: Path, text: Path, context: int, windows: int | None = None) -> tuple[float, int]:
    """Of transformers' own loss over windows that share their first token with the last's end."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    pieces: list[list[int]] = []
    for line in text.read_text().splitlines():
        ids = word_tokenizer()(json.loads(line)["text"])["input_ids"]
        pieces += [ids[begin : begin + context + 1] for begin in range(0, len(ids) - 1, context)]
    total, count = 0.0, 0
    for ids in pieces[:windows]:
        row = torch.tensor([ids])
        with torch.no_grad():
            total += float(model(row, labels=row).loss) * (len(ids) - 1)
        count += len(ids) - 1
    return total / count, count


@pytest.mark.parametrize(("context", "windows"), [(1024, None), (16, None), (7, 5)])
def test_plain_perplexity_is_that_of_transformers(
    context: int, windows: int | None, out: Path, text: Path, model_folder: Path
) -> None:
    more = [] if windows is None else ["--windows", str(windows)]
    ran = CliRunner().invoke(
        app,
        ["eval", str(out), str(text), "--model", str(model_folder), "--context", str(context),
         "--device", "cpu", "--knn", "--json", *more],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    nats, count = plain_nats(model_folder, text, context, windows)
    assert found["tokens"] == count
    plain, memory, knn = found["rows"]
    assert [plain["name"], memory["name"], knn["name"]] == ["plain", "memory", "kNN-LM"]
    assert plain["nats"] == pytest.approx(nats, abs=1e-5)
    assert plain["perplexity"] == pytest.approx(2.718281828**nats, rel=1e-4)
    assert plain["weight"] is None
    assert memory["weight"] == load_settings(out / "memory").weight
    for row in (memory, knn):
        assert row["gain"] == pytest.approx(plain["nats"] - row["nats"], abs=1e-9)
    if windows is None:  # the text is of the corpus's kind
        assert memory["gain"] > 0
        assert knn["gain"] > 0


def test_eval_prints_a_table_too(out: Path, text: Path, model_folder: Path) -> None:
    ran = CliRunner().invoke(
        app, ["eval", str(out / "memory"), str(text), "--model", str(model_folder), "--device", "cpu"]
    )
    assert ran.exit_code == 0, ran.output
    nats, _ = plain_nats(model_folder, text, 1024)
    assert "perplexity" in ran.stdout
    assert f"{nats:.4f}" in ran.stdout
    assert "memory" in ran.stdout


def test_eval_refuses_another_model_and_knn_without_a_build(
    out: Path, text: Path, model_folder: Path, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "model", seed=8)
    ran = CliRunner().invoke(app, ["eval", str(out), str(text), "--model", str(other), "--device", "cpu"])
    assert ran.exit_code == 2
    assert "was built for another model: found hash" in ran.stderr
    given = ["eval", str(out / "memory"), str(text), "--model", str(model_folder), "--device", "cpu"]
    ran = CliRunner().invoke(app, [*given, "--knn"])
    assert ran.exit_code == 2
    assert "found no whole tokens, datastore, index, teacher" in ran.stderr
