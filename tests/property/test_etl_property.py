"""Netting and k-cores against slow references: quantities are conserved, and the order of rows says nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.data import etl
from maple.data.dataset import Dataset
from maple.data.kcore import KCore, k_core
from maple.errors import DataError
from maple.schema import EVENT_CODES, TIMESTAMP

DAY = 86_400_000_000
Row = tuple[str, str, str, int, float | None]
ROWS = st.lists(
    st.tuples(
        st.sampled_from("uv"), st.sampled_from("ab"), st.sampled_from(["purchase", "purchase", "return", "view"]), st.integers(0, 6),
        st.sampled_from([1.0, 2.0, 5.0, None, 0.0, -1.0]),
    ),
    max_size=14,
)  # fmt: skip


def table(rows: list[Row]) -> pa.Table:
    users, items, kinds, _, values = ([row[place] for row in rows] for place in range(5))
    return pa.table(
        {
            "event_id": [f"e{number:02d}" for number in range(len(rows))],
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "event": pa.array(kinds, pa.string()),
            "timestamp": pa.array([row[3] * DAY for row in rows], TIMESTAMP),
            "value": pa.array(values, pa.float32()),
        }
    )


def slow(rows: list[Row], days: float | None) -> dict[str, float]:
    """What is left of each row, unit by unit: every returned unit takes the latest unit bought by then."""
    left = {f"e{n:02d}": 1.0 if row[4] is None else row[4] for n, row in enumerate(rows)}
    order = sorted(range(len(rows)), key=lambda n: (rows[n][3], rows[n][2] == "return", n))
    for n in order:
        user, item, kind, day, _ = rows[n]
        while kind == "return" and left[f"e{n:02d}"] > 0:
            before = []
            for m in order:
                near = rows[m][3] <= day and (days is None or day - rows[m][3] <= days)
                if rows[m][:3] == (user, item, "purchase") and near and left[f"e{m:02d}"] > 0:
                    before.append(m)
            if not before:
                break
            left[f"e{n:02d}"] -= 1
            left[f"e{before[-1]:02d}"] -= 1
    return left


@settings(max_examples=80)
@given(rows=ROWS, seed=st.integers(0, 99), days=st.sampled_from([None, 2]))
def test_netting_equals_unit_by_unit_returns_and_conserves(rows: list[Row], seed: int, days: float | None) -> None:
    whole = table(rows)
    kept, netted = etl.net_returns(whole, days)
    left = slow(rows, days)
    before = dict(zip(whole["event_id"].to_pylist(), whole["value"].to_pylist(), strict=True))
    gone = set(netted["event_id"].to_pylist())
    for n, (_, _, kind, _, value) in enumerate(rows):
        name = f"e{n:02d}"
        assert (name in gone) == (kind in ("purchase", "return") and (value is None or value > 0) and left[name] == 0)
    for row in kept.to_pylist():
        given = before[row["event_id"]]
        assert row["value"] == (given if left[row["event_id"]] == (1.0 if given is None else given) else left[row["event_id"]])
    assert {row["event_id"]: row["value"] for row in netted.to_pylist()} == {name: before[name] for name in gone}  # as they came

    def net(rows_: pa.Table) -> float:
        signs = {"purchase": 1, "return": -1}
        return sum(signs.get(r["event"], 0) * max(1.0 if r["value"] is None else r["value"], 0) for r in rows_.to_pylist())

    assert net(kept) == net(whole)  # bought less returned
    order = np.random.default_rng(seed).permutation(len(rows))
    again, _ = etl.net_returns(whole.take(pa.array(order)), days)
    assert again.sort_by("event_id").equals(kept.sort_by("event_id"))
    once_more, nothing = etl.net_returns(kept, days)
    assert (once_more.equals(kept), nothing.num_rows) == (True, 0)


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from(["purchase", "view", "return"])), min_size=1, max_size=40
    ),
    min_user=st.integers(1, 3),
    min_item=st.integers(1, 3),
)
def test_a_k_core_equals_dropping_one_at_a_time(rows: list[tuple[int, int, str]], min_user: int, min_item: int) -> None:
    events = table([(f"u{user}", f"i{item}", kind, n, 1.0) for n, (user, item, kind) in enumerate(rows)])
    events = events.append_column("price", pa.nulls(len(rows), pa.float32()))
    data = Dataset.from_tables(events, signals={"purchase": 1.0, "view": 0.1})
    pairs = {(user, item) for user, item, kind in rows if kind != "return"}
    while True:
        bad = [("u", u) for u, _ in pairs if len({i for x, i in pairs if x == u}) < min_user]
        bad += [("i", i) for _, i in pairs if len({u for u, x in pairs if x == i}) < min_item]
        if not bad:
            break
        side, name = bad[0]
        pairs = {pair for pair in pairs if pair["ui".index(side)] != name}
    if not pairs:
        with pytest.raises(DataError, match="the k-core is empty"):
            k_core(data, min_user, min_item)
        return
    core = k_core(data, min_user, min_item)
    if (min_user, min_item) != (1, 1):  # which stands for "all"
        assert len(KCore(min_user=min_user, min_item=min_item).of(data).log) == len(core.log)
    expected = [(f"u{u}", f"i{i}", kind) for u, i, kind in rows if u in {p[0] for p in pairs} and i in {p[1] for p in pairs}]
    kinds = {code: name for name, code in EVENT_CODES.items()}
    found = [
        (data.users.decode(core.log.user[n : n + 1])[0], data.items.decode(core.log.item[n : n + 1])[0], kinds[int(core.log.event[n])])
        for n in range(len(core.log))
    ]
    assert sorted(found) == sorted(expected)
    assert len(core.items) == len(data.items)  # codes stay
