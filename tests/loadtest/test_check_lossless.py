"""What the check of losslessness keeps and compares; no server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from loadtest import check_lossless
from loadtest.check_lossless import REFERENCE, Answers
from loadtest.specbench import Prompt

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = {"max_tokens": 8}


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [5], 0), ([], [], None)],
)
def test_the_first_difference_counts_the_end(one: list[int], other: list[int], place: int | None) -> None:
    assert check_lossless.first_difference(one, other) == place


def test_cells_are_compared_with_the_reference_where_both_have_an_answer() -> None:
    found = {
        REFERENCE: {1: [5, 6], 2: [7]},
        ("hybrid", 1): {1: [5, 6], 2: [7, 8], 3: [9]},
        ("none", 1): {1: [5, 6]},
    }
    cells = check_lossless.compare(found)
    assert cells["hybrid b1"] == {"compared": 2, "identical": 1, "tokens": 4, "first_difference": {"2": 1}}
    assert cells["none b1"] == {"compared": 1, "identical": 1, "tokens": 2, "first_difference": {}}
    assert len(cells) == 2


def test_answers_of_a_stopped_run_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = Answers(path, SETTINGS)
    answers.add(("hybrid", 8), 81, [1, 2, 3])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"method": "hybrid", "batch": 8, "quest')  # stopped while writing
    again = Answers(path, SETTINGS)
    assert again.found["hybrid", 8] == {81: [1, 2, 3]}


def test_answers_after_a_line_cut_short_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path, SETTINGS).add(("hybrid", 8), 81, [1])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"method": "hybr')
    Answers(path, SETTINGS).add(("hybrid", 8), 82, [2])
    assert Answers(path, SETTINGS).found["hybrid", 8] == {81: [1], 82: [2]}


def test_answers_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path, SETTINGS)
    with pytest.raises(ValueError, match="made with other settings"):
        Answers(path, {"max_tokens": 9})


def test_a_part_of_the_prompts_covers_all_tasks() -> None:
    prompts = {task: [Prompt(10 * place + i, task, "") for i in range(3)] for place, task in enumerate("abc")}
    assert [prompt.question for prompt in check_lossless.chosen(prompts, 2)] == [0, 10, 20, 1, 11, 21]


def test_cells_of_an_earlier_record_stay_until_as_much_is_compared_again(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert check_lossless.kept(record, SETTINGS, {}) == {}
    earlier = {
        "hybrid b8": {"compared": 480, "identical": 480},
        "trigram b8": {"compared": 9, "identical": 8},
    }
    sections = {"settings": SETTINGS, "cells": earlier, "commits": {"of_answers": ["abc"]}}
    record.write_text(json.dumps({"sections": sections}))
    now = {"hybrid b8": {"compared": 12}, "trigram b8": {"compared": 9}}
    assert check_lossless.kept(record, SETTINGS, now) == {
        "hybrid b8": {"compared": 480, "identical": 480, "commits": ["abc"]}
    }
    assert check_lossless.kept(record, {"max_tokens": 9}, now) == {}


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_lossless.read_options(["--methods", "hybrid,magic"])
    assert "found magic, expected some of trigram" in capsys.readouterr().err
