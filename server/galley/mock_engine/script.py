"""What a request is to meet: delays, faults, gates. From the engine's default, a header, or the request
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

HEADER = b"x-mock"
MEMBER = "mock"


class Fault(StrEnum):
    """Ways in which an answer goes wrong; `after` is the script's `fault_after`, in tokens."""

    HANG = "hang"  # the request is taken and never answered
    ERROR = "error"  # status 500 in place of the answer
    CLOSE = "close"  # the connection ends before any byte of an answer
    RESET = "reset"  # the same, by a reset
    GARBAGE = "garbage"  # bytes that are not HTTP
    RESET_AFTER_HEADERS = "reset-after-headers"  # before the first byte of the body
    RESET_MID_STREAM = "reset-mid-stream"  # behind a whole event
    HALF_EVENT = "half-event"  # within an event
    RESET_MID_BODY = "reset-mid-body"  # within a unary body
    DRIP = "drip"  # byte by byte
    SPLIT_CHARACTER = "split-character"  # cut within the first character of several bytes


class ScriptError(ValueError):
    """A script that cannot be followed; says what was found and what was expected."""


@dataclass(frozen=True)
class Script:
    """One request's fate.

    Attributes:
        delay: seconds before the headers.
        token_delay: seconds before each token.
        tokens: length of generated text; None for what the request asks for.
        fault: what goes wrong; None for nothing.
        fault_after: whole tokens before a fault in the middle.
        headers: further headers of the answer, as pairs.
        pad: bytes by which a unary body is made longer.
        gates: name of the gate to wait at, by point: `headers`, `body` (unary, between its halves),
            `token-1` ... (before that token), `end` (before the last byte).
    """

    delay: float = 0.0
    token_delay: float = 0.0
    tokens: int | None = None
    fault: Fault | None = None
    fault_after: int = 1
    headers: tuple[tuple[str, str], ...] = ()
    pad: int = 0
    gates: dict[str, str] = field(default_factory=dict)

    def with_changes(self, changes: Any) -> Script:
        """The script with some of its members replaced by parsed JSON.

        Raises:
            ScriptError: an unknown member or a wrong value.
        """
        if not isinstance(changes, dict):
            raise ScriptError(f"script: found {type(changes).__name__}, expected an object")
        known = {each.name for each in fields(Script)}
        for name, value in changes.items():
            if name not in known:
                raise ScriptError(f"script.{name}: unknown, expected one of {', '.join(sorted(known))}")
            _check(name, value)
        if changes.get("fault") is not None:
            changes = {**changes, "fault": Fault(changes["fault"])}
        return replace(self, **changes)


def _check(name: str, value: Any) -> None:
    if name == "fault":
        if value is not None and value not in set(Fault):
            raise ScriptError(f"script.fault: found {value!r}, expected one of {', '.join(Fault)}")
    elif name == "gates":
        if not isinstance(value, dict) or not all(isinstance(gate, str) for gate in value.values()):
            raise ScriptError("script.gates: expected an object of point and gate name")
    elif name == "headers":
        if not isinstance(value, list) or not all(_is_pair(pair) for pair in value):
            raise ScriptError("script.headers: expected an array of [name, value]")
    elif not (value is None and name == "tokens") and (not isinstance(value, (int, float)) or value < 0):
        raise ScriptError(f"script.{name}: found {value!r}, expected a number from 0 on")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
