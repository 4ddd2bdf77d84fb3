"""Appending batches in any order, late and with repetitions, gives the tables of one ingestion of everything; so does compacting them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.artifacts import Place
from maple.data.compact import compact
from maple.data.ingest import append_local, ingest_local
from maple.data.layers import id_hashes, merged
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.schema import TIMESTAMP

NOW = 1_800_000_000_000_000
HEAD = "user,item,minute,kind,amount,price,name,visit\n"
DAY = 24 * 60


@dataclass(frozen=True)
class Row:
    """An event as a line of a file."""

    user: str
    item: str
    minute: int
    kind: str
    amount: str
    price: str
    visit: str

    def line(self) -> str:
        stamp = f"2024-01-{1 + self.minute // DAY:02d}T{self.minute % DAY // 60:02d}:{self.minute % 60:02d}:00"
        return f"{self.user},{self.item},{stamp},{self.kind},{self.amount},{self.price},name {self.item},{self.visit}"


ROW = st.builds(
    Row,
    user=st.sampled_from(["u", "v", "w", "x", "é", ""]),
    item=st.sampled_from("abc"),
    minute=st.integers(0, 300),  # sessions are made with a gap of 20
    kind=st.sampled_from(["purchase", "purchase", "view", "return"]),
    amount=st.sampled_from(["1", "2", "-1", ""]),
    price=st.sampled_from(["1", "2.5", ""]),
    visit=st.sampled_from(["", "", "", "given"]),
)

#: Everything that makes a row depend on others: sessions alone; rules about users; returns; identities.
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"behaviour": [{"kind": "rate", "events": 3, "minutes": 2.0}, {"kind": "entropy", "of": "items", "min": 0.3, "at_least": 4}]},
    {"returns": "net"},
    {"returns": "net", "identities": {"path": "identities.csv", "columns": {"device_id": "device", "user_id": "user"}}},
)


def source(extra: dict[str, Any]) -> SourceConfig:
    columns = {
        "user_id": "user", "item_id": "item", "timestamp": "minute", "event": "kind", "value": "amount", "price": "price",
        "session_id": "visit",
    }  # fmt: skip
    events = {
        "path": "events-*.csv", "columns": columns, "keep": {"title": "name"},
        "rules": [{"kind": "range", "column": "value", "min": 0}],
    }  # fmt: skip
    plain = {
        "name": "layers", "events": events, "session_gap_minutes": 20, "max_quarantined_share": 1.0,
        "items_from_events": {"texts": {"title": "title"}, "category": {"last_word_of": "title", "min_items": 1}},
        "items": {"path": "items.csv", "columns": {"item_id": "id", "brand": "brand", "price": "price"}},
        "users": {"path": "users.csv", "columns": {"user_id": "id"}, "keep": ["country"]},
    }  # fmt: skip
    return SourceConfig.parse({**plain, **extra}, "test")


def write(folder: Path, number: int, rows: Sequence[Row]) -> None:
    (folder / f"events-{number:02d}.csv").write_text(HEAD + "".join(row.line() + "\n" for row in rows))


def sides(folder: Path, edges: Sequence[tuple[str, str]], step: int = 9) -> None:
    """The item table has a row more with every step, and rows that leave after the first, one of them an item with events."""
    listed = ["c", "x", "a"] if step == 0 else list("abc"[: 1 + step])
    items = "".join(f"{item},brand {item},{'' if item == 'b' else 3}\n" for item in listed)
    (folder / "items.csv").write_text("id,brand,price\n" + items)
    (folder / "users.csv").write_text("id,country\n" + "".join(f"{user},NL\n" for user in ("uy" if step == 0 else "uvw"[: 1 + step])))
    (folder / "identities.csv").write_text("device,user\n" + "".join(f"{device},{user}\n" for device, user in edges))


def tables(snapshot: Snapshot) -> list[Any]:
    """All that readers see, in their order."""
    users = snapshot.users()
    buckets = [snapshot.events([bucket]).to_pylist() for bucket in range(snapshot.num_buckets)]
    order = sorted(name for name in snapshot.events().column_names)
    flat = sorted(tuple(str(row.get(name)) for name in order) for bucket in buckets for row in bucket)
    for bucket in buckets:
        keys = [(row["timestamp"], row["event_id"]) for row in bucket]
        assert keys == sorted(keys)
    return [order, flat, snapshot.items().to_pylist(), None if users is None else users.to_pylist(), snapshot.num_events]


@settings(max_examples=8, deadline=None)
@given(
    batches=st.lists(st.lists(ROW, max_size=12), min_size=2, max_size=4),
    again=st.integers(0, 3),
    extra=st.sampled_from(EXTRAS),
    edges=st.lists(st.tuples(st.sampled_from("wxé"), st.sampled_from("uv")), max_size=3),
    rows_per_bucket=st.sampled_from([4, 100]),
)
def test_appending_gives_what_one_ingestion_of_everything_gives(
    batches: list[list[Row]], again: int, extra: dict[str, Any], edges: list[tuple[str, str]], rows_per_bucket: int
) -> None:
    good = [
        Row("z", "abc"[number % 3], 60 * number, "view", "1", "1", "") for number in range(len(batches))
    ]  # a batch without a clean row is refused
    batches = [[*rows, good[number]] for number, rows in enumerate(batches)]
    batches = [*batches, batches[again % len(batches)]]  # one comes a second time, in another file
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides(folder, edges)
        for number, rows in enumerate(batches):
            write(folder, number, rows)
        config, root = source(extra), Place.at(folder)
        whole = ingest_local(config, root, root / "whole", rows_per_bucket=rows_per_bucket, now=NOW)
        for path in folder.glob("events-*.csv"):
            path.unlink()
        last = len(batches) - 1
        for number, rows in enumerate(batches):
            write(folder, number, rows)
            sides(folder, edges[: 1 + number] if number < last else edges, number)
            if number == 0:
                grown = ingest_local(config, root, root / "grown", rows_per_bucket=rows_per_bucket, now=NOW)
            else:
                grown = append_local(config, root, root / "grown", now=NOW)
        assert tables(grown) == tables(whole)
        assert tables(Snapshot.open(root / "grown")) == tables(whole)
        assert append_local(config, root, root / "grown", now=NOW).name == grown.name  # nothing is new
        base = compact(root / "grown")
        assert (base.parent, base.digest) == (None, grown.digest)
        assert tables(base) == tables(whole)
        assert sorted(map(str, base.quarantine().to_pylist())) == sorted(map(str, grown.quarantine().to_pylist()))
        write(folder, 90, [Row("u", "c", 290, "view", "1", "1", ""), Row("u", "c", 5, "purchase", "1", "1", "")])
        assert tables(append_local(config, root, root / "grown", now=NOW)) == tables(_whole(config, root, rows_per_bucket))


def _whole(config: SourceConfig, root: Place, rows_per_bucket: int) -> Snapshot:
    return ingest_local(config, root, root / "again", rows_per_bucket=rows_per_bucket, now=NOW)


TIMES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(TIMES, min_size=1, max_size=4))
def test_sorted_parts_are_merged_by_time_and_then_by_id(parts: list[list[tuple[int, int]]]) -> None:
    def table(rows: list[tuple[int, int]]) -> pa.Table:
        stamps = pa.array([time for time, _ in rows], pa.int64()).cast(TIMESTAMP)
        return pa.table({"timestamp": stamps, "event_id": pa.array([str(number) for _, number in rows], pa.string())})

    found = merged([table(sorted(part)) for part in parts])
    expected = table(sorted(row for part in parts for row in part))
    assert found.to_pylist() == expected.to_pylist()


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=20), max_size=20), cut=st.integers(0, 5))
def test_equal_ids_have_equal_hashes_wherever_they_lie(texts: list[str], cut: int) -> None:
    whole = id_hashes(pa.array(texts, pa.string()))
    assert len(set(whole.tolist())) == len(set(texts))
    assert id_hashes(pa.array(["x", *texts], pa.string()).slice(1)).tolist() == whole.tolist()
    assert [int(id_hashes(pa.array([text]))[0]) for text in texts[cut:]] == whole[cut:].tolist()
