"""When nothing is worth drafting, looking for drafts is not either: a pause, and a look now and then."""

from __future__ import annotations

LEAST_REQUESTS = 4  # below, one request's text decides, and may begin to repeat itself at any step
AWAKE = 8  # steps in a row without a draft before a pause
SHORTEST, LONGEST = 8, 64  # steps of a pause, doubled while nothing is found
FEWER = 0.75  # a batch that has shrunk to this share ends a pause: drafts pay sooner


class Rest:
    """Says at each step whether speculation pauses."""

    def __init__(self) -> None:
        self._idle = 0
        self._left = 0
        self._length = SHORTEST
        self._requests = 0  # when the pause began

    def pausing(self, requests: int) -> bool:
        """Whether the step of so many requests runs as without speculation; counts it."""
        if self._left > 0 and requests <= FEWER * self._requests:
            self._left, self._length = 0, SHORTEST
        if self._left == 0:
            return False
        self._left -= 1
        return True

    def drafted(self, requests: int, tokens: int) -> None:
        """A step that did not pause drafted so many tokens."""
        if tokens > 0:
            self._idle, self._length = 0, SHORTEST
        elif requests >= LEAST_REQUESTS:
            self._idle += 1
        else:
            self._idle = 0
        if self._idle >= AWAKE:
            self._idle, self._left, self._requests = 0, self._length, requests
            self._length = min(2 * self._length, LONGEST)
