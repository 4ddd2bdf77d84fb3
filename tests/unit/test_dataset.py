"""Codes, histories and matrices of the in-memory data set, against slow references."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple.data.dataset import Dataset, Histories, Vocab
from maple.errors import DataError
from maple.schema import EVENTS, TIMESTAMP

EVENT = st.tuples(st.sampled_from("abcd"), st.sampled_from("wxyz"), st.sampled_from(["view", "purchase", "return"]), st.integers(0, 6))


def events_table(rows: list[tuple[str, str, str, int]]) -> pa.Table:
    count = len(rows)
    columns = {
        "event_id": [f"e{n:03d}" for n in range(count)], "user_id": [r[0] for r in rows], "item_id": [r[1] for r in rows],
        "event": [r[2] for r in rows], "timestamp": pa.array([r[3] for r in rows], pa.int64()).cast(TIMESTAMP),
    }  # fmt: skip
    for field in EVENTS:
        if field.name not in columns:
            columns[field.name] = pa.nulls(count, field.type)
    return pa.table(columns, schema=EVENTS)


def test_no_events_is_an_error() -> None:
    with pytest.raises(DataError, match="no events"):
        Dataset.from_tables(events_table([]))


def test_vocab_does_not_depend_on_order_and_unknown_is_minus_one() -> None:
    assert Vocab.of(["b", "a", "b"]).ids.to_pylist() == Vocab.of(["a", "b"]).ids.to_pylist() == ["a", "b"]
    vocab = Vocab.of(["é", "a", "日本"])
    assert vocab.encode(["a", "nobody", "é"]).tolist() == vocab.encode(pa.array(["a", "nobody", "é"])).tolist()
    assert vocab.encode(["nobody"]).tolist() == [-1]
    assert vocab.decode(vocab.encode(["日本", "a"])) == ["日本", "a"]


@given(
    st.lists(EVENT, min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 8)), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_histories_are_the_last_events_strictly_before(
    rows: list[tuple[str, str, str, int]], asked: list[tuple[int, int]], limit: int
) -> None:
    data = Dataset.from_tables(events_table(rows))
    users = np.array([min(user, len(data.users) - 1) for user, _ in asked], dtype=np.int32)
    times = np.array([time for _, time in asked], dtype=np.int64)
    found = data.histories(users, times, limit)
    ordered = sorted(range(len(rows)), key=lambda n: (rows[n][3], n))
    for row, (user, time) in enumerate(zip(users, times, strict=True)):
        name = data.users.decode(np.array([user]))[0] if user >= 0 else None
        expected = [(rows[n][1], rows[n][3]) for n in ordered if rows[n][0] == name and rows[n][3] < time][-limit:]
        start, stop = found.offsets[row], found.offsets[row + 1]
        assert list(zip(data.items.decode(found.items[start:stop]), found.times[start:stop].tolist(), strict=True)) == expected


@given(st.lists(EVENT, min_size=1, max_size=30))
def test_matrix_sums_signals(rows: list[tuple[str, str, str, int]]) -> None:
    data = Dataset.from_tables(events_table(rows), signals={"view": 0.5, "purchase": 2.0})
    expected = np.zeros((len(data.users), len(data.items)), np.float32)
    for user, item, event, _ in rows:
        expected[data.users.encode([user])[0], data.items.encode([item])[0]] += {"view": 0.5, "purchase": 2.0, "return": 0.0}[event]
    assert np.allclose(data.matrix().toarray(), expected)
    assert np.array_equal(data.matrix(binary=True).toarray(), (expected > 0).astype(np.float32))


def test_unknown_items_in_a_history_are_ignored() -> None:
    signals = np.ones(10, np.float32)
    matrix = Histories.of([([-1, 2, 2], [0, 0, 0], [1, 2, 3]), ([], [], [])]).matrix(3, signals)
    assert matrix.toarray().tolist() == [[0, 0, 2], [0, 0, 0]]


def test_catalogue_rows_follow_the_codes() -> None:
    items = pa.table({"item_id": ["z", "w"], "title": ["last", "first"]})
    data = Dataset.from_tables(events_table([("a", "x", "purchase", 1)]), items)
    assert data.items.ids.to_pylist() == ["w", "x", "z"]
    assert data.item_table["title"].to_pylist() == ["first", None, "last"]
