"""A worker process without vLLM: `python -m tests.support.scripted_worker HOST PORT BEHAVIOUR...`.

It writes the status lines that a real worker writes, and serves a mock engine. Behaviours are taken in turn, one
for each start, counted in the file `$SCRIPTED_STARTS`:

    serve     become ready and run until asked to stop
    die       exit with status 1 before being ready
    unusable  report why it can never serve and exit with status 2
    hang      never become ready
    stubborn  serve and ignore SIGTERM, with a child that does so too
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from galley.mock_engine import MockEngine, listen


def report(stage: str, **detail: object) -> None:
    with Path(os.environ["GALLEY_STATUS_FILE"]).open("a", encoding="utf-8") as status:
        status.write(json.dumps({"stage": stage, "pid": os.getpid(), **detail}) + "\n")


def next_behaviour(behaviours: list[str]) -> str:
    starts = Path(os.environ["SCRIPTED_STARTS"])
    count = len(starts.read_text().split()) if starts.exists() else 0
    with starts.open("a") as counted:
        counted.write(f"{os.getpid()}\n")
    return behaviours[min(count, len(behaviours) - 1)]


async def serve(host: str, port: int) -> None:
    async with listen(MockEngine(), host, port):
        report("ready")
        stop = asyncio.Event()
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()


def main() -> None:
    host, port, *behaviours = sys.argv[1:]
    behaviour = next_behaviour(behaviours)
    report("starting engine", device="none")
    print("a line of the worker's own log", flush=True)
    if behaviour == "die":
        sys.exit(1)
    if behaviour == "unusable":
        report("failed", reason="no such model")
        sys.exit(2)
    if behaviour == "hang":
        time.sleep(600)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        report("child", child=child.pid)
    asyncio.run(serve(host, int(port)))


if __name__ == "__main__":
    main()
