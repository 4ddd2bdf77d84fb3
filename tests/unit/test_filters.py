"""What may not be recommended is dropped with its reason, and what that leaves short is filled up under the same rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maple.errors import ServeError
from maple.recommend.engine import Candidates, Pipeline, Query, check
from maple.recommend.filters import FilterError, ItemColumns, PatchedColumns, Popular, Restrictions, available, filters
from maple.schema import EVENT_CODES, ITEMS

TABLE = pa.table(
    {
        "item_id": [f"i{code}" for code in range(6)],
        "category": ["tea", "tea", "cup", None, "cup", "tea"],
        "price": pa.array([1.0, 2.0, None, 4.0, 5.0, 6.0], pa.float32()),
        "promotion": [True, False, True, None, False, False],
    }
)
PURCHASE, VIEW = EVENT_CODES["purchase"], EVENT_CODES["view"]


def limits(*, gone: Sequence[int] = (), repeats: bool = True) -> Restrictions:
    allowed = np.ones(6, bool)
    allowed[list(gone)] = False
    return Restrictions(ItemColumns(TABLE), allowed, repeats, np.array([PURCHASE], np.int8))


def query(history: Sequence[tuple[int, int]] = (), k: int = 3, **more: Any) -> Query:
    items, events = np.array([item for item, _ in history], np.int32), np.array([event for _, event in history], np.int8)
    return Query("u", items, events, np.arange(len(items), dtype=np.int64), 100, k, **more)


def everything(num_queries: int = 1) -> Candidates:
    items = np.tile(np.arange(6, dtype=np.int32), num_queries)
    return Candidates(np.arange(num_queries + 1, dtype=np.int64) * 6, items, -items.astype(np.float32))


def run(restrictions: Restrictions, *queries: Query) -> Candidates:
    after = everything(len(queries))
    for stage in filters(restrictions):
        before, after = after, stage(queries, after)
        check(stage, before, after, len(queries), 6)
    return after


def test_every_drop_has_its_stage_and_reason() -> None:
    asked = query([(4, PURCHASE), (5, VIEW)], exclude=np.array([1, -1], np.int32), filters={"promotion": [True, False]})
    after = run(limits(gone=[0], repeats=False), asked)
    assert after.items.tolist() == [2, 5]
    assert [(part.stage, part.items.tolist()) for part in after.dropped] == [
        ("available", [0]),
        ("excluded", [1]),
        ("bought", [4]),
        ("filters", [3]),
    ]
    assert all(part.reason for part in after.dropped)


def test_queries_of_a_batch_are_filtered_on_their_own() -> None:
    after = run(limits(), query(exclude=np.array([0, 1, 2], np.int32)), query(), query(filters={"category": ["cup"]}))
    assert [after.items[start:stop].tolist() for start, stop in zip(after.offsets[:-1], after.offsets[1:], strict=True)] == [
        [3, 4, 5], [0, 1, 2, 3, 4, 5], [2, 4],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "items"),
    [
        ({"category": ["tea"]}, [0, 1, 5]),
        ({"category": ["tea", "nothing"], "promotion": [False]}, [1, 5]),
        ({"category": []}, []),
        ({"price": {"min": 2, "max": 5}}, [1, 3, 4]),
        ({"price": {"max": 1.0}}, [0]),
        ({"item_id": ["i1"]}, None),
        ({"categry": ["tea"]}, None),
        ({"category": "tea"}, None),
        ({"category": {"min": 1}}, None),
        ({"price": {"least": 1}}, None),
        ({"price": {}}, None),
        ({"price": {"min": "1"}}, None),
        ({"category": [["tea"]]}, None),
        ({"category": ["x"] * 1001}, None),
    ],
)
def test_request_filters(wanted: Mapping[str, Any], items: list[int] | None) -> None:
    if items is None:
        with pytest.raises(ServeError, match="filters"):
            ItemColumns(TABLE).mask(wanted)
    else:
        assert np.flatnonzero(ItemColumns(TABLE).mask(wanted)).tolist() == items


MOMENTS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "created_at": pa.array([1_700_000_000_000_000, 1_700_000_000_000_001, None, -5], pa.timestamp("us", tz="UTC")),
        "updated": pa.array([1_700_000_000_000_000_999, 0, None, -5_000], pa.timestamp("ns")),
        "day": pa.array([19_675, 0, None, 1], pa.date32()),
        "count": pa.array([2**60, 0, None, 3], pa.int64()),
        "tags": [["x"], [], None, ["y"]],
        "span": pa.array([1, 2, None, 3], pa.duration("s")),
    }
)


@pytest.mark.parametrize(
    ("wanted", "items"),
    [
        ({"created_at": {"min": 1e9}}, [0, 1]),
        ({"created_at": {"min": 1_700_000_000_000_001}}, [1]),
        ({"created_at": {"max": 1.7e15}}, [0, 3]),
        ({"created_at": [1_700_000_000_000_001]}, [1]),
        ({"updated": {"min": 1.7e15, "max": 1.7e15}}, [0]),
        ({"day": {"min": 1, "max": 86_400_000_000}}, [3]),
        ({"count": {"min": 3}}, [0, 3]),
        ({"tags": ["x"]}, None),
        ({"tags": {"min": 1}}, None),
        ({"span": {"min": 1}}, None),
    ],
)
def test_times_are_microseconds_and_what_cannot_be_compared_is_refused(wanted: Mapping[str, Any], items: list[int] | None) -> None:
    if items is None:
        with pytest.raises(FilterError, match="filters"):
            ItemColumns(MOMENTS).mask(wanted)
    else:
        assert np.flatnonzero(ItemColumns(MOMENTS).mask(wanted)).tolist() == items


def test_a_misspelt_column_is_named() -> None:
    with pytest.raises(ServeError, match=r"Did you mean 'category'"):
        ItemColumns(TABLE).mask({"categry": ["tea"]})


def test_availability_comes_from_the_catalogue() -> None:
    rows = {"item_id": ["a", "b", "c", "d"], "available": [True, False, None, None], "stock": [1.0, 5.0, 0.0, None]}
    table = pa.table({name: pa.array(values, ITEMS.field(name).type) for name, values in rows.items()})
    assert available(ItemColumns(table)).tolist() == [True, False, False, True]
    assert available(ItemColumns(TABLE)).all()


# -- a live catalogue --------------------------------------------------------------------------------------------------


def patched(**columns: dict[int, Any]) -> PatchedColumns:
    """The table with two more items and these values."""
    kinds = {field.name: field.type for field in (*ITEMS, *TABLE.schema)}
    arrays = {name: (np.array([*values], np.int32), pa.array([*values.values()], kinds[name])) for name, values in columns.items()}
    return PatchedColumns(ItemColumns(TABLE), 8, arrays)


def test_patches_replace_remove_and_add_values() -> None:
    live = patched(category={0: "cup", 6: "tea", 7: "new"}, price={1: 20.0, 3: None, 7: 3.0}, stock={2: 0.0, 6: 4.0})
    assert len(live) == 8
    assert np.flatnonzero(live.mask({"category": ["cup"]})).tolist() == [0, 2, 4]
    assert np.flatnonzero(live.mask({"category": ["new", "tea"]})).tolist() == [1, 5, 6, 7]
    assert np.flatnonzero(live.mask({"price": {"min": 3}})).tolist() == [1, 4, 5, 7]
    assert np.flatnonzero(live.mask({"price": [20.0, 3.0]})).tolist() == [1, 7]
    assert np.flatnonzero(live.mask({"promotion": [False]})).tolist() == [1, 4, 5], "untouched columns are unknown of new items"
    assert live.names == ["category", "price", "promotion", "stock"]
    assert available(live).tolist() == [True, True, False, True, True, True, True, True]
    assert np.flatnonzero(ItemColumns(TABLE).mask({"category": ["cup"]})).tolist() == [2, 4], "the base has not changed"


def test_patched_times_are_microseconds() -> None:
    values = pa.array([5_000, None], MOMENTS.schema.field("updated").type)
    live = PatchedColumns(ItemColumns(MOMENTS), 5, {"updated": (np.array([1, 4], np.int32), values)})
    least = np.iinfo(np.int64).min
    assert live.times("updated").tolist() == [1_700_000_000_000_000, 5, least, -5, least]
    assert np.flatnonzero(live.mask({"updated": {"min": 0, "max": 10}})).tolist() == [1]


# -- filling up --------------------------------------------------------------------------------------------------------

ORDER = np.array([5, 4, 3, 2, 1, 0], np.int32)


def fill(restrictions: Restrictions, before: Candidates, *queries: Query, least: int = 1) -> Candidates:
    stage = Popular(ORDER, restrictions, code=2, least=least)
    after = stage(queries, before)
    check(stage, before, after, len(queries), 6)
    return after


def test_short_queries_are_filled_below_what_they_have() -> None:
    before = Candidates(
        np.array([0, 1, 4, 4]), np.array([5, 0, 1, 2], np.int32), np.array([0.5, 3, 2, 1], np.float32),
        {"source": np.array([0, 1, 1, 1], np.int32), "x": np.ones(4, np.float32)},
    )  # fmt: skip
    after = fill(limits(gone=[4]), before, query(k=3), query(k=3), query(k=2, exclude=np.array([5], np.int32)))
    assert after.offsets.tolist() == [0, 3, 6, 8]
    assert after.items.tolist() == [5, 3, 2, 0, 1, 2, 3, 2]
    assert after.columns["source"].tolist() == [0, 2, 2, 1, 1, 1, 2, 2]
    assert np.isnan(after.columns["x"]).tolist() == [False, True, True, False, False, False, True, True]
    assert (np.diff(after.score[:3]) < 0).all()


def test_what_was_dropped_does_not_come_back() -> None:
    before = everything().keep(everything().items < 2, "rule", "too dear")
    assert fill(limits(), before, query(k=6)).items.tolist() == [0, 1]


def test_enough_is_left_alone() -> None:
    before = everything()
    assert fill(limits(), before, query(k=6)) is before


def test_filters_that_leave_nothing_give_an_empty_answer() -> None:
    assert len(fill(limits(), Candidates.empty(1), query(filters={"category": ["none"]}))) == 0


def test_as_a_fallback_it_obeys_every_restriction() -> None:
    restrictions = limits(gone=[5], repeats=False)
    fallback = Popular(ORDER, restrictions, code=0, least=100)
    pipeline = Pipeline((), (), filters(restrictions), fallback=fallback)
    asked = query([(4, PURCHASE)], k=3, exclude=np.array([3], np.int32), filters={"category": ["tea", "cup"]})
    after = fallback([asked], Candidates.empty(1))
    assert after.items.tolist() == [2, 1, 0]
    for stage in pipeline.finish:
        assert stage([asked], after).items.tolist() == [2, 1, 0]
