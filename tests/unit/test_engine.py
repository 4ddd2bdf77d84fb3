"""The engine: what a stage must keep, what happens when one does not, and how an answer is put together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from maple.recommend.engine import (
    Candidates,
    Deadline,
    Dropped,
    FunctionStage,
    Pipeline,
    Query,
    SegmentResult,
    Slates,
    Stage,
    StageError,
    check,
    per_query,
    ranked,
)


def query(k: int = 3, items: Sequence[int] = (1,)) -> Query:
    history = np.array(items, np.int32)
    return Query("u", history, np.zeros(len(history), np.int8), np.arange(len(history), dtype=np.int64), now=100, k=k)


def candidates(*lists: Sequence[int], scores: Sequence[float] | None = None) -> Candidates:
    items = np.array([item for part in lists for item in part], np.int32)
    score = np.linspace(1, 0, len(items)) if scores is None else np.array(scores)
    return Candidates(np.cumsum([0, *map(len, lists)]).astype(np.int64), items, score.astype(np.float32))


def source(*items: int, seconds: float = 0.0) -> Stage:
    def propose(queries: Sequence[Query], before: Candidates) -> Candidates:
        time.sleep(seconds)
        return candidates(*[items for _ in queries])

    return FunctionStage("source", propose, adds=True)


def flip(seconds: float = 0.0) -> Stage:
    """Turns the order round."""

    def rank(queries: Sequence[Query], before: Candidates) -> Candidates:
        time.sleep(seconds)
        return before.with_score(-before.score)

    return FunctionStage("ranker", rank)


def broken(name: str = "broken", **kind: bool) -> Stage:
    def fail(queries: Sequence[Query], before: Candidates) -> Candidates:
        raise ValueError("out of order")

    return FunctionStage(name, fail, **kind)


def popular(queries: Sequence[Query], before: Candidates) -> Candidates:
    return replace(candidates(*[(7, 8, 9)] * len(queries)), degraded=before.degraded)


FALLBACK = FunctionStage("fallback", popular, adds=True)


def served(pipeline: Pipeline, queries: Sequence[Query], **arguments: Any) -> Slates:
    async def main() -> Slates:
        return await pipeline.arun(queries, executor=pool, **arguments)

    with ThreadPoolExecutor(2) as pool:
        return asyncio.run(main())


# -- the contract of a stage -------------------------------------------------------------------------------------------

BEFORE = candidates((1, 2, 3), (2, 4))


@pytest.mark.parametrize(
    ("after", "complaint"),
    [
        (candidates((1, 2), (2, 4)), "conserve"),
        (candidates((1, 2, 5), (2, 4)), "conserve"),
        (candidates((1, 2, 4), (2, 3)), "conserve"),
        (candidates((1, 2, 2), (2, 4)), "twice"),
        (candidates((1, 2, 3, 2, 4)), "offsets"),
        (replace(BEFORE, score=np.array([1, np.nan, 1, 1, 1], np.float32)), "finite"),
        (replace(BEFORE, score=np.array([1, np.inf, 1, 1, 1], np.float32)), "finite"),
        (replace(BEFORE, score=np.ones(4, np.float32)), "4 values"),
        (BEFORE.with_columns({"price": np.ones(6)}), "6 values"),
        (candidates((1, 2, -1), (2, 4)), "outside"),
        (candidates((1, 2, 10), (2, 4)), "outside"),
        (replace(candidates((1, 2), (2, 4)), dropped=(Dropped(np.array([1]), np.array([3], np.int32), "s", "r"),)), "conserve"),
        (replace(BEFORE, dropped=(Dropped(np.array([0]), np.array([1], np.int32), "s", "r"),)), "conserve"),
    ],
)
def test_check_refuses(after: Candidates, complaint: str) -> None:
    with pytest.raises(StageError, match=complaint):
        check(flip(), BEFORE, after, 2, 10)


def test_check_accepts_reordering_and_dropping_with_a_reason() -> None:
    check(flip(), BEFORE, BEFORE.reorder(np.array([2, 1, 0, 4, 3])), 2, 10)
    after = BEFORE.keep(BEFORE.items != 2, "stage", "even prime")
    check(flip(), BEFORE, after, 2, 10)
    assert after.items.tolist() == [1, 3, 4]
    assert after.offsets.tolist() == [0, 2, 3]
    assert after.dropped[0].items.tolist() == [2, 2]
    assert after.dropped[0].rows.tolist() == [0, 1]


def test_check_lets_only_adding_stages_add_and_never_lets_them_lose() -> None:
    more = candidates((1, 2, 3, 9), (2, 4))
    with pytest.raises(StageError, match="conserve"):
        check(flip(), BEFORE, more, 2)
    check(replace_adds(), BEFORE, more, 2)
    with pytest.raises(StageError, match="conserve"):
        check(replace_adds(), BEFORE, candidates((1, 2, 9), (2, 4)), 2)


def replace_adds() -> Stage:
    return FunctionStage("adds", lambda queries, before: before, adds=True)


def test_check_refuses_a_stage_that_rewrites_what_others_dropped() -> None:
    once = BEFORE.keep(BEFORE.items != 2, "first", "because")
    with pytest.raises(StageError, match="earlier"):
        check(flip(), once, replace(once, dropped=()), 2)


def test_ranked_breaks_ties_by_the_given_order_of_items() -> None:
    out = ranked(candidates((1, 2, 3), (3, 2), scores=[1, 1, 2, 5, 5]), np.array([0, 9, 4, 7], np.int32))
    assert out.items.tolist() == [3, 2, 1, 2, 3]


def test_per_query_sees_one_query_at_a_time() -> None:
    def drop_first(one: Query, part: Candidates) -> Candidates:
        assert len(part.offsets) == 2
        keep = np.ones(len(part), bool)
        keep[: one.k] = False
        return part.keep(keep, "drop", f"first {one.k}")

    stage = FunctionStage("drop", per_query(drop_first))
    after = stage([query(k=1), query(k=2)], BEFORE)
    check(stage, BEFORE, after, 2)
    assert after.items.tolist() == [2, 3]
    assert [(part.rows.tolist(), part.items.tolist(), part.reason) for part in after.dropped] == [
        ([0], [1], "first 1"),
        ([1, 1], [2, 4], "first 2"),
    ]


# -- the pipeline ------------------------------------------------------------------------------------------------------


def test_run_retrieves_ranks_finishes_and_cuts() -> None:
    odd = FunctionStage("odd", lambda queries, before: before.keep(before.items % 2 == 1, "odd", "even"))
    out = Pipeline((source(1, 2, 3, 5),), (flip(),), (odd,)).run([query(k=2), query(k=9)])
    assert out.offsets.tolist() == [0, 2, 5]
    assert out.items.tolist() == [5, 3, 5, 3, 1]
    assert out.path == ("retrieve", "rank", "finish")
    assert out.trace(0) == [(2, "odd", "even"), (1, "cut", "below the cut")]
    assert out.trace(1) == [(2, "odd", "even")]
    assert {"source", "ranker", "odd", "retrieve", "rank", "finish", "total"} <= out.timings.keys()
    assert out.lists(3)[0].tolist() == [[5, 3, -1], [5, 3, 1]]


def test_run_raises_offline_and_degrades_where_asked() -> None:
    pipeline = Pipeline((source(1, 2, 3),), (broken(),), (), fallback=FALLBACK)
    with pytest.raises(ValueError, match="out of order"):
        pipeline.run([query()])
    out = pipeline.run([query()], on_error="degrade")
    assert out.items.tolist() == [1, 2, 3]
    assert out.path == ("retrieve", "finish")
    assert out.degraded == ("rank: error:ValueError",)


def test_a_misaligned_ranker_is_a_failed_ranker() -> None:
    short = FunctionStage("ranker", lambda queries, before: replace(before, score=before.score[:-1]))
    out = Pipeline((source(1, 2, 3),), (short,)).run([query()], on_error="degrade")
    assert out.items.tolist() == [1, 2, 3]
    assert out.degraded == ("rank: error:StageError",)


def test_failed_retrieval_is_answered_by_the_fallback_without_ranking() -> None:
    out = Pipeline((broken(),), (flip(),), (), fallback=FALLBACK).run([query(k=2)], on_error="degrade")
    assert out.items.tolist() == [7, 8]
    assert out.path == ("fallback", "finish")
    assert out.degraded == ("retrieve: error:ValueError",)


def test_an_answer_without_sources_and_fallback_is_empty_and_says_why() -> None:
    out = Pipeline((broken(),), (flip(),), (), fallback=broken("fallback", adds=True)).run([query()], on_error="degrade")
    assert out.items.tolist() == []
    assert out.degraded == ("retrieve: error:ValueError", "fallback: error:ValueError")


def test_a_failed_rule_is_skipped_but_a_failed_filter_is_no_answer() -> None:
    out = Pipeline((source(1, 2),), (), (broken("mmr"),)).run([query()], on_error="degrade")
    assert out.items.tolist() == [1, 2]
    assert out.degraded == ("mmr: error:ValueError",)
    with pytest.raises(StageError, match=r"available.*ValueError"):
        Pipeline((source(1, 2),), (), (broken("available", essential=True),)).run([query()], on_error="degrade")


def test_the_observer_counts_every_stage_and_error() -> None:
    seen: list[tuple[str, int, int, str | None]] = []

    class Counter:
        def on_stage(self, name: str, seconds: float, n_in: int, n_out: int, error: str | None) -> None:
            assert seconds >= 0
            seen.append((name, n_in, n_out, error))

    first = FunctionStage("first", lambda queries, before: before.keep(before.items == 1, "first", "others"))
    Pipeline((source(1, 2),), (broken(),), (first,), observer=Counter()).run([query()], on_error="degrade")
    assert seen == [
        ("source", 0, 2, None), ("broken", 2, 2, "ValueError"), ("rank", 2, 2, "error:ValueError"), ("first", 2, 1, None),
    ]  # fmt: skip


def test_explain_sees_only_the_final_slate() -> None:
    def explain(queries: Sequence[Query], final: Candidates) -> Candidates:
        return final.with_columns({"reason.item": np.full(len(final), len(final), np.int32)})

    pipeline = Pipeline((source(1, 2, 3),), explain=FunctionStage("explain", explain))
    assert pipeline.run([query(k=2)], explain=True).columns["reason.item"].tolist() == [2, 2]
    assert "reason.item" not in pipeline.run([query(k=2)]).columns


# -- under a deadline --------------------------------------------------------------------------------------------------


def test_served_equals_offline() -> None:
    pipeline = Pipeline((source(1, 2, 3),), (flip(),), (), fallback=FALLBACK)
    offline, online = pipeline.run([query()]), served(pipeline, [query()], deadline=Deadline.after(5))
    assert online.items.tolist() == offline.items.tolist()
    assert online.path == offline.path
    assert online.degraded == ()


def test_a_late_ranker_leaves_source_order_without_being_waited_for() -> None:
    release = threading.Event()

    def stuck(queries: Sequence[Query], before: Candidates) -> Candidates:
        assert release.wait(60)
        return before.with_score(-before.score)

    async def main() -> Slates:
        pipeline = Pipeline((source(1, 2, 3),), (FunctionStage("ranker", stuck),))
        out = await pipeline.arun([query()], executor=pool, deadline=Deadline.after(0.5))
        assert not release.is_set()
        release.set()
        return out

    with ThreadPoolExecutor(1) as pool:
        out = asyncio.run(main())
    assert out.items.tolist() == [1, 2, 3]
    assert out.degraded == ("rank: deadline",)
    assert out.path == ("retrieve", "finish")


def test_late_retrieval_and_a_passed_deadline_give_the_fallback() -> None:
    slow = Pipeline((source(1, 2, seconds=0.3),), (flip(),), fallback=FALLBACK)
    out = served(slow, [query()], deadline=Deadline.after(0.03))
    assert out.items.tolist() == [7, 8, 9]
    assert out.degraded == ("retrieve: deadline",)
    gone = served(slow, [query()], deadline=Deadline.after(-1))
    assert gone.items.tolist() == [7, 8, 9]


def test_work_that_nobody_waits_for_stops_before_its_next_stage() -> None:
    reached = threading.Event()

    def second(queries: Sequence[Query], before: Candidates) -> Candidates:
        reached.set()
        return before

    pipeline = Pipeline((source(1, 2, seconds=0.2), FunctionStage("second", second)), fallback=FALLBACK)
    served(pipeline, [query()], deadline=Deadline.after(0.05))  # the pool is joined when it returns
    assert not reached.is_set()


Remote = Callable[[Sequence[Query], Candidates, Deadline | None], Awaitable[SegmentResult]]


def elsewhere(pipeline: Pipeline, name: Any, seconds: float = 0.0) -> Remote:
    async def call(queries: Sequence[Query], before: Candidates, deadline: Deadline | None) -> SegmentResult:
        await asyncio.sleep(seconds)
        assert before.dropped == ()
        return pipeline.run_segment(name, queries, before, deadline)

    return call


def test_split_equals_fused() -> None:
    first = FunctionStage("even", lambda queries, before: before.keep(before.items % 2 == 0, "even", "odd"))
    pipeline = Pipeline((source(1, 2, 4), first), (flip(),), ())
    remote = {name: elsewhere(pipeline, name) for name in ("retrieve", "rank")}
    fused, split = served(pipeline, [query()]), served(pipeline, [query()], remote=remote)
    assert split.items.tolist() == fused.items.tolist() == [4, 2]
    assert split.trace(0) == fused.trace(0) == [(1, "even", "odd")]
    assert split.timings.keys() == fused.timings.keys()


def test_remote_failures_are_answered_around() -> None:
    pipeline = Pipeline((source(1, 2),), (flip(),), fallback=FALLBACK)

    async def dead(queries: Sequence[Query], before: Candidates, deadline: Deadline | None) -> SegmentResult:
        raise ConnectionError("gone")

    async def wrong(queries: Sequence[Query], before: Candidates, deadline: Deadline | None) -> SegmentResult:
        return SegmentResult(candidates((5, 6)), {})

    assert served(pipeline, [query()], remote={"rank": dead}).degraded == ("rank: error:ConnectionError",)
    assert served(pipeline, [query()], remote={"retrieve": dead}).items.tolist() == [7, 8, 9]
    assert served(pipeline, [query()], remote={"rank": wrong}).degraded == ("rank: error:StageError",)


def test_a_remote_call_that_ignores_its_cancellation_is_not_waited_for() -> None:
    calls: list[asyncio.CancelledError] = []
    release: list[bool] = []

    async def deaf(queries: Sequence[Query], before: Candidates, deadline: Deadline | None) -> SegmentResult:
        while not release:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError as error:
                calls.append(error)
        return SegmentResult(before, {})

    async def main() -> Slates:
        out = await Pipeline((source(1, 2),), (flip(),)).arun([query()], executor=pool, remote={"rank": deaf}, deadline=Deadline.after(0.5))
        await asyncio.sleep(0.05)
        release.append(True)
        return out

    with ThreadPoolExecutor(1) as pool:
        out = asyncio.run(main())
    assert out.degraded == ("rank: deadline",)
    assert calls


def test_cancelling_an_answer_cancels_its_remote_call() -> None:
    cancelled: list[bool] = []

    async def hang(queries: Sequence[Query], before: Candidates, deadline: Deadline | None) -> SegmentResult:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        raise AssertionError

    async def main() -> None:
        with ThreadPoolExecutor(1) as pool:
            answer = asyncio.ensure_future(Pipeline((source(1),)).arun([query()], executor=pool, remote={"retrieve": hang}))
            await asyncio.sleep(0.05)
            answer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answer
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert cancelled == [True]
