"""Gates: named points at which requests wait until someone lets them go on."""

from __future__ import annotations

from galley.workers import Signal


class Gates:
    """A gate is held from the moment a request or a test first names it, until it is released."""

    def __init__(self) -> None:
        self._released: dict[str, bool] = {}
        self._waiting: dict[str, int] = {}
        self._changed = Signal()

    def hold(self, name: str) -> None:
        self._released[name] = False
        self._changed.notify()

    def release(self, name: str) -> None:
        """Let through all that wait and all that come, until the gate is held again."""
        self._released[name] = True
        self._changed.notify()

    def release_all(self) -> None:
        for name in (*self._released, *self._waiting):
            self.release(name)

    def waiting(self, name: str) -> int:
        """How many requests wait at a gate."""
        return self._waiting.get(name, 0)

    async def pass_through(self, name: str) -> None:
        """Wait until the gate is open."""
        self._waiting[name] = self.waiting(name) + 1
        self._changed.notify()
        try:
            while not self._released.get(name, False):
                await self._changed.wait()
        finally:
            self._waiting[name] -= 1

    async def reached(self, name: str, requests: int = 1) -> None:
        """Wait until that many requests wait at the gate."""
        while self.waiting(name) < requests:
            await self._changed.wait()
