from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from galley_plugins import progress

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

# Waits until standard input closes, so that all writers begin together.
WRITER = """
import sys
from galley_plugins import progress

sys.stdin.read()
for number in range(int(sys.argv[2])):
    progress.report("line", writer=sys.argv[1], number=number, payload=sys.argv[1] * (1 + 97 * number % 3000))
"""


def test_a_report_is_one_json_line_with_stage_process_and_time(status_file: Path) -> None:
    before = time.time()
    progress.report("loading weights", percent=7)
    after = time.time()
    text = status_file.read_text()
    assert text.count("\n") == 1
    line = json.loads(text)
    assert before - 0.001 <= line.pop("time") <= after + 0.001
    assert line == {"stage": "loading weights", "pid": os.getpid(), "percent": 7}


def test_lines_are_read_back_in_order_whatever_characters_they_carry(status_file: Path) -> None:
    texts = ["plain", "two\nlines", "line\u2028separator", "Zürich \U0001f355", ""]
    for text in texts:
        progress.report("failed", reason=text)
    assert [line["reason"] for line in progress.read()] == texts


def test_lines_of_concurrent_processes_never_mix(status_file: Path) -> None:
    count = 200
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name, str(count)], stdin=subprocess.PIPE)
        for name in "abcd"
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0] * len(writers)
    lines = progress.read()
    assert len(lines) == count * len(writers)
    for writer, name in zip(writers, "abcd", strict=True):
        own = [line for line in lines if line["writer"] == name]
        assert [line["number"] for line in own] == list(range(count))
        assert {line["pid"] for line in own} == {writer.pid}
        assert {character for line in own for character in line["payload"]} == {name}


def test_a_line_that_is_still_being_written_is_left_for_later(status_file: Path) -> None:
    progress.report("first")
    with status_file.open("a") as file:
        file.write('{"stage": "sec')
    assert [line["stage"] for line in progress.read()] == ["first"]
    with status_file.open("a") as file:
        file.write('ond"}\n')
    assert [line["stage"] for line in progress.read()] == ["first", "second"]


def test_without_a_status_file_nothing_is_written_and_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv(progress.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(progress.VARIABLE, value)
        progress.report("loading weights")
        assert progress.read() == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_no_error_and_leaks_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ["/dev/full"] if os.path.exists("/dev/full") else []  # noqa: PTH110
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for path in (tmp_path, tmp_path / "missing" / "status", *full):
        monkeypatch.setenv(progress.VARIABLE, str(path))
        progress.report("loading weights")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_no_other_user_can_read_the_file(status_file: Path) -> None:
    progress.report("failed", reason="/home/someone/model does not exist")
    assert stat.S_IMODE(status_file.stat().st_mode) & 0o077 == 0
