"""ETL: content ids, duplicates, sessions, orders without a clock, buckets, item facts against hand-worked answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from maple.data import etl
from maple.data.sources import Clock, ItemsFromEvents, LastWord
from maple.hashing import stable_hash
from maple.schema import TIMESTAMP

MINUTE = 60_000_000


def rows(**columns: Any) -> pa.Table:
    types = {"timestamp": TIMESTAMP, "value": pa.float32(), "price": pa.float32(), "_row": pa.int64(), "note": pa.list_(pa.int64())}
    return pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()})


def test_content_ids_tell_rows_apart_by_any_cell_and_nothing_else() -> None:
    base = rows(
        user_id=["u", "u", "u", "v", None, "u"],
        value=[1.0, 1.0, 2.0, 1.0, 1.0, None],
        note=[[1], [1], [1], [1], [1], [1]],
        _row=[0, 1, 2, 3, 4, 5],
    )
    ids = etl.content_ids(base).to_pylist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 5
    assert all(len(text) == 24 for text in ids)
    assert etl.content_ids(base.select(["note", "_row", "value", "user_id"])).to_pylist() == ids
    assert etl.content_ids(base.take(pa.array([5, 3]))).to_pylist() == [ids[5], ids[3]]


def test_content_ids_do_not_confuse_columns_values_nulls_or_signs() -> None:
    ids = etl.content_ids(rows(a=["x", "y", None, ""], b=["y", "x", "", None])).to_pylist()
    assert len(set(ids)) == 4
    zeros = pa.table({"n": pa.array([0.0, -0.0, None])})
    found = etl.content_ids(zeros).to_pylist()
    assert found[0] == found[1] != found[2]


def test_content_ids_are_pinned() -> None:
    """A change of this value changes every stored event id: it needs a new snapshot format."""
    assert etl.content_ids(rows(user_id=["u1"], item_id=["i1"], timestamp=[1_700_000_000_000_000], value=[2.0])).to_pylist() == [
        "fbc216dda09232ec2d1e7d7d"
    ]


def test_many_distinct_rows_have_distinct_ids() -> None:
    numbers = np.arange(200_000)
    ids = etl.content_ids(pa.table({"a": numbers // 500, "b": (numbers % 500).astype(np.float64)}))
    assert pc.count_distinct(ids).as_py() == 200_000


def test_given_event_ids_are_kept() -> None:
    table = etl.with_event_ids(rows(event_id=["mine", None], user_id=["u", "u"]))
    assert table["event_id"][0].as_py() == "mine"
    assert len(table["event_id"][1].as_py()) == 24


def test_the_first_of_each_id_is_by_file_and_row_whatever_the_order() -> None:
    table = rows(event_id=["a", "b", "a", "a"], _file=["f2", "f1", "f1", "f1"], _row=[0, 5, 9, 3])
    assert etl.first_of_each(table).tolist() == [False, True, False, True]
    assert etl.numbered(table)["event_id"].to_pylist() == ["a-2", "b", "a-1", "a"]


def test_sessions_break_at_gaps_and_users_and_keep_given_ids() -> None:
    table = rows(
        user_id=["u", "u", "v", "u", "u", "u"],
        timestamp=[0, 30 * MINUTE, 10 * MINUTE, 61 * MINUTE, 5 * MINUTE, 62 * MINUTE],
        session_id=[None, None, None, None, "own", None],
    )
    session = etl.sessionise(table, 30)["session_id"].to_pylist()
    assert session[4] == "own"
    assert session[0] == session[1]
    assert session[3] == session[5]
    assert len({session[0], session[2], session[3]}) == 3
    shuffled = etl.sessionise(table.take(pa.array([5, 4, 3, 2, 1, 0])), 30)["session_id"].to_pylist()
    assert shuffled == session[::-1]


def test_orders_are_spread_evenly_and_equal_places_stay_equal() -> None:
    table = rows(user_id=["u", "v", "u", "u", "u"], timestamp=[5, 0, 9, 5, -1])
    clock = Clock(unit="order", start="1970-01-01", days=4 / 86_400)  # four seconds
    spread = etl.spread_orders(table, clock)["timestamp"].cast(pa.int64()).to_pylist()
    assert spread == [2_000_000, 2_000_000, 3_000_000, 2_000_000, 1_000_000]


def test_buckets_use_the_keyed_hash_and_split_by_powers_of_two() -> None:
    users = pa.array([f"user-{number % 700}" for number in range(2_000)])
    eight = etl.bucket_of(users, 8)
    assert eight.tolist() == [stable_hash("bucket", text) & 7 for text in users.to_pylist()]
    assert np.array_equal(etl.bucket_of(users, 4), eight & 3)
    assert set(etl.bucket_of(users, 1)) == {0}
    assert np.bincount(etl.bucket_of(pa.array([str(n) for n in range(8_000)]), 8)).min() > 850


@pytest.mark.parametrize(
    ("count", "per", "buckets"), [(0, 10, 1), (10, 10, 1), (11, 10, 2), (20, 10, 2), (21, 10, 4), (541_909, 250_000, 4)]
)
def test_num_buckets(count: int, per: int, buckets: int) -> None:
    assert etl.num_buckets_for(count, per) == buckets


def test_order_is_by_time_then_id() -> None:
    table = rows(event_id=["b", "a", "c"], timestamp=[5, 5, 1])
    assert etl.in_order(table)["event_id"].to_pylist() == ["c", "a", "b"]


def sales() -> pa.Table:
    return rows(
        item_id=["i", "i", "i", "i", "j", "i"],
        event=["purchase", "purchase", "purchase", "purchase", "view", "return"],
        price=[1.0, 2.0, 9.0, 9.5, 3.0, 0.5],
        timestamp=[50, 20, 30, 40, 70, 10],
        about=["RED BAGS ", "RED BAGS", "red bag", "", None, "RED BAGS"],
    )


def test_item_facts_give_the_frequent_title_the_lower_median_price_and_the_first_time() -> None:
    how = ItemsFromEvents(texts={"title": "about"}, category=LastWord(min_items=1))
    table = etl.item_table(etl.item_facts(sales(), how, ("purchase",)), how, None)
    found = table.select(["item_id", "title", "price", "category"]).to_pylist()
    assert found == [
        {"item_id": "i", "title": "RED BAGS", "price": 2.0, "category": "BAG"},
        {"item_id": "j", "title": None, "price": None, "category": None},
    ]
    assert table["created_at"].cast(pa.int64()).to_pylist() == [10, 70]


def test_item_facts_do_not_depend_on_how_events_are_grouped() -> None:
    how = ItemsFromEvents(texts={"title": "about"})
    whole = etl.item_facts(sales(), how, ("purchase",))
    parts = [etl.item_facts(sales().take(pa.array(part)), how, ("purchase",)) for part in ([5, 0], [3], [2, 4, 1])]
    assert etl.merge_facts(parts[::-1]).equals(whole)


def test_facts_fill_only_what_the_catalogue_leaves_empty_and_add_missing_items() -> None:
    how = ItemsFromEvents(texts={"title": "about"})
    catalogue = pa.table(
        {"item_id": ["k", "i"], "title": ["Kept", None], "price": pa.array([None, 7.0], pa.float32()), "colour": ["red", "blue"]}
    )
    table = etl.item_table(etl.item_facts(sales(), how, ("purchase",)), how, catalogue)
    assert table.select(["item_id", "title", "price", "colour"]).to_pylist() == [
        {"item_id": "i", "title": "RED BAGS", "price": 7.0, "colour": "blue"},
        {"item_id": "j", "title": None, "price": None, "colour": None},
        {"item_id": "k", "title": "Kept", "price": None, "colour": "red"},
    ]


def test_last_words() -> None:
    texts = pa.array(["RED MUG", "blue mugs 3", "Glass", "GLASS", "12", None, "lone gas"])
    assert etl.last_words(texts, LastWord(min_items=2)).to_pylist() == ["MUG", "MUG", "GLASS", "GLASS", "OTHER", None, "OTHER"]
