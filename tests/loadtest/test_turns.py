from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from loadtest import turns
from loadtest.specbench import Prompt

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_servers_that_started_end_when_another_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def serving(name: str) -> Iterator[str]:
        if name == "broken":
            raise AssertionError("not healthy")
        try:
            yield name
        finally:
            told.append((name, "ended"))

    def starters(*names: str) -> Any:
        return {name: serving(name) for name in names}

    monkeypatch.setattr(turns, "ask_all", lambda *_: None)
    monkeypatch.setattr(turns, "_signal", lambda server, number: told.append((server, number.name)))
    with turns.all_serving(starters("one", "two", "three")) as servers:
        assert servers == {"one": "one", "two": "two", "three": "three"}
        assert sorted(told) == [("one", "SIGSTOP"), ("three", "SIGSTOP"), ("two", "SIGSTOP")]
        told.clear()
    ends = [[(name, "SIGCONT"), (name, "ended")] for name in ("three", "two", "one")]
    assert told == [end for pair in ends for end in pair]
    told.clear()
    broken = turns.all_serving(starters("one", "broken"))
    with pytest.raises(AssertionError, match="not healthy"):
        broken.__enter__()
    assert told[-2:] == [("one", "SIGCONT"), ("one", "ended")]


def test_no_prompt_is_asked_twice_and_servers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, tuple[str, ...]]] = []

    def ask_all(server: Any, texts: list[str], clients: int, max_tokens: int) -> tuple[float, int, int]:
        asked.append((server, f"{clients}", tuple(texts)))
        return 1.0, max_tokens, 1

    monkeypatch.setattr(turns, "ask_all", ask_all)
    monkeypatch.setattr(turns, "_signal", lambda *_: None)
    prompts = [Prompt(number, "", str(number)) for number in range(20)]
    servers: Any = {"one": "one", "two": "two"}
    waves = list(turns.measure(servers, prompts, {"b1": 2, "c8": 3}, repeats=2, max_tokens=8))
    assert [(wave.server, wave.load, wave.repeat) for wave in waves] == [
        ("one", "b1", 0), ("two", "b1", 0), ("one", "c8", 0), ("two", "c8", 0),
        ("two", "b1", 1), ("one", "b1", 1), ("two", "c8", 1), ("one", "c8", 1),
    ]  # fmt: skip
    texts = [texts for server, _, texts in asked if server == "one"]
    assert texts == [texts for server, _, texts in asked if server == "two"]
    assert len({text for wave in texts for text in wave}) == 10
    assert [clients for _, clients, _ in asked] == ["1", "1", "8", "8"] * 2
