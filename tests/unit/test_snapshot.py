"""Snapshots: the whole ingestion in one process, what it writes, its digest, and what happens when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place
from maple.data.etl import bucket_of
from maple.data.ingest import ingest_local
from maple.data.layers import events_file
from maple.data.presets import load_source
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.errors import ArtifactError, ConfigError, DataError

NOW = 1_800_000_000_000_000
HEAD = "who,what,when,kind,amount,price,note\n"
LINES = [
    "u1,a,2024-01-01T10:00:00,buy,1,2.5,first",
    "u1,a,2024-01-01T10:00:00,buy,1,2.5,first",  # equal in every column: a duplicate
    "u1,a,2024-01-01T10:00:00,buy,2,2.5,first",  # another quantity: an event of its own
    "u2,b,2024-01-02T10:00:00,look,,,",
    ",b,2024-01-02T10:00:00,buy,1,1,",
    "u3,c,yesterday,buy,1,1,",
    "u3,c,2024-01-03,buy,1,-4,",
    "u3,c,2124-01-03,buy,1,4,",
    "u3,c,2024-01-03,steal,1,4,",
    "u4,d,2024-01-04,buy,1,4,",
]


def source(**more: Any) -> SourceConfig:
    plain = {
        "name": "small",
        "events": {
            "path": "*.csv",
            "columns": {"user_id": "who", "item_id": "what", "timestamp": "when", "event": "kind", "value": "amount", "price": "price"},
            "values": {"event": {"buy": "purchase", "look": "view"}},
            "keep": ["note"],
            "rules": [{"name": "negative_price", "kind": "range", "column": "price", "min": 0}],
        },
    }
    return SourceConfig.parse({**plain, **more}, "test")


def shop(folder: Path, *parts: list[str]) -> Place:
    for number, part in enumerate(parts or (LINES,)):
        (folder / f"{number}.csv").write_text(HEAD + "\n".join(part) + "\n")
    return Place.at(folder)


def home(folder: Path) -> Place:
    return Place.at(folder / "home")


def test_rows_in_are_clean_plus_quarantined_and_every_reason_is_there(tmp_path: Path) -> None:
    snapshot = ingest_local(source(max_quarantined_share=0.7), shop(tmp_path), home(tmp_path), now=NOW)
    assert snapshot.report().events.reasons == {
        "duplicate": 1, "future:timestamp": 1, "known_event:event": 1, "negative_price": 1, "required:user_id": 1, "unreadable": 1,
    }  # fmt: skip
    assert snapshot.report().events.rows_in == 10 == snapshot.num_events + snapshot.quarantine().num_rows
    aside = {row["row"]: row for row in snapshot.quarantine().to_pylist()}
    assert {number: row["reason"] for number, row in aside.items()} == {
        1: "duplicate", 4: "required:user_id", 5: "unreadable", 6: "negative_price", 7: "future:timestamp", 8: "known_event:event",
    }  # fmt: skip
    assert aside[5]["unreadable"] == "timestamp=yesterday"
    assert aside[6]["price"] == -4.0
    assert {row["file"] for row in aside.values()} == {"0.csv"}
    table = snapshot.events().select(["user_id", "item_id", "event", "value", "note"])
    assert table.sort_by([("user_id", "ascending"), ("value", "ascending")]).to_pylist() == [
        {"user_id": "u1", "item_id": "a", "event": "purchase", "value": 1.0, "note": "first"},
        {"user_id": "u1", "item_id": "a", "event": "purchase", "value": 2.0, "note": "first"},
        {"user_id": "u2", "item_id": "b", "event": "view", "value": None, "note": None},
        {"user_id": "u4", "item_id": "d", "event": "purchase", "value": 1.0, "note": None},
    ]  # fmt: skip


def test_equal_events_are_kept_where_the_source_says_so(tmp_path: Path) -> None:
    snapshot = ingest_local(source(duplicates="keep", max_quarantined_share=0.7), shop(tmp_path), home(tmp_path), now=NOW)
    ids = snapshot.events()["event_id"].to_pylist()
    assert len(ids) == 5 == len(set(ids))
    assert sum(text.endswith("-1") for text in ids) == 1


def test_the_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    lines = [f"u{n % 17},i{n % 13},2024-01-{1 + n % 28:02d}T10:00:00,buy,{n},1,x" for n in range(400)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    root = shop(tmp_path / "a", lines)
    one = ingest_local(source(), root, home(tmp_path / "a"), rows_per_bucket=60, now=NOW)
    two = ingest_local(source(), root, home(tmp_path / "b"), rows_per_bucket=60, now=NOW + 1)
    assert one.digest == two.digest
    assert one.name != two.name
    changed = ingest_local(
        source(), shop(tmp_path / "b", [*lines[:-1], lines[-1] + "y"]), home(tmp_path / "b"), rows_per_bucket=60, now=NOW
    )
    assert changed.digest != one.digest


def test_events_lie_in_the_bucket_of_their_user_sorted_by_time_and_id(tmp_path: Path) -> None:
    lines = [f"u{n % 37},i{n % 13},2024-01-{1 + (n * 7) % 28:02d}T10:00:00,buy,{n},1,x" for n in range(500)]
    snapshot = ingest_local(source(), shop(tmp_path, lines), home(tmp_path), rows_per_bucket=100, now=NOW)
    assert snapshot.num_buckets == 8
    for bucket in range(8):
        table = snapshot.events([bucket])
        assert set(bucket_of(table["user_id"], 8)) <= {bucket}
        keys = list(zip(table["timestamp"].to_pylist(), table["event_id"].to_pylist(), strict=True))
        assert keys == sorted(keys)
    assert sum(snapshot.events([bucket]).num_rows for bucket in range(8)) == 500 == snapshot.num_events
    assert snapshot.events(columns=["item_id"]).column_names == ["item_id"]
    with pytest.raises(ArtifactError, match=r"unknown column 'item'\. Did you mean 'item_id'"):
        snapshot.events(columns=["item"])


def test_a_snapshot_opens_by_name_or_as_the_latest_and_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="maple ingest"):
        Snapshot.open(home(tmp_path))
    snapshot = ingest_local(source(max_quarantined_share=0.7), shop(tmp_path), home(tmp_path), now=NOW)
    assert Snapshot.open(home(tmp_path)).digest == snapshot.digest == Snapshot.open(home(tmp_path), snapshot.name).digest
    for name in ("nothing", "../x", "", ".hidden"):
        with pytest.raises(ArtifactError, match="unknown snapshot"):
            Snapshot.open(home(tmp_path), name)
    data = snapshot.dataset()
    assert len(data.log) == 4
    assert data.targets == (3,)


def test_a_flipped_bit_is_found_before_the_rows_are_used(tmp_path: Path) -> None:
    snapshot = ingest_local(source(max_quarantined_share=0.7), shop(tmp_path), home(tmp_path), now=NOW)
    path = Path((snapshot.folder / events_file(0)).path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="SHA-256"):
        snapshot.events()


@pytest.mark.parametrize(
    ("lines", "more", "error", "match"),
    [
        (["u,i,never,buy,1,1,"] * 3, {}, DataError, r"no events are left.*unreadable: 3"),
        ([], {}, DataError, "no events are left"),
        (LINES, {}, DataError, "would be quarantined"),
    ],
)
def test_nothing_is_left_behind_when_the_data_is_refused(
    tmp_path: Path, lines: list[str], more: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ingest_local(source(**more), shop(tmp_path, lines), home(tmp_path), now=NOW)
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert left == []


def test_a_rule_about_a_column_that_is_not_there_fails_before_anything_is_written(tmp_path: Path) -> None:
    plain = source().plain()
    plain["events"]["rules"] = [{"kind": "required", "column": "colour"}]
    with pytest.raises(ConfigError, match="'colour', which events do not have"):
        ingest_local(SourceConfig.parse(plain, "test"), shop(tmp_path), home(tmp_path))
    assert not (tmp_path / "home").exists()


def test_item_and_user_tables_are_validated_too(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"id": name, "t": name.upper()}) + "\n" for name in ("a", "b", "a", "")))
    (tmp_path / "users.jsonl").write_text('{"id": "u1", "age": 30}\n{"id": "u1", "age": 31}\n')
    config = source(
        max_quarantined_share=0.7,
        items={"path": "items.jsonl", "columns": {"item_id": "id", "title": "t"}},
        users={"path": "users.jsonl", "columns": {"user_id": "id"}, "keep": ["age"], "types": {"age": "int"}},
    )
    snapshot = ingest_local(config, shop(tmp_path), home(tmp_path), now=NOW)
    items, report = snapshot.items(), snapshot.report()
    assert items.select(["item_id", "title"]).to_pylist()[:3] == [
        {"item_id": "a", "title": "A"}, {"item_id": "b", "title": "B"}, {"item_id": "d", "title": None},
    ]  # fmt: skip
    users = snapshot.users()
    assert users is not None
    assert users.to_pylist() == [{"user_id": "u1", "age": 30}]
    assert report.item_table is not None
    assert report.item_table.rows_in == 4
    assert report.item_table.reasons == {"repeated:item_id": 1, "required:item_id": 1}
    assert report.user_table is not None
    assert report.user_table.reasons == {"repeated:user_id": 1}


def test_online_retail_is_cleaned_by_the_published_protocol(data_dir: Path, tmp_path: Path) -> None:
    """The counts were taken from the raw file by an independent script; 396,337 is the protocol's 397,884 with the product-code filter."""
    preset, root = load_source(str(data_dir / "online-retail"))
    snapshot = ingest_local(preset, root, Place.at(tmp_path))
    events = snapshot.report().events
    assert events.rows_in == 541_909 == events.rows_clean + events.rows_quarantined
    fired = {name: count for name, count in events.rules.items() if count}
    assert fired == {
        "non_product_code": 2_995, "missing_customer": 135_080, "cancellation": 9_288, "zero_price": 2_517, "negative_quantity": 1_336,
        "duplicate": 5_220,
    }  # fmt: skip
    assert events.reasons == {"non_product_code": 2_995, "missing_customer": 134_005, "zero_price": 33, "duplicate": 5_220}
    table = snapshot.events()
    bought = table.filter(pc.equal(table["event"], "purchase"))
    aside = snapshot.quarantine()
    repeated = aside.filter(pc.and_(pc.equal(aside["reason"], "duplicate"), pc.equal(aside["event"], "purchase")))
    assert bought.num_rows + repeated.num_rows == 396_337
    assert (pc.count_distinct(bought["user_id"]).as_py(), pc.count_distinct(bought["item_id"]).as_py()) == (4_334, 3_659)
    assert events.kinds == {"purchase": 391_150, "return": 8_506}
    assert pc.min(table["value"]).as_py() > 0
    items = snapshot.items()
    assert items["title"].null_count == items["category"].null_count == 0
    unpriced = items.filter(pc.is_null(items["price"]))["item_id"].combine_chunks()
    theirs = table.filter(pc.is_in(table["item_id"], value_set=unpriced))
    assert (len(unpriced), pc.unique(theirs["event"]).to_pylist()) == (17, ["return"])  # sold before the year, only taken back in it
    assert "description" not in table.column_names


def test_each_users_sequence_of_ml_1m_keeps_its_order_and_spans_the_year(data_dir: Path, tmp_path: Path) -> None:
    preset, _ = load_source(str(data_dir / "ml-1m"))
    some = pq.read_table(data_dir / "ml-1m" / "ratings.parquet", filters=[("user", "<=", 50)])
    pq.write_table(some, tmp_path / "ratings.parquet")
    snapshot = ingest_local(preset.with_(items=None, users=None), Place.at(tmp_path), home(tmp_path))
    raw = some.filter(pc.equal(some["user"], 1)).sort_by("seq_pos")
    one = snapshot.events().filter(pc.field("user_id") == "1")
    assert one["item_id"].to_pylist() == [str(item) for item in raw["item"].to_pylist()]
    gaps = np.diff(np.asarray(one["timestamp"].cast(pa.int64())))
    assert gaps.max() - gaps.min() <= 1
    assert abs(gaps[0] * (len(gaps) + 2) / 86_400e6 - 365) < 0.01
