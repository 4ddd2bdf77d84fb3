"""A small response cache inside one replica: least recently used, short-lived, one computation per key at a time.

A key holds everything that an answer depends on: the bundle's digest, the request, and the user's history as it is now.
So an event needs no invalidation: it changes the history, and with it the key. Time is the one thing left out; the
lifetime bounds how stale recency may be.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from maple.hashing import stable_unit

V = TypeVar("V")
Outcome = Literal["hit", "shared", "miss"]


@dataclass(frozen=True)
class _Entry(Generic[V]):
    value: V
    expires: float


class ResponseCache(Generic[V]):
    """At most ``size`` answers, each for ``lifetime_s`` less up to ``jitter`` of it, by key. For one event loop. ``size`` 0 keeps nothing,
    but concurrent requests with one key still share one computation."""

    def __init__(self, size: int, lifetime_s: float, jitter: float = 0.2, clock: Callable[[], float] = time.monotonic) -> None:
        self.size, self.lifetime_s, self.jitter, self.clock = size, lifetime_s, jitter, clock
        self._kept: OrderedDict[str, _Entry[V]] = OrderedDict()
        self._running: dict[str, asyncio.Task[V]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, key: str, compute: Callable[[], Awaitable[V]], keep: Callable[[V], bool]) -> tuple[V, Outcome]:
        """The answer for a key: kept, being computed by somebody else, or computed now; kept afterwards if ``keep`` says so.

        The computation is a task of its own, so a client that goes away does not take the answer from others who wait for it;
        its failure is everybody's. It starts in an empty context: a task of the request's would be cancelled with the request.
        """
        entry = self._kept.get(key)
        if entry is not None:
            if entry.expires > self.clock():
                self._kept.move_to_end(key)
                return entry.value, "hit"
            del self._kept[key]
        task = self._running.get(key)
        outcome: Outcome = "shared"
        if task is None:
            outcome = "miss"
            task = asyncio.get_running_loop().create_task(_run(compute), context=contextvars.Context())
            self._running[key] = task
            task.add_done_callback(lambda done: self._finished(key, done, keep))
        return await asyncio.shield(task), outcome

    def _finished(self, key: str, task: asyncio.Task[V], keep: Callable[[V], bool]) -> None:
        self._running.pop(key, None)
        if task.cancelled() or task.exception() is not None or self.size == 0 or not keep(task.result()):
            return
        # Spread over keys, so that answers computed together do not expire together.
        lifetime = self.lifetime_s * (1.0 - self.jitter * stable_unit("cache", key))
        self._kept[key] = _Entry(task.result(), self.clock() + lifetime)
        self._kept.move_to_end(key)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget every kept answer; computations that run go on."""
        self._kept.clear()


async def _run(compute: Callable[[], Awaitable[V]]) -> V:
    return await compute()
