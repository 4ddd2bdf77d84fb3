"""``maple users``, ``maple items`` and ``maple events`` on a home with an online store, as somebody types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from shop import HOUR, T0, Happening, snapshot

from maple.artifacts import Place
from maple.cli import cli
from maple.data.ingest import ingest_local
from maple.data.sources import SourceConfig
from maple.data.tombstones import Tombstones
from maple.errors import MapleError
from maple.features.live_items_sqlite import SqliteItems
from maple.features.store_sqlite import SqliteStore
from maple.schema import EVENTS
from maple.serve.people import folds_nothing

HAPPENINGS = [
    Happening("ann", "apple", "purchase", 1, 2.0, 1.5),
    Happening("bob", "cup", "view", HOUR),
    Happening("tablet", "dish", "view", 2 * HOUR),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a snapshot, and an online store with the same events."""
    table = snapshot(tmp_path, HAPPENINGS, 1000).events()
    monkeypatch.setenv("MAPLE_HOME", str(tmp_path / "home"))
    store = SqliteStore(tmp_path / "home" / "online.sqlite", folds_nothing())
    store.backfill(table)
    store.close()
    return tmp_path / "home"


def run(*words: str, given: str | None = None) -> str:
    result = attempt(*words, given=given)
    assert result.exit_code == 0, result.output
    return result.output


def attempt(*words: str, given: str | None = None) -> Result:
    return CliRunner().invoke(cli, [*words], input=given)


def exported(user: str) -> dict[str, Any]:
    return dict(json.loads(run("users", "export", user)))


def test_export_shows_attributes_ids_and_rows(home: Path) -> None:
    run("users", "set", "ann", "age=30", "tags=[tea, cups]", "old=1")
    run("users", "set", "ann", "old=")
    run("users", "merge", "tablet", "ann")
    told = exported("ann")
    assert told["attributes"] == {"age": 30, "tags": ["tea", "cups"]}
    assert told["ids"] == ["ann", "tablet"]
    assert {event["item_id"] for event in told["online_events"]} == {"apple", "dish"}
    assert {event["item_id"] for event in told["snapshot"]["events"]} == {"apple", "dish"}
    run("users", "export", "ann", "-o", str(home / "ann.json"))
    assert json.loads((home / "ann.json").read_text()) == told
    assert "on its own" in run("users", "unmerge", "tablet")
    assert "not an alias" in run("users", "unmerge", "tablet")
    assert exported("ann")["ids"] == ["ann"]


def test_delete_asks_first_and_leaves_nothing(home: Path) -> None:
    run("users", "merge", "tablet", "ann")
    assert attempt("users", "delete", "ann", given="n\n").exit_code != 0
    assert exported("ann")["online_events"]
    said = run("users", "delete", "ann", given="y\n")
    assert "gone: 2 online events, 2 rows of the latest snapshot and 0 attributes of 2 ids" in said
    gone = exported("tablet")
    assert (gone["online_events"], gone["snapshot"]["events"]) == ([], [])
    assert exported("bob")["online_events"]
    assert "gone: 0 online events, 0 rows" in run("users", "delete", "ann", "--yes")


def test_who_is_in_a_snapshot_alone_is_counted(home: Path) -> None:
    store = SqliteStore(home / "online.sqlite", folds_nothing())
    store.delete("bob")
    store.close()
    assert "gone: 0 online events, 1 rows of the latest snapshot" in run("users", "delete", "bob", "--yes")


def test_exported_events_can_be_ingested_and_deleted_users_are_not_among_them(home: Path, tmp_path: Path) -> None:
    store = SqliteStore(home / "online.sqlite", folds_nothing())
    store.append([Happening("bob", "egg", "purchase", 5 * HOUR, 1.0, 2.5, "late").stored(9)])
    store.close()
    Tombstones.add(Place.at(home), "ann")  # by somebody who could not reach the online store
    said = run("events", "export", str(tmp_path / "out" / "online.parquet"))
    assert said.startswith("3 events")
    table = pq.read_table(tmp_path / "out" / "online.parquet")
    assert table.schema.names == EVENTS.names
    assert sorted(table["user_id"].to_pylist()) == ["bob", "bob", "tablet"]
    columns = {name: name for name in EVENTS.names}
    page = {"name": "again", "events": [{"path": "online.parquet", "columns": columns}]}
    again = ingest_local(SourceConfig.parse(page, "page"), Place.at(tmp_path / "out"), Place.at(tmp_path / "other"))
    rows = {row["event_id"]: row for row in again.events().to_pylist()}
    assert rows.keys() == {"late", "e0001", "e0002"}
    assert (rows["late"]["item_id"], rows["late"]["price"], rows["late"]["timestamp"].timestamp() * 1e6) == ("egg", 2.5, T0 + 5 * HOUR)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    refused = attempt("events", "export", str(blocked / "x.parquet")).exception
    assert isinstance(refused, MapleError)
    assert "cannot be written" in str(refused)
    assert blocked.read_text() == "in the way"


def test_items_are_put_shown_and_withdrawn(home: Path) -> None:
    said = json.loads(run("items", "put", "cup", "price=9.5", "stock=0", "colour=blue", "promotion={end: 2026-12-24T00:00:00Z}"))
    assert (said["price"], said["stock"], said["attributes"]) == (9.5, 0.0, {"colour": "blue"})
    assert said["promotion"] == {"start": None, "end": "2026-12-24T00:00:00Z"}
    assert json.loads(run("items", "put", "cup", "stock="))["stock"] is None
    assert json.loads(run("items", "show", "cup"))["price"] == 9.5
    assert json.loads(run("items", "withdraw", "cup"))["withdrawn"] is True
    assert "nothing was put" in run("items", "show", "dish")
    live = SqliteItems(home / "live_items.sqlite")
    assert [(item.item_id, item.deleted) for item in live.since(0)[1]] == [("cup", True)]
    live.close()


@pytest.mark.parametrize("words", [("items", "put", "cup", "price=cheap"), ("items", "put", "cup", "=3"), ("users", "set", "ann", "age")])
def test_what_is_mistyped_is_an_error_that_helps(home: Path, words: tuple[str, ...]) -> None:
    error = attempt(*words).exception
    assert isinstance(error, MapleError)
    assert "\n" not in str(error)
