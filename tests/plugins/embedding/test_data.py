from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from galley_plugins.embedding.evaluation.data import DataError, Pairs, cranfield, labelled, sts_pairs

if TYPE_CHECKING:
    from pathlib import Path


def test_pairs_with_quotes_and_commas(tmp_path: Path) -> None:
    path = tmp_path / "sts.csv"
    path.write_text('A man runs.,"A man, running.",4.5\n"He said ""no"".",No.,0\n', encoding="utf-8")
    pairs = sts_pairs(path)
    assert pairs.first == ["A man runs.", 'He said "no".']
    assert pairs.second == ["A man, running.", "No."]
    assert pairs.scores == [4.5, 0.0]
    assert len(pairs.spread(1)) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a,b,1\nc,d\n", r"sts.csv:2: found 2 columns, expected sentence, sentence, score"),
        ("a,b,1\nc,d,high\n", r"sts.csv:2: found a score of 'high', expected a number"),
        ("a,b,1\n", r"sts.csv: found 1 pairs, expected at least 2"),
        (None, r"sts.csv: cannot be read"),
    ],
)
def test_wrong_pairs_are_refused_by_line(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "sts.csv"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=problem):
        sts_pairs(path)


def test_labelled_texts(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('text,category\n"Where, exactly?",place\nWhen?,time\n', encoding="utf-8")
    found = labelled(path)
    assert (found.texts, found.labels) == (["Where, exactly?", "When?"], ["place", "time"])
    path.write_text("Where?,place\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"train.csv:1: found the columns Where\?, place, expected text, category"
    ):
        labelled(path)


def test_cranfield_numbers_queries_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "cran.all.1400.xml").write_text(
        "<doc>\n<docno> 1 </docno>\n<title>one</title>\n<text>lift of\na wing</text>\n</doc>\n"
        "<doc>\n<docno>2</docno>\n<text></text>\n</doc>\n"
    )
    (tmp_path / "cran.qry.xml").write_text(
        "<xml><top><num> 1</num><title>\nwings\n</title></top><top><num> 4</num><title>drag</title></top></xml>"
    )
    (tmp_path / "cranqrel.trec.txt").write_text("1 0 2 1\n2 0 1 0\n")
    found = cranfield(tmp_path)
    assert found.documents == {"1": "lift of a wing", "2": ""}
    assert found.queries == {"1": "wings", "2": "drag"}
    assert found.gains == {"1": {"2": 1.0}, "2": {"1": 0.0}}


def test_a_part_of_the_pairs_is_spread_over_the_file() -> None:
    """Six pairs of two genres in turn, of which the first half of the file would be one alone."""
    pairs = Pairs(list("aaabbb"), list("AAABBB"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert pairs.spread(3) == Pairs(["a", "a", "b"], ["A", "A", "B"], [0.0, 2.0, 4.0])
    assert pairs.spread(4).scores == [0.0, 1.0, 3.0, 4.0]
    assert pairs.spread(None) == pairs.spread(7) == pairs
