"""Batching without waiting: alone when idle, together when busy, late ones apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from maple.recommend.engine import Deadline, Query, Slates
from maple.serve.batcher import Batcher

NONE = np.empty(0, np.int32)


def query(name: str) -> Query:
    return Query(name, NONE, NONE.astype(np.int8), NONE.astype(np.int64), 0)


def slates(queries: Sequence[Query]) -> Slates:
    """One item per query: the number in the user's name."""
    items = np.array([int(one.user) for one in queries], np.int32)
    size = len(items)
    return Slates(
        np.arange(size + 1), items, np.zeros(size, np.float32), np.zeros(size, np.int8), (), {}, (), (), {}, (), np.zeros(size, bool)
    )  # fmt: skip


class Recorder:
    """Answers after a while and remembers the batches."""

    def __init__(self, seconds: float = 0.01, fault: Exception | None = None) -> None:
        self.seconds, self.fault = seconds, fault
        self.batches: list[list[str]] = []
        self.deadlines: list[float] = []

    async def __call__(self, queries: Sequence[Query], deadline: Deadline) -> Slates:
        self.batches.append([one.user for one in queries])
        self.deadlines.append(deadline.at)
        await asyncio.sleep(self.seconds)
        if self.fault:
            raise self.fault
        return slates(queries)


def test_everybody_gets_their_own_answer_and_waiting_ones_go_together() -> None:
    async def scenario() -> None:
        record = Recorder()
        batcher = Batcher(record, max_batch=4)
        shares = await asyncio.gather(*(batcher.submit(query(str(n)), Deadline.after(9)) for n in range(10)))
        assert [int(share.slates.items[share.row]) for share in shares] == list(range(10))
        assert [len(batch) for batch in record.batches] == [1, 4, 4, 1]
        assert [name for batch in record.batches for name in batch] == [str(n) for n in range(10)]

    asyncio.run(scenario())


def test_an_idle_batcher_starts_at_once() -> None:
    async def scenario() -> None:
        batcher = Batcher(Recorder(), max_batch=4)
        share = await batcher.submit(query("3"), Deadline.after(9))
        assert share.waited < 0.01

    asyncio.run(scenario())


def test_several_workers_run_side_by_side() -> None:
    async def scenario() -> None:
        record = Recorder()
        batcher = Batcher(record, max_batch=8, workers=2)
        await asyncio.gather(*(batcher.submit(query(str(n)), Deadline.after(9)) for n in range(4)))
        assert [len(batch) for batch in record.batches] == [1, 1, 2]

    asyncio.run(scenario())


def test_late_queries_do_not_spoil_those_in_time() -> None:
    async def scenario() -> None:
        record = Recorder()
        batcher = Batcher(record, max_batch=8)
        waits = [9.0, -1.0, -1.0, 9.0, 9.0]
        await asyncio.gather(*(batcher.submit(query(str(n)), Deadline.after(wait)) for n, wait in enumerate(waits)))
        assert record.batches == [["0"], ["1", "2"], ["3", "4"]]

    asyncio.run(scenario())


def test_a_batch_has_the_most_urgent_deadline() -> None:
    async def scenario() -> None:
        record = Recorder()
        batcher = Batcher(record, max_batch=8)
        deadlines = [Deadline.after(wait) for wait in (5, 9, 7, 8)]
        await asyncio.gather(*(batcher.submit(query(str(n)), deadline) for n, deadline in enumerate(deadlines)))
        assert record.deadlines == [deadlines[0].at, deadlines[2].at]

    asyncio.run(scenario())


def test_a_failure_reaches_all_of_its_batch_and_the_next_one_runs() -> None:
    async def scenario() -> None:
        record = Recorder(fault=ValueError("broken"))
        batcher = Batcher(record, max_batch=8)
        results = await asyncio.gather(*(batcher.submit(query(str(n)), Deadline.after(9)) for n in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [ValueError] * 3
        record.fault = None
        assert (await batcher.submit(query("5"), Deadline.after(9))).slates.items[0] == 5

    asyncio.run(scenario())


def test_clients_that_left_are_not_computed() -> None:
    async def scenario() -> None:
        record = Recorder()
        batcher = Batcher(record, max_batch=2)
        tasks = [asyncio.create_task(batcher.submit(query(str(n)), Deadline.after(9))) for n in range(4)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*(task for task in tasks if task is not tasks[2]))
        assert record.batches == [["0"], ["1", "3"]]
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]

    asyncio.run(scenario())
