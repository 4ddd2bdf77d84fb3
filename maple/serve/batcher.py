"""Requests that wait while others run are answered together: batching without waiting.

An idle service answers a request at once and alone. While it is busy, requests gather, and the next run takes all of them
(up to a limit): under load the fixed cost of a run is shared, which is what lifts throughput, and nobody waited for company.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from maple.recommend.engine import Deadline, Query, Slates

Answer = Callable[[Sequence[Query], Deadline], Awaitable[Slates]]


@dataclass(frozen=True, eq=False)
class Share:
    """One request's row of a batch answer, and the seconds it had waited for the run to start."""

    slates: Slates
    row: int
    waited: float


@dataclass(frozen=True, eq=False)
class _Waiting:
    query: Query
    deadline: Deadline
    since: float
    share: asyncio.Future[Share]


class Batcher:
    """Runs ``answer`` on at most ``workers`` batches at once, of at most ``max_batch`` queries each. For one event loop.

    A batch has the deadline of its most urgent member. Queries whose deadline has passed already go together, apart from the
    others, so that a backlog is answered from the fallback at once and does not spoil the answers of those still in time.
    """

    def __init__(self, answer: Answer, *, max_batch: int, workers: int = 1) -> None:
        self.answer, self.max_batch, self.workers = answer, max_batch, workers
        self._waiting: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, query: Query, deadline: Deadline) -> Share:
        """The answer to one query; raises what the run of its batch raised."""
        share: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(query, deadline, time.monotonic(), share))
        self._start()
        return await share

    def _start(self) -> None:
        while self._waiting and len(self._running) < self.workers:
            batch = self._next()
            if batch:
                # An empty context: the run belongs to no single request, so no request's end may cancel it.
                task = asyncio.get_running_loop().create_task(self._run(batch), context=contextvars.Context())
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _next(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self.max_batch:
            first = self._waiting[0]
            late = first.deadline.left() <= 0
            if batch and late != (batch[0].deadline.left() <= 0):
                break
            self._waiting.popleft()
            if not first.share.done():  # its client has left
                batch.append(first)
        return batch

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _run(self, batch: list[_Waiting]) -> None:
        start = time.monotonic()
        try:
            slates = await self.answer([one.query for one in batch], Deadline(min(one.deadline.at for one in batch)))
        except Exception as error:
            for one in batch:
                if not one.share.done():
                    one.share.set_exception(error)
            return
        for row, one in enumerate(batch):
            if not one.share.done():
                one.share.set_result(Share(slates, row, start - one.since))
