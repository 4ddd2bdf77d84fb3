"""Properties of cleaning and ETL: nothing is lost, order and grouping never matter."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from maple.artifacts import Place
from maple.data import etl
from maple.data.ingest import ingest_local
from maple.data.sources import SourceConfig
from maple.data.validate import Rule, complete, validate_events
from maple.errors import DataError
from maple.schema import TIMESTAMP, check_id

IDS = st.one_of(
    st.none(), st.sampled_from(["", " ", "a", "b", "é\n", "x" * 300]), st.text(max_size=5).filter(lambda text: text.isprintable())
)
EVENT = st.sampled_from(["purchase", "view", "hover", "return", None])
NUMBER = st.one_of(st.none(), st.sampled_from([0.0, -1.0, 1.0, 2.5]))
ROW = st.tuples(IDS, IDS, EVENT, st.one_of(st.none(), st.integers(0, 50)), NUMBER, NUMBER, st.sampled_from(["C1", "1", None]))
RULES = [
    {"kind": "required", "column": "user_id"},
    {"kind": "pattern", "column": "session_id", "matches": "^C", "action": "convert", "to": "return"},
    {"kind": "range", "column": "price", "min": 0, "exclusive": True},
    {"kind": "range", "column": "value", "min": 0, "exclusive": True, "events": ["purchase"]},
    {"kind": "range", "column": "value", "max": 2, "action": "note", "name": "many"},
    {"kind": "pattern", "column": "item_id", "lacks": "a"},
]
COLUMNS = (
    ("user_id", pa.string()), ("item_id", pa.string()), ("event", pa.string()), ("timestamp", TIMESTAMP), ("value", pa.float32()),
    ("price", pa.float32()), ("session_id", pa.string()),
)  # fmt: skip


def table(rows: list[tuple[object, ...]]) -> pa.Table:
    return pa.table({name: pa.array([row[place] for row in rows], kind) for place, (name, kind) in enumerate(COLUMNS)})


@given(rows=st.lists(ROW, max_size=30), chosen=st.lists(st.sampled_from(RULES), unique_by=lambda rule: str(rule), max_size=6))
def test_rows_in_are_clean_plus_quarantined(rows: list[tuple[object, ...]], chosen: list[dict[str, object]]) -> None:
    rules = complete(TypeAdapter(list[Rule]).validate_python(chosen), ("user_id", "item_id"), events=True)
    whole = table(rows).append_column("n", pa.array(range(len(rows)), pa.int64()))
    found = validate_events(whole, rules, now=100)
    assert sorted(found.clean["n"].to_pylist() + found.quarantined["n"].to_pylist()) == list(range(len(rows)))
    assert found.quarantined.drop_columns(["reason"]).to_pylist() == whole.take(found.quarantined["n"]).to_pylist()  # as they came
    assert sum(found.reasons.values()) == found.quarantined.num_rows
    assert all(found.counts[reason] >= count for reason, count in found.reasons.items())
    for row in found.clean.to_pylist():
        check_id(row["user_id"])
        check_id(row["item_id"])
        assert row["timestamp"] is not None
        assert row["event"] in ("purchase", "view", "return")
    again = validate_events(found.clean, rules, now=100)  # what is clean stays clean
    assert again.clean.equals(found.clean)


@given(rows=st.lists(ROW, min_size=1, max_size=20), seed=st.integers(0, 1000), cut=st.integers(0, 20))
def test_verdicts_and_ids_belong_to_rows_not_to_batches(rows: list[tuple[object, ...]], seed: int, cut: int) -> None:
    rules = complete(TypeAdapter(list[Rule]).validate_python(RULES), ("user_id", "item_id"), events=True)
    whole = table(rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    ids = np.array(etl.content_ids(whole).to_pylist())
    assert etl.content_ids(whole.take(pa.array(order))).to_pylist() == ids[order].tolist()
    joined = [validate_events(part, rules, now=100) for part in (whole.slice(0, cut), whole.slice(cut))]
    one = validate_events(whole, rules, now=100)
    assert pa.concat_tables([part.clean for part in joined]).to_pylist() == one.clean.to_pylist()
    assert {name: sum(part.counts[name] for part in joined) for name in one.counts} == one.counts
    distinct = len({tuple(row) for row in rows})
    assert len(set(ids)) == distinct


@given(
    stamps=st.lists(st.tuples(st.sampled_from("uvw"), st.integers(0, 300)), min_size=1, max_size=40),
    gap=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_sessions_equal_a_slow_reference_in_any_order(stamps: list[tuple[str, int]], gap: int, seed: int) -> None:
    minute = 60_000_000
    rows = pa.table(
        {
            "user_id": [user for user, _ in stamps],
            "timestamp": pa.array([minute * at for _, at in stamps], TIMESTAMP),
            "session_id": pa.nulls(len(stamps), pa.string()),
        }
    )
    found = etl.sessionise(rows, gap)["session_id"].to_pylist()
    expected: dict[int, tuple[str, int]] = {}
    for user in "uvw":
        start = last = -(10**9)
        for place in sorted((place for place, stamp in enumerate(stamps) if stamp[0] == user), key=lambda place: stamps[place][1]):
            start = stamps[place][1] if stamps[place][1] - last > gap else start
            last = stamps[place][1]
            expected[place] = (user, start)
    assert [[found[a] == found[b] for b in expected] for a in expected] == [
        [expected[a] == expected[b] for b in expected] for a in expected
    ]
    order = np.random.default_rng(seed).permutation(len(stamps))
    assert etl.sessionise(rows.take(pa.array(order)), gap)["session_id"].to_pylist() == [found[place] for place in order]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["u", "v", "w", "", "é"]), st.sampled_from("abc"), st.integers(1, 28), st.integers(-1, 2)),
        min_size=1,
        max_size=40,
    ),
    seed=st.integers(0, 99),
)
def test_a_snapshot_does_not_depend_on_the_order_of_a_files_rows(rows: list[tuple[str, str, int, int]], seed: int) -> None:
    """Shuffled input gives the same clean events, and the same report but for which of equal rows is named the duplicate."""
    config = SourceConfig.parse(
        {
            "events": {
                "path": "e.csv", "constants": {"event": "purchase"},
                "columns": {"user_id": "u", "item_id": "i", "timestamp": "t", "value": "q"},
                "rules": [{"kind": "range", "column": "value", "min": 0, "exclusive": True}],
            },
            "max_quarantined_share": 1.0,
        },
        "test",
    )  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(rows))
    results = []
    for arranged in (rows, [rows[place] for place in order]):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "e.csv").write_text("u,i,t,q\n" + "".join(f"{u},{i},2024-01-{day:02d},{q}\n" for u, i, day, q in arranged))
            try:
                snapshot = ingest_local(config, Place.at(folder), Place.at(folder) / "home", rows_per_bucket=8, now=1_800_000_000_000_000)
            except DataError:
                results.append(None)
                continue
            assert snapshot.num_events + snapshot.quarantine().num_rows == len(rows)
            results.append((snapshot.events().to_pylist(), snapshot.items().to_pylist(), snapshot.report().plain()))
    assert results[0] == results[1]
