"""Where drafts bring less than looking for them takes, nobody looks: a pause, and a look now and then."""

from __future__ import annotations

LEAST_REQUESTS = 4  # below, one request's text decides, and may begin to repeat itself at any step
AWAKE = 8  # steps that are judged together
SHORTEST, LONGEST = 8, 64  # steps of a pause, doubled while looking does not pay
TOLERATED = 0.015  # share of all steps' time that may go into looking for nothing, as far as that is measured
FEWER = 0.75  # a batch that has shrunk to this share ends a pause: drafts pay sooner


class Rest:
    """Says at each step whether speculation pauses."""

    def __init__(self) -> None:
        self._looked = 0  # steps since the last judgement, and what they were worth
        self._worth = 0.0
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

    def looked(self, requests: int, worth: float) -> None:
        """A step that did not pause looked for drafts.

        Args:
            worth: the share of a step's tokens a second that it gained or lost by that.
        """
        if requests < LEAST_REQUESTS:
            self._looked, self._worth = 0, 0.0
            return
        self._looked += 1
        self._worth += worth
        if self._looked < AWAKE:
            return
        if self._worth > 0:
            self._length = SHORTEST
        else:
            lost = int(-self._worth / TOLERATED)  # steps over which what was lost is what may be
            self._left, self._requests = min(max(self._length, lost), LONGEST), requests
            self._length = min(2 * self._left, LONGEST)
        self._looked, self._worth = 0, 0.0
