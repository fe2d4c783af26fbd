"""Whether somebody still answers on a connection that looks alive: pure, the clock is an argument.

A connection can stay open for ever although its bytes are lost: a NAT or a proxy that has forgotten
it may go on acknowledging them. So a question travels on it every few seconds, and whatever arrives
is an answer.
"""

from __future__ import annotations

# An answer may take so many times longer than the slowest before.
MARGIN = 3.0
# What a slow link may add to the patience ends at so many times the least.
MOST = 6.0


class Pulse:
    """Questions and answers of one lane, over all of its connections.

    Args:
        least_s: Seconds without an answer that are always borne. An answer takes milliseconds, but
            on 256 kbit/s it may have to wait for a chunk of 256 KiB, which takes 8 s.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = self._limit_s = least_s
        self._asked_s: float | None = None

    def ask(self, now_s: float) -> None:
        """Note that a question is on its way; the oldest without an answer counts."""
        if self._asked_s is None:
            self._asked_s = now_s

    def hear(self, now_s: float) -> None:
        """Note that something has arrived; a link on which that took long is given more time."""
        if self._asked_s is not None:
            self._bear(max(self._limit_s / 2, MARGIN * (now_s - self._asked_s)))
            self._asked_s = None

    def rest(self) -> None:
        """Forget the question and learn nothing from it.

        Its connection is gone, our own clock stood still, or it was the first one on a connection,
        which is answered quickly on a slow link as well.
        """
        self._asked_s = None

    def is_gone(self, now_s: float) -> bool:
        """Return whether nobody has answered for too long; the next connection gets more time."""
        if self._asked_s is None or now_s - self._asked_s < self._limit_s:
            return False
        self._bear(2 * self._limit_s)
        self._asked_s = None
        return True

    def _bear(self, seconds: float) -> None:
        self._limit_s = min(MOST * self._least_s, max(self._least_s, seconds))
