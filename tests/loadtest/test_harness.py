"""What records say of the run that made them."""

from __future__ import annotations

from pathlib import Path

from loadtest import harness


def test_a_command_names_what_lies_outside_without_its_place() -> None:
    inside = str(Path(harness.__file__))
    given = ["bench_x.py", "--data", "../elsewhere/data", "--out", "/somewhere/file.json", "--n", "3", inside]
    expected = "python bench_x.py --data data --out file.json --n 3 loadtest/harness.py"
    assert harness.command(given) == expected
