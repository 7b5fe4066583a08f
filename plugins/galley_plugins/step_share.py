"""How many tokens of a step may embeddings take beside chats? So many that steps stay short, as measured."""

from __future__ import annotations

from collections import deque
from statistics import median

SLOWDOWN = 1.75  # a step beside embeddings takes at most so many times as long as one of the chats alone
LEAST = 4  # tokens; embeddings never stop
PROBE_EVERY = 16  # one step of so many has no embedding: what chats alone take
_ALONE_KEPT, _BESIDE_KEPT = 5, 24  # medians over so many steps, which follow the load within seconds


class StepShare:
    """The tokens for which a step takes `slowdown` times what chats alone take, from measured times.

    Steps come as `begin`, `tokens` where embeddings are there, `end`. A step lasts until the next begins.

    Args:
        most: tokens, the largest share.
        slowdown: as `SLOWDOWN`.
        lag: steps that are begun before one ends; 1 where they are scheduled asynchronously.
    """

    def __init__(self, most: int, *, slowdown: float = SLOWDOWN, lag: int = 0) -> None:
        self._most = max(most, LEAST)
        self._slowdown = slowdown
        self._lag = lag
        self._steps: deque[int | None] = deque()  # tokens of embeddings; None is a step that says nothing
        self._began: float | None = None
        self._since_probe = 0
        self._alone: deque[float] = deque(maxlen=_ALONE_KEPT)  # seconds
        self._beside: deque[float] = deque(maxlen=_BESIDE_KEPT)  # seconds of one token more
        self._share = max(self._most // 4, LEAST)

    def begin(self, now: float) -> None:
        """A step begins `now` (seconds of any clock), and so an earlier one has ended."""
        if self._began is not None and len(self._steps) > self._lag:
            tokens = self._steps.popleft()
            if tokens is not None:
                self._record(now - self._began, tokens)
        self._began = now

    def tokens(self) -> int:
        """The next step's share, 0 where it shows what the chats alone take."""
        self._since_probe += 1
        if self._since_probe >= PROBE_EVERY:
            self._since_probe = 0
            return 0
        return self._share

    def end(self, tokens: int | None) -> None:
        """The step's tokens of embeddings; None where its time says nothing: a chat's prompt was read."""
        self._steps.append(tokens)

    def pause(self) -> None:
        """No chat runs: what comes next is no step's time."""
        self._steps.clear()
        self._began = None

    def _record(self, seconds: float, tokens: int) -> None:
        if tokens == 0:
            self._alone.append(seconds)
        elif self._alone:
            self._beside.append((seconds - median(self._alone)) / tokens)
            cost = median(self._beside)
            room = (self._slowdown - 1) * median(self._alone)
            fits = self._most if cost * self._most <= room else int(room / cost)
            self._share = min(max(fits, LEAST), 2 * self._share, self._most)
