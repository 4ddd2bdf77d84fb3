"""A clock that never goes back: the wall clock, and the monotonic one for as long as the wall clock lags behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class SteadyClock:
    """Microseconds since 1970, UTC. Where the machine's clock is set back (by hand, by NTP, by a virtual machine that was paused), time
    goes on by the monotonic clock from where it was, until the wall clock is ahead again; where it is set forward, it follows. So of
    two readings the later one is never smaller, and no duration between them is negative. Safe to share between threads.
    """

    def __init__(self, wall: Callable[[], int] = time.time_ns, ticks: Callable[[], int] = time.monotonic_ns) -> None:
        self._wall, self._ticks = wall, ticks
        self._lock = threading.Lock()
        self._now, self._at = wall(), ticks()

    def now(self) -> int:
        """The time in microseconds."""
        with self._lock:
            at = self._ticks()
            self._now = max(self._wall(), self._now + at - self._at)
            self._at = at
            return self._now // 1000
