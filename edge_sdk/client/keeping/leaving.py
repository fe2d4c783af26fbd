"""How a device leaves on purpose: from a round only once it has saved itself where all can go on.

What it saves, says `own_state.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from edge_sdk.client.incoming import Stopped
from edge_sdk.deadline import Deadline

# Seconds that the coordinator gets to let a device save itself. With the last words less than the
# 10 s after which a service is killed.
LEAVE_S = 7.0


class Leaving:
    """The way from a wish to stop to a device that may go."""

    def __init__(self, stop: threading.Event) -> None:
        """Leave once *stop* is set."""
        self._stop = stop
        self._until: Deadline | None = None
        self._ask: Callable[[], None] | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the device is to leave."""
        return self._stop.is_set()

    def enter_round(self, ask: Callable[[], None] | None) -> None:
        """Note that a round has begun.

        Args:
            ask: Asks the coordinator for a Pause; None where it knows of no such wish.
        """
        self._ask = ask

    def leave_round(self) -> None:
        """Note that the device may go at any moment: it is in no round, or has saved itself."""
        self._ask = None

    def look(self) -> None:
        """Look whether the device is to go; called whenever it waits.

        Raises:
            Stopped: it goes now.
        """
        if not self._stop.is_set():
            return
        if self._ask is None:
            raise Stopped
        if self._until is None:
            self._until = Deadline.after(LEAVE_S)
            self._ask()
        if not self._until.left_s():
            raise Stopped
