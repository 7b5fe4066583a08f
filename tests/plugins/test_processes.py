"""Real processes: a parent that is killed, and a grandchild that must not outlive it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal is Linux's")

SECONDS = 30

# Starts the grandchild, whose program and the pipe it answers on are arguments, and waits to be killed.
PARENT = """
import subprocess, sys
grandchild = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], pass_fds=[int(sys.argv[2])])
grandchild.wait()
"""

BOUND = """
import os, signal, sys
from galley_plugins.processes import die_with
pipe = int(sys.argv[1])
{before}
die_with(os.getppid(){signal})
{after}
os.write(pipe, b"%d\\n" % os.getpid())
signal.pause()
"""

HANDLER = """
def leave(number, frame):
    os.write(pipe, b"asked to end")
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
"""

BECOME_ANOTHER_PROGRAM = """
program = "import os, signal, sys; os.write(int(sys.argv[1]), b'%d\\\\n' % os.getpid()); signal.pause()"
os.set_inheritable(pipe, True)
os.execv(sys.executable, [sys.executable, "-c", program, str(pipe)])
"""


class Family:
    """A parent and a grandchild; the pipe ends when no process of them is left."""

    def __init__(self, program: str) -> None:
        self._pipe, inner = os.pipe()
        self.parent = subprocess.Popen([sys.executable, "-c", PARENT, program, str(inner)], pass_fds=[inner])
        os.close(inner)
        self.grandchild = int(self.read())

    def read(self) -> bytes:
        """What the grandchild says next; empty at the end of all of them."""
        ready, _, _ = select.select([self._pipe], [], [], SECONDS)
        assert ready, "the grandchild neither spoke nor ended"
        return os.read(self._pipe, 100)

    def clean(self) -> None:
        self.parent.kill()
        self.parent.wait(SECONDS)
        if hasattr(self, "grandchild"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.grandchild, signal.SIGKILL)
        os.close(self._pipe)


@pytest.fixture
def family() -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def start(*, before: str = "", with_signal: str = "", after: str = "") -> Family:
        families.append(Family(BOUND.format(before=before, signal=with_signal, after=after)))
        return families[-1]

    yield start
    for each in families:
        each.clean()


def test_a_process_dies_when_its_parent_is_killed(family: Callable[..., Family]) -> None:
    relatives = family()
    relatives.parent.kill()
    assert relatives.read() == b""


def test_a_process_that_asked_for_a_milder_signal_can_end_in_its_own_way(
    family: Callable[..., Family],
) -> None:
    relatives = family(before=HANDLER, with_signal=", signal.SIGTERM")
    relatives.parent.kill()
    assert relatives.read() == b"asked to end"
    assert relatives.read() == b""


def test_the_bond_holds_when_the_process_becomes_another_program(family: Callable[..., Family]) -> None:
    relatives = family(with_signal=", signal.SIGTERM", after=BECOME_ANOTHER_PROGRAM)
    relatives.parent.kill()
    assert relatives.read() == b""


def test_a_process_whose_parent_is_gone_already_exits_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(SECONDS)
    program = f"from galley_plugins.processes import die_with; die_with({gone.pid}); print('still here')"
    late = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (late.returncode, late.stdout, late.stderr) == (1, "", "")


def test_where_the_kernel_has_no_such_signal_nothing_happens() -> None:
    program = "import sys; sys.platform = 'darwin'; from galley_plugins.processes import die_with; die_with(1); print('here')"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert run.stdout == "here\n"
