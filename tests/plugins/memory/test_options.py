from __future__ import annotations

from typing import Any

import pytest

from galley_plugins.memory.options import MemoryOptions


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ()),
        ({"path": "/m"}, (MemoryOptions("/m"),)),
        ({"path": "/m", "weight": 0}, (MemoryOptions("/m", "memory", 0),)),
        (
            [{"path": "/m", "name": "wiki", "weight": 0.5}, {"path": "/n", "name": "code"}],
            (MemoryOptions("/m", "wiki", 0.5), MemoryOptions("/n", "code")),
        ),
    ],
)
def test_one_memory_or_a_list_of_them(values: Any, expected: tuple[MemoryOptions, ...]) -> None:
    assert MemoryOptions.from_values(values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("/m", "memory: found str, expected path, name, weight"),
        ([{"path": "/m"}, 3], "memory: found int, expected path, name, weight"),
        ({}, r"memory\.path: missing"),
        ({"path": ""}, r"memory\.path: found '', expected a folder"),
        ({"path": "/m", "wieght": 1}, "memory: unknown option wieght, expected path, name, weight"),
        ({"path": "/m", "name": "a.b"}, r"memory\.name: found 'a\.b', expected letters"),
        ({"path": "/m", "name": ""}, r"memory\.name: found '', expected letters"),
        ({"path": "/m", "weight": 1.5}, r"memory\.weight: found 1\.5, expected a number from 0 to 1"),
        ({"path": "/m", "weight": "half"}, r"memory\.weight: found 'half', expected a number from 0 to 1"),
        ({"path": "/m", "weight": True}, r"memory\.weight: found True, expected a number from 0 to 1"),
        (
            [{"path": "/m"}, {"path": "/n"}],
            r"memory\.name: found memory twice, expected another name for each",
        ),
    ],
)
def test_wrong_options_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryOptions.from_values(values)
