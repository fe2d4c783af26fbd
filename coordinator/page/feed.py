"""One look at a run's files for everybody who watches it, and what each of them has not got yet.

Nothing is queued for a browser: one that is slow gets the newest of each part when it can take it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from coordinator.page.pieces import Watched, changes
from edge_sdk.errors import EdgeError, one_line

log = logging.getLogger(__name__)

# Seconds between two looks at the files while somebody watches.
LOOK_S = 1.0
# Seconds after which a browser hears from us although there is nothing new.
BEAT_S = 10.0


class RunFeed:
    """What is known of one run; it is looked at only while somebody watches.

    Args:
        state: What is known, and looks again.
        look_s: Seconds between two looks.
    """

    def __init__(self, state: Watched, look_s: float = LOOK_S) -> None:
        self._state, self._look_s = state, look_s
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False
        self._trouble = ""
        self.num_viewers = 0

    async def look(self) -> None:
        """Look at the files once, in a thread of its own."""
        async with self._lock:
            try:
                has_news = await asyncio.to_thread(self._state.refresh)
            except (EdgeError, OSError, KeyError, TypeError, ValueError) as error:
                # A folder that was removed, or lines of a version that we do not know.
                if (reason := one_line(error)) != self._trouble:
                    log.warning("page.unreadable reason=%s", reason)
                    self._trouble = reason
                return
        if has_news:
            self._news.set()
            self._news = asyncio.Event()

    def close(self) -> None:
        """Let everybody go who watches."""
        self._is_closed = True
        self._news.set()

    def whole(self) -> str:
        """Return everything that is known, as `changes` does."""
        return changes(self._state.parts, {}) or '{"gone": [], "set": {}}'

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            await self.look()

    async def messages(self) -> AsyncGenerator[str, None]:
        """Yield what is new, whenever the one who asks can take it; empty where nothing is.

        The last one, once everybody is to go, is how the run stands then.
        """
        self.num_viewers += 1
        sent: dict[str, int] = {}
        try:
            await self.look()
            if self._looking is None:
                self._looking = asyncio.create_task(self._keep_looking())
            while not self._is_closed:
                news, parts = self._news, self._state.parts
                text = changes(parts, sent)
                if text is not None:
                    sent = {name: part.version for name, part in parts.items()}
                yield text or ""
                try:
                    await asyncio.wait_for(news.wait(), BEAT_S)
                except asyncio.TimeoutError:  # noqa: UP041 - another class before Python 3.11
                    continue
            await self.look()
            yield changes(self._state.parts, sent) or ""
        finally:
            self.num_viewers -= 1
            if not self.num_viewers and self._looking is not None:
                self._looking.cancel()
                self._looking = None
