"""`galley embed eval` against a running server, and `galley embed tune-tp`, on data small enough to check."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy.stats import spearmanr

from loadtest import reference
from loadtest.servers import MODEL, NAME, Server

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

PAIRS = [
    ("A man is playing a guitar.", "Someone plays the guitar.", 4.6),
    ("Two dogs run on the beach.", "Two dogs are running by the sea.", 4.2),
    ("A woman is slicing an onion.", "A woman cuts a vegetable.", 3.6),
    ("The cat sleeps on the sofa.", "A cat lies on a chair.", 3.0),
    ("A boy is reading a book.", "A boy is writing a letter.", 1.8),
    ("The market fell on Monday.", "The market rose on Friday.", 2.1),
    ("A plane is taking off.", "A man is cooking rice.", 0.0),
    ("The bridge was built in 1904.", "Rain is expected tomorrow.", 0.2),
]
CLASSES = {
    "card": [
        "Where is my card?",
        "My card has not come.",
        "I wait for my card.",
        "When does the card arrive?",
    ],
    "rate": ["What is the exchange rate?", "The rate is wrong.", "Which rate applies?", "Is the rate fixed?"],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name in ("sts", "retrieval", "cls"):
        (folder / name).mkdir(parents=True)
    rows = [f"{first},{second},{score}\n" for first, second, score in PAIRS]
    (folder / "sts" / "stsb_en_test.csv").write_text("".join(rows))
    documents = [pair[1] for pair in PAIRS]
    (folder / "retrieval" / "cran.all.1400.xml").write_text(
        "".join(f"<doc><docno>{n}</docno><text>{text}</text></doc>\n" for n, text in enumerate(documents))
    )
    (folder / "retrieval" / "cran.qry.xml").write_text(
        "".join(f"<top><num>{n}</num><title>{pair[0]}</title></top>" for n, pair in enumerate(PAIRS))
    )
    (folder / "retrieval" / "cranqrel.trec.txt").write_text(
        "".join(f"{n + 1} 0 {n} 1\n" for n in range(len(PAIRS)))
    )
    labelled = [(text, label) for label, texts in CLASSES.items() for text in texts]
    for name in ("train", "test"):
        lines = [f"{text},{label}\n" for text, label in labelled]
        (folder / "cls" / f"{name}.csv").write_text("text,category\n" + "".join(lines))
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "galley", "embed", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


def correlation(cosines: list[float]) -> float:
    return float(spearmanr(cosines, [score for _, _, score in PAIRS]).statistic) * 100


def test_a_running_server_is_measured(galley: Server, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    ran = run("eval", "--model", NAME, "--url", galley.url, "--data", str(data), "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    figures = {figure["task"]: figure for figure in json.loads(out.read_text())["figures"]}
    cosines = [float(reference.embed(first) @ reference.embed(second)) for first, second, _ in PAIRS]
    assert figures["sts"]["value"] == pytest.approx(
        correlation(cosines), abs=3
    )  # bfloat16 may swap two pairs
    assert figures["sts"]["texts"] == 2 * len(PAIRS)
    vectors = torch.stack([reference.embed(second) for _, second, _ in PAIRS])
    places = [
        int((vectors @ reference.embed(first)).argsort(descending=True).tolist().index(row))
        for row, (first, _, _) in enumerate(PAIRS)
    ]
    best = sum(1 / torch.log2(torch.tensor(place + 2.0)).item() for place in places) / len(PAIRS)
    assert figures["cranfield"]["value"] == pytest.approx(100 * best, abs=5)
    assert figures["banking77"]["value"] == 100  # the probe has seen them
    for task in figures:
        assert task in ran.stdout


def test_what_is_missing_is_said(galley: Server, data: Path) -> None:
    missing = run("eval", "--model", NAME, "--url", galley.url, "--data", str(data / "none"))
    assert missing.returncode == 2
    assert "expected a folder with sts/stsb_en_test.csv" in missing.stderr
    unknown = run("eval", "--model", "banana", "--url", galley.url, "--data", str(data))
    assert unknown.returncode == 2
    assert "banana" in unknown.stderr
    (data / "sts" / "stsb_en_test.csv").unlink()
    missing = run("eval", "--model", NAME, "--url", galley.url, "--data", str(data), "--tasks", "sts")
    assert missing.returncode == 2
    assert "stsb_en_test.csv: cannot be read" in missing.stderr


def test_layers_are_picked_on_labelled_pairs(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "trials.json"
    pairs = data / "sts" / "stsb_en_test.csv"
    with pairs.open("a") as file:
        file.write("It rained.,It was wet.,3.3\nHe left.,She came.,0.9\n")
    ran = run("tune-tp", str(pairs), "--model", MODEL, "--pairs", "10", "--longest", "2", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    trials: dict[tuple[int, int], dict[str, Any]] = {
        (trial["exit_layer"], trial["output_layer"]): trial for trial in json.loads(out.read_text())["trials"]
    }
    assert {exit_layer for exit_layer, _ in trials} == {0, 2, 3}
    scores = [*(score for _, _, score in PAIRS), 3.3, 0.9]
    sentences = [(first, second) for first, second, _ in PAIRS]
    sentences += [("It rained.", "It was wet."), ("He left.", "She came.")]
    for exit_layer, layer in [(3, 30), (2, 20)]:
        cosines = [
            float(
                reference.token_prepending(first, 1, exit_layer, layer)
                @ reference.token_prepending(second, 1, exit_layer, layer)
            )
            for first, second in sentences
        ]
        expected = float(spearmanr(cosines, scores).statistic) * 100
        assert trials[exit_layer, layer]["spearman"] == pytest.approx(expected, abs=0.01)
    best = max(
        (trial for trial in trials.values() if trial["exit_layer"]), key=lambda trial: trial["spearman"]
    )
    assert f"exit_layer: {best['exit_layer']}, output_layer: {best['output_layer']}" in ran.stdout
