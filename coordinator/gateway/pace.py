"""How far apart the turns of the I/O thread are, so that each has several frames to read.

A turn costs about what three frames do: the thread is woken, and the interpreter handed from thread
to thread. Where a hundred devices answer one by one, that is half of what they cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

# One device is answered at once; many wait this long at most, of a step that takes far longer.
EACH_S, MOST_S = 1e-4, 5e-3


@dataclass(slots=True)
class Pace:
    """Keeps turns apart, the further the more sessions there are."""

    _last_s: float = 0.0

    def wait(self, num_sessions: int) -> None:
        """Sleep until the next turn may begin; not at all where the last one was long ago."""
        until_s = self._last_s + min(MOST_S, EACH_S * max(0, num_sessions - 1))
        self._last_s = time.monotonic()
        if until_s > self._last_s:
            time.sleep(until_s - self._last_s)
            self._last_s = until_s
