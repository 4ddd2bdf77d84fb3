"""Small appends that are as they should be go through: one table of several, a return that nets out, a late row, a bad row among few."""

from __future__ import annotations

from pathlib import Path

import pytest

from maple.artifacts import Place
from maple.data.ingest import append_local, ingest_local
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig

DAY, START = 86_400, 1_700_000_000
ORDER = ("event_id", "user_id", "item_id", "event", "timestamp", "value", "price", "channel")
NOW = 1_800_000_000_000_000
SOURCE = SourceConfig.parse(
    {
        "name": "shop",
        "events": [
            {
                "path": "orders*.csv", "columns": dict(zip(ORDER[:-1], ORDER[:-1], strict=True)),
                "keep": ["channel"], "clock": {"unit": "s"},
            },
            {
                "path": "clicks*.csv", "columns": {name: name for name in ("event_id", "user_id", "item_id", "timestamp")},
                "constants": {"event": "view"}, "clock": {"unit": "s"},
            },
        ],
        "returns": "net",
        "checks": {"time_gap": "error", "volume": "off"},
    },
    "test",
)  # fmt: skip


def write(folder: Path, name: str, head: str, rows: list[str]) -> None:
    (folder / name).write_text("\n".join([head, *rows]) + "\n")


def orders(folder: Path, name: str, rows: list[str]) -> None:
    write(folder, name, ",".join(ORDER), rows)


def clicks(folder: Path, name: str, rows: list[str]) -> None:
    write(folder, name, "event_id,user_id,item_id,timestamp", rows)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    orders(tmp_path, "orders.csv", [f"o{n},u{n % 9},i{n % 11},purchase,{START + n * DAY},2,5,web" for n in range(120)])
    clicks(tmp_path, "clicks.csv", [f"c{n},u{n % 9},i{n % 11},{START + n * DAY // 3}" for n in range(360)])
    ingest_local(SOURCE, Place.at(tmp_path), Place.at(tmp_path / "home"), now=NOW)
    return tmp_path


def grown(shop: Path) -> Snapshot:
    snapshot = append_local(SOURCE, Place.at(shop), Place.at(shop / "home"), now=NOW)
    assert snapshot.parent is not None
    return snapshot


@pytest.mark.parametrize("count", [1, 150])
def test_a_batch_of_clicks_alone(shop: Path, count: int) -> None:
    clicks(shop, "clicks-2.csv", [f"d{n},u1,i{n % 11},{START + 121 * DAY + n}" for n in range(count)])
    assert grown(shop).num_events == 480 + count


def test_a_return_that_nets_out(shop: Path) -> None:
    orders(shop, "orders-2.csv", [f"r1,u2,i8,return,{START + 119 * DAY + 5},2,5,web"])  # of order 119
    snapshot = grown(shop)
    assert (snapshot.num_events, snapshot.report().events.reasons) == (479, {"netted": 1})


def test_bad_rows_among_few(shop: Path) -> None:
    clicks(shop, "clicks-2.csv", [f"d1,u1,i1,{START + 121 * DAY}", f"d2,,i1,{START}", f"d3,u1,,{START}"])
    snapshot = grown(shop)
    assert snapshot.num_events == 481
    assert [(found.check, found.severity) for found in snapshot.report().findings if found.check == "quarantined"] == [
        ("quarantined", "warn")
    ]


def test_a_late_row_among_new_ones(shop: Path) -> None:
    clicks(shop, "clicks-2.csv", [f"d1,u1,i1,{START + 3 * DAY}", f"d2,u1,i1,{START + 121 * DAY}"])
    assert grown(shop).num_events == 482
