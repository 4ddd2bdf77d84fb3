"""Whatever the stages are: nothing appears or vanishes unseen, no item twice, the same order every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.recommend.engine import Candidates, FunctionStage, Pipeline, Query, Stage

ITEMS = 30
POOLS = st.lists(st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=15), min_size=1, max_size=4)


def random_stage(kind: str, seed: int) -> Stage:
    """A stage that drops, reorders or scores as a generator says; equal scores are frequent."""

    def act(queries: Sequence[Query], before: Candidates) -> Candidates:
        rng = np.random.default_rng([seed, len(before)])
        if kind == "drop":
            return before.keep(rng.random(len(before)) < 0.7, f"drop{seed}", "chance")
        if kind == "shuffle":
            return before.reorder(np.lexsort((rng.random(len(before)), before.rows())))
        return before.with_score(rng.integers(0, 3, len(before)))

    return FunctionStage(f"{kind}{seed}", act)


STAGES = st.lists(st.builds(random_stage, st.sampled_from(["drop", "shuffle", "score"]), st.integers(0, 5)), max_size=4)


def proposing(pools: Sequence[Sequence[int]]) -> Stage:
    def act(queries: Sequence[Query], before: Candidates) -> Candidates:
        items = np.array([item for pool in pools for item in pool], np.int32)
        return Candidates(np.cumsum([0, *map(len, pools)]).astype(np.int64), items, np.zeros(len(items), np.float32))

    return FunctionStage("source", act, adds=True)


def queries_of(pools: Sequence[Sequence[int]], k: int) -> list[Query]:
    none = np.empty(0, np.int64)
    return [Query(f"u{row}", none.astype(np.int32), none.astype(np.int8), none, now=0, k=k) for row in range(len(pools))]


@settings(max_examples=150, deadline=None)
@given(pools=POOLS, rank=STAGES, finish=STAGES, k=st.integers(1, 12))
def test_conservation(pools: list[list[int]], rank: list[Stage], finish: list[Stage], k: int) -> None:
    out = Pipeline((proposing(pools),), tuple(rank), tuple(finish)).run(queries_of(pools, k))
    for row, pool in enumerate(pools):
        kept = out.items[out.offsets[row] : out.offsets[row + 1]].tolist()
        dropped = [item for item, _, _ in out.trace(row)]
        assert Counter(kept) + Counter(dropped) == Counter(pool)
        assert len(kept) <= k
        assert len(kept) == k or all(stage != "cut" for _, stage, _ in out.trace(row))


@settings(max_examples=100, deadline=None)
@given(pools=POOLS, seed=st.integers(0, 100))
def test_the_order_depends_on_scores_and_items_alone(pools: list[list[int]], seed: int) -> None:
    """Candidates that arrive in another order are ranked the same: ties are settled by the item, not by the place."""
    ties = np.random.default_rng(1).permutation(ITEMS).astype(np.int32)
    by_item = FunctionStage("by item", lambda queries, before: before.with_score(before.items % 3))
    shuffled = [np.random.default_rng(seed).permutation(np.array(pool, np.int32)).tolist() for pool in pools]
    first = Pipeline((proposing(pools),), (by_item,), ties=ties).run(queries_of(pools, 15))
    second = Pipeline((proposing(shuffled),), (by_item,), ties=ties).run(queries_of(pools, 15))
    assert first.items.tolist() == second.items.tolist()
    for row in range(len(pools)):
        mine = first.items[first.offsets[row] : first.offsets[row + 1]]
        assert mine.tolist() == sorted(mine.tolist(), key=lambda item: (-(item % 3), ties[item]))


@settings(max_examples=100, deadline=None)
@given(pools=POOLS, k=st.integers(1, 12))
def test_batched_answers_are_single_answers(pools: list[list[int]], k: int) -> None:
    ties = np.random.default_rng(1).permutation(ITEMS).astype(np.int32)
    half = FunctionStage("half", lambda queries, before: before.keep(before.items % 2 == 0, "half", "odd").with_score(
        before.items[before.items % 2 == 0] % 4))  # fmt: skip
    together = Pipeline((proposing(pools),), (half,), ties=ties).run(queries_of(pools, k))
    for row, pool in enumerate(pools):
        alone = Pipeline((proposing([pool]),), (half,), ties=ties).run(queries_of([pool], k))
        assert alone.items.tolist() == together.items[together.offsets[row] : together.offsets[row + 1]].tolist()
        assert alone.trace(0) == together.trace(row)
