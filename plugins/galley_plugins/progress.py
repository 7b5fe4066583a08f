"""How a worker tells whoever started it what it is doing: JSON lines appended to `$GALLEY_STATUS_FILE`.

Every process of the engine inherits the variable. A line is one short `write` to a file opened for appending,
so lines of several processes do not mix. Without the variable nothing is written.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "GALLEY_STATUS_FILE"


def report(stage: str, **detail: Any) -> None:
    """Append one line; a missing or unwritable file never disturbs the engine."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    line = json.dumps({"stage": stage, "pid": os.getpid(), "time": round(time.time(), 3), **detail}) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:
        return
    try:
        os.write(descriptor, line.encode())
    except OSError:
        pass
    finally:
        os.close(descriptor)


def read() -> list[dict[str, Any]]:
    """Every complete line so far, oldest first."""
    path = os.environ.get(VARIABLE)
    if not path or not Path(path).exists():
        return []
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
