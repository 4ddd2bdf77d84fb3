"""Ingestion over Ray gives, digest for digest, what one process gives; and its errors are Maple's own."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.simulate import simulate, write
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig, TableSource
from maple.errors import ConfigError, DataError

pytestmark = pytest.mark.ray
NOW = 1_800_000_000_000_000


def split_events(folder: Path, groups: int) -> None:
    """The same rows in three files of many row groups, so that several tasks read them."""
    whole = pq.read_table(folder / "events.parquet")
    (folder / "events.parquet").unlink()
    third = whole.num_rows // 3
    for number in range(3):
        part = whole.slice(number * third, third if number < 2 else None)
        pq.write_table(part, folder / f"events-{number}.parquet", row_group_size=max(1, part.num_rows // groups))


def test_the_same_digest_under_any_parallelism(ray_local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maple.data.ingest_ray import ingest

    folder = write(simulate(5, num_users=200, num_items=120, days=20), tmp_path / "shop")
    split_events(folder, 4)
    plain, root = load_source(str(folder))[0].plain(), Place.at(folder)
    plain["events"]["path"] = "events-*.parquet"
    source = SourceConfig.parse(plain, "test")
    told: list[str] = []
    header = pq.read_table(folder / "events-0.parquet").slice(0, 0)
    pq.write_table(header, folder / "events-3.parquet")  # a file without rows beside the others changes nothing
    one = ingest(source, root, Place.at(tmp_path / "one"), rows_per_bucket=2_000, progress=told.append, now=NOW)
    monkeypatch.setattr("maple.data.tables.FRAGMENT_ROWS", 2_000)  # many fragments instead of one a file
    two = ingest(source, root, Place.at(tmp_path / "two"), rows_per_bucket=2_000, now=NOW)
    local = ingest_local(source, root, Place.at(tmp_path / "three"), rows_per_bucket=2_000, now=NOW)
    assert one.num_buckets >= 4
    assert one.digest == two.digest == local.digest
    assert Snapshot.open(Place.at(tmp_path / "one")).name == one.name
    assert one.report().events.rows_in == one.num_events + one.quarantine().num_rows
    assert any("rows in =" in line for line in told)
    assert pc.count_distinct(one.events()["event_id"]).as_py() == one.num_events


def events(**more: object) -> SourceConfig:
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t"}
    table = TableSource.parse({"path": "e.csv", "columns": columns, "constants": {"event": "purchase"}, **more}, "test")
    return SourceConfig(events=(table,))


@pytest.mark.parametrize(
    ("content", "more", "error", "match"),
    [
        (
            b"u,i,t\na,b,2020-01-01\n\xff\xfe,b,2020-01-02\n",
            {},
            DataError,
            r"^e\.csv is not utf-8 text .*declare its `encoding:`, for example latin-1$",
        ),
        (b"u,i,t\na,b,never\n", {}, DataError, r"^source 'custom': .*no events are left after cleaning 1 rows \(unreadable: 1\)"),
        (
            b"u,i,t\na,b,2020-01-01\n",
            {"rules": [{"kind": "range", "column": "item_id", "min": 0}]},
            ConfigError,
            r"^rule 'range:item_id' cannot judge",
        ),
        (b"u,i\na,b\n", {}, DataError, r"^e\.csv: unknown column 't'"),
        (b"u,i,t\n", {}, DataError, r"^source 'custom': .*no events are left after cleaning 0 rows"),
        (b"", {}, DataError, "is empty"),
    ],
)
def test_errors_in_tasks_reach_the_caller_as_maples_own_and_nothing_is_published(
    ray_local: str, tmp_path: Path, content: bytes, more: dict[str, object], error: type[Exception], match: str
) -> None:
    from maple.data.ingest_ray import ingest

    (tmp_path / "e.csv").write_bytes(content)
    with pytest.raises(error, match=match) as caught:
        ingest(events(**more), Place.at(tmp_path), Place.at(tmp_path / "home"))
    assert "UDF" not in str(caught.value)
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_online_retail_over_ray_equals_the_local_ingestion(ray_local: str, data_dir: Path, tmp_path: Path) -> None:
    from maple.data.ingest_ray import ingest

    source, root = load_source(str(data_dir / "online-retail"))
    snapshot = ingest(source, root, Place.at(tmp_path / "ray"))
    assert snapshot.digest == ingest_local(source, root, Place.at(tmp_path / "local")).digest
    table: pa.Table = snapshot.events()
    assert (table.num_rows, snapshot.report().events.rows_quarantined) == (399_656, 142_253)
