"""The examples of `galley_plugins/embedding/examples`, as users run them, against `galley serve`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loadtest import reference
from loadtest.servers import free_port

if TYPE_CHECKING:
    from loadtest.servers import Server

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "plugins" / "galley_plugins" / "embedding" / "examples"
QUESTION = "Who repaired the clock of the railway station?"
ANSWER = "In March the watchmaker Ida Brandt repaired the clock of the railway station."
HEIGHT = "The lighthouse at Norr Point was built of granite in 1871. It is 34 metres high."
NOTES = {
    "garden.md": "Tomatoes are watered every second evening.\n\nThe hedge is cut in February.\n",
    "house/heating.txt": "The boiler is serviced by Holm & Sons every October.\n\n\n\nThe key is with Maria.",
}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def ranked(question: str, texts: list[str]) -> list[tuple[float, str]]:
    """The texts by their cosine with the question, the nearest first."""
    asked = reference.embed(question)
    return sorted(((float(reference.embed(text) @ asked), text) for text in texts), reverse=True)


@pytest.mark.parametrize("script", ["langchain_embeddings.py", "llamaindex_embeddings.py"])
def test_a_librarys_store_finds_the_text_that_answers(galley: Server, script: str) -> None:
    ran = run(script, QUESTION, "--base-url", f"{galley.url}/v1")
    assert ran.returncode == 0, ran.stderr
    lines = [line.split("  ", 1) for line in ran.stdout.splitlines()]
    assert len(lines) == 2
    assert lines[0][1] == ANSWER
    for score, text in lines:
        assert float(score) == pytest.approx(ranked(QUESTION, [text])[0][0], abs=0.002)


def test_rag_retrieves_the_paragraph_and_answers_from_it(galley: Server) -> None:
    question = "How high is the lighthouse?"
    ran = run("rag.py", question, "--base-url", f"{galley.url}/v1")
    assert ran.returncode == 0, ran.stderr
    found, answer = ran.stdout.split("\n\n", 1)
    score, name, text = found.splitlines()[0].split("  ")
    assert (name, text) == ("lighthouse", HEIGHT)
    assert float(score) == pytest.approx(ranked(question, [HEIGHT])[0][0], abs=0.002)
    assert len(found.splitlines()) == 2
    assert "34 met" in answer


def test_rag_indexes_a_folder_once_and_asks_it_again(galley: Server, tmp_path: Path) -> None:
    folder, store = tmp_path / "notes", tmp_path / "store"
    paragraphs = {}
    for name, content in NOTES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        parts = [part.strip() for part in content.split("\n\n") if part.strip()]
        paragraphs |= {part: f"{name}:{number}" for number, part in enumerate(parts, 1)}
    question = "When is the hedge cut?"
    options = ("--store", str(store), "--top", "3", "--base-url", f"{galley.url}/v1")
    first = run("rag.py", question, "--folder", str(folder), *options)
    assert first.returncode == 0, first.stderr
    lines = [line.split("  ") for line in first.stdout.split("\n\n")[0].splitlines()]
    expected = [(paragraphs[text], text) for _, text in ranked(question, list(paragraphs))[:3]]
    assert [(name, text) for _, name, text in lines] == expected
    assert expected[0][0] == "garden.md:2"
    for name in NOTES:
        (folder / name).unlink()
    assert run("rag.py", question, *options).stdout == first.stdout
    empty = run("rag.py", question, "--folder", str(folder), *options)
    assert empty.returncode == 1
    assert f"found no text in {folder}, expected .txt or .md files" in empty.stderr


@pytest.mark.parametrize("script", ["langchain_embeddings.py", "llamaindex_embeddings.py", "rag.py"])
def test_an_example_says_what_is_wrong(galley: Server, script: str) -> None:
    unknown = run(script, QUESTION, "--base-url", f"{galley.url}/v1", "--model", "banana")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith(f"error: {galley.url}/v1: ")
    assert "banana" in unknown.stderr
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    unreachable = run(script, QUESTION, "--base-url", nobody)
    assert unreachable.returncode == 1
    assert unreachable.stderr.splitlines()[-1].startswith(f"error: {nobody}")
    assert run(script, "--help").returncode == 0
