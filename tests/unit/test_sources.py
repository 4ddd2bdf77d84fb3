"""Several retrievers become one list of candidates that keeps what each of them thinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maple.data.dataset import Float32, Int32, Int64
from maple.models.base import Mask, QueryBatch
from maple.recommend.engine import Candidates, Query, StageError, check
from maple.recommend.filters import ItemColumns, Restrictions
from maple.recommend.sources import RetrieverSource, Sources
from maple.schema import EVENT_CODES

NUM_ITEMS = 8
CATEGORIES = ["a", "b", "a", "b", "a", "b", None, "a"]


class Fixed:
    """A retriever with one score per item, the same for everyone; items that are not named have none."""

    def __init__(self, scores: Mapping[int, float]) -> None:
        self.table = np.full(NUM_ITEMS, -np.inf, np.float32)
        self.table[list(scores)] = list(scores.values())

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        scores = np.repeat(self.table[None], len(queries), axis=0)
        if mask is not None and mask.allowed is not None:
            scores[:, ~mask.allowed] = -np.inf
        if mask is not None and mask.exclude is not None:
            offsets, items = mask.exclude
            rows = np.repeat(np.arange(len(queries)), np.diff(offsets))
            scores[rows[items >= 0], items[items >= 0]] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
        best = np.take_along_axis(scores, order, axis=1)
        return np.where(best > -np.inf, order, -1), best

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        return self.table[items]


class Broken:
    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        raise RuntimeError("index is gone")


class Nan(Fixed):
    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        items, scores = super().topk(queries, k, mask)
        return items, np.where(items == 1, np.float32(np.nan), scores)


class Twice(Fixed):
    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        items, scores = super().topk(queries, k, mask)
        return np.zeros_like(items), scores


def limits(*, allowed: Sequence[int] = range(NUM_ITEMS), repeats: bool = True) -> Restrictions:
    mask = np.zeros(NUM_ITEMS, bool)
    mask[list(allowed)] = True
    table = pa.table({"item_id": [f"i{code}" for code in range(NUM_ITEMS)], "category": CATEGORIES})
    return Restrictions(ItemColumns(table), mask, repeats, np.array([EVENT_CODES["purchase"]], np.int8))


def stage(
    models: Mapping[str, Any], *, quota: int = 3, restrictions: Restrictions | None = None, most: int = 100, union: bool = True
) -> Sources:
    sources = tuple(RetrieverSource(name, model, quota) for name, model in models.items())
    return Sources(sources, restrictions or limits(), most, union)


def query(bought: Sequence[int] = (), **more: Any) -> Query:
    items = np.array(bought, np.int32)
    return Query("u", items, np.full(len(items), EVENT_CODES["purchase"], np.int8), np.arange(len(items), dtype=np.int64), 100, **more)


def ask(sources: Sources, *queries: Query) -> Candidates:
    before = Candidates.empty(len(queries))
    after = sources(queries, before)
    check(sources, before, after, len(queries), NUM_ITEMS)
    return after


def by_item(after: Candidates, name: str, row: int = 0) -> dict[int, float]:
    part = slice(after.offsets[row], after.offsets[row + 1])
    return dict(zip(after.items[part].tolist(), after.columns[name][part].tolist(), strict=True))


A, B = Fixed({0: 9.0, 1: 5.0, 2: 1.0, 3: 0.5}), Fixed({1: 0.3, 4: 0.2, 5: 0.1})


def test_the_union_keeps_every_opinion() -> None:
    after = ask(stage({"a": A, "b": B}), query())
    assert sorted(after.items.tolist()) == [0, 1, 2, 4, 5]
    nan = float("nan")
    assert by_item(after, "source.a.score") == pytest.approx({0: 9.0, 1: 5.0, 2: 1.0, 4: nan, 5: nan}, nan_ok=True)
    assert by_item(after, "source.b.score") == pytest.approx({0: nan, 1: 0.3, 2: nan, 4: 0.2, 5: 0.1}, nan_ok=True)
    assert by_item(after, "sources") == {0: 1, 1: 3, 2: 1, 4: 2, 5: 2}
    assert by_item(after, "source") == {0: 0, 1: 1, 2: 0, 4: 1, 5: 1}
    last = np.log2(2 + 100)
    assert by_item(after, "source.a.rank") == pytest.approx({0: 1.0, 1: np.log2(3), 2: 2.0, 4: last, 5: last})
    assert by_item(after, "source.b.z") == pytest.approx({0: 0, 1: 1.5**0.5, 2: 0, 4: 0, 5: -(1.5**0.5)}, abs=1e-5)
    assert set(after.columns) == set(stage({"a": A, "b": B}).column_names)


def test_the_score_is_reciprocal_rank_fusion() -> None:
    after = ask(stage({"a": A, "b": B}), query())
    got = dict(zip(after.items.tolist(), after.score.tolist(), strict=True))
    assert got == pytest.approx({0: 1 / 61, 1: 1 / 62 + 1 / 61, 2: 1 / 63, 4: 1 / 62, 5: 1 / 63})


def test_without_union_a_source_says_nothing_about_what_it_did_not_propose() -> None:
    wide, narrow = Fixed({0: 3.0, 1: 2.0, 2: 1.0, 3: 0.5}), Fixed({3: 1.0})
    with_union = ask(stage({"wide": wide, "narrow": narrow}, quota=2), query())
    without = ask(stage({"wide": wide, "narrow": narrow}, quota=2, union=False), query())
    assert by_item(with_union, "source.wide.score") == {0: 3.0, 1: 2.0, 3: 0.5}
    assert by_item(without, "source.wide.score") == pytest.approx({0: 3.0, 1: 2.0, 3: float("nan")}, nan_ok=True)
    assert by_item(without, "source.narrow.score")[3] == 1.0


def test_equal_scores_share_a_rank() -> None:
    after = ask(stage({"a": Fixed({0: 2.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 0.5})}, quota=8), query())
    rank = by_item(after, "source.a.rank")
    assert rank[1] == rank[2] == rank[3] == pytest.approx(np.log2(3))
    assert rank[4] == pytest.approx(np.log2(6))


def test_the_excess_is_dropped_with_a_reason_lowest_fused_first() -> None:
    after = ask(stage({"a": A, "b": B}, most=2), query(), query())
    assert [sorted(after.items[:2].tolist()), sorted(after.items[2:].tolist())] == [[0, 1], [0, 1]]
    assert after.offsets.tolist() == [0, 2, 4]
    (gone,) = after.dropped
    assert sorted(gone.items[gone.rows == 1].tolist()) == [2, 4, 5]


def test_restrictions_apply_before_quotas() -> None:
    one = stage({"a": A}, quota=2, restrictions=limits(allowed=[1, 2, 3]))
    assert sorted(ask(one, query()).items.tolist()) == [1, 2]
    assert sorted(ask(one, query(exclude=np.array([1, -1], np.int32))).items.tolist()) == [2, 3]
    assert sorted(ask(one, query(filters={"category": ["b"]})).items.tolist()) == [1, 3]
    assert sorted(ask(one, query([1])).items.tolist()) == [1, 2]
    assert sorted(ask(stage({"a": A}, quota=2, restrictions=limits(repeats=False)), query([0, 1])).items.tolist()) == [2, 3]


def test_queries_of_one_batch_keep_their_own_restrictions() -> None:
    queries = [query(filters={"category": ["b"]}), query(exclude=np.array([0], np.int32)), query(), query(filters={"category": ["b"]})]
    sources = stage({"a": A, "b": B}, quota=2)
    together = ask(sources, *queries)
    for row, one in enumerate(queries):
        alone = ask(sources, one)
        part = slice(together.offsets[row], together.offsets[row + 1])
        assert together.items[part].tolist() == alone.items.tolist()
        assert together.score[part].tolist() == alone.score.tolist()
        for name, column in alone.columns.items():
            np.testing.assert_array_equal(together.columns[name][part], column)


@pytest.mark.parametrize("bad", [Broken(), Nan({0: 1.0, 1: 1.0}), Twice({0: 2.0, 1: 1.0})])
def test_a_failing_source_is_left_out_and_noted(bad: Any) -> None:
    after = ask(stage({"bad": bad, "b": B}), query())
    assert sorted(after.items.tolist()) == [1, 4, 5]
    assert after.degraded in (("bad: error:RuntimeError",), ("bad: error:StageError",))
    assert np.isnan(after.columns["source.bad.score"]).all()
    assert set(by_item(after, "source").values()) == {1}


def test_no_source_left_is_a_failure() -> None:
    with pytest.raises(StageError, match=r"every source failed: x: error:RuntimeError"):
        ask(stage({"x": Broken()}), query())


def test_nothing_to_propose_is_an_empty_answer() -> None:
    after = ask(stage({"a": Fixed({})}), query(), query())
    assert len(after) == 0
    assert after.offsets.tolist() == [0, 0, 0]


def test_sources_come_first() -> None:
    some = Candidates(np.array([0, 1]), np.array([3], np.int32), np.ones(1, np.float32))
    with pytest.raises(StageError, match="first"):
        stage({"a": A})([query()], some)


def test_a_source_that_fails_to_score_loses_its_columns_only() -> None:
    class Silent(Fixed):
        def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
            return np.full(len(items), np.nan, np.float32)

    after = ask(stage({"s": Silent({6: 1.0}), "b": B}), query())
    assert 6 in after.items.tolist()
    assert np.isnan(after.columns["source.s.score"]).all()
    assert after.degraded == ("s: error:StageError",)
