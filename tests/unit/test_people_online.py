"""What people may ask of their data, through the API and the functions behind it: described, forgotten, joined, shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop import Happening, snapshot
from taste_shop import publish

from maple.artifacts import Place
from maple.data.ingest import append_local, ingest_local, restitch
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.data.tombstones import Tombstones
from maple.errors import ServeError
from maple.features.store import Event
from maple.features.store_sqlite import SqliteStore
from maple.recommend.bundle import load
from maple.serve.http import create_app
from maple.serve.people import Removed, folds_nothing, forget, load_events, load_people, stored
from maple.serve.service import LocalService
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_store


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("home")
    return home, publish(home, "popularity", "item-knn")


@pytest.fixture
def service(published: tuple[Path, str], tmp_path: Path) -> Iterator[LocalService]:
    home, digest = published
    page = ServeSettings.parse({"home": str(home), "store": {"path": str(tmp_path / "online.sqlite")}}, "test")
    built = LocalService(page, lambda folder: open_store(page, folder))
    built.hold({digest: built.prepare(load(Place.at(home), digest))}, digest, 1)
    yield built
    built.close()


def ask(service: LocalService, method: str, path: str, body: Mapping[str, Any] | None = None, status: int = 200) -> Any:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://maple") as client:
            return await client.request(method, path, json=body)

    answer = asyncio.run(run())
    assert answer.status_code == status, answer.text
    return answer.json()


def bought(service: LocalService, user: str, *items: str) -> Any:
    events = [{"user_id": user, "item_id": item, "event": "purchase", "event_id": f"{user}/{item}"} for item in items]
    return ask(service, "POST", "/v1/events", {"events": events})


def because(service: LocalService, user: str) -> set[str]:
    """The items that a user's recommendations are explained by."""
    items = ask(service, "POST", "/v1/recommendations", {"user_id": user, "k": 20})["items"]
    return {item["reason"]["item_id"] for item in items if item["reason"]["item_id"]}


def test_a_forgotten_user_is_gone_at_once_and_stays_so(service: LocalService, published: tuple[Path, str]) -> None:
    bought(service, "anna", "i5", "i9")
    ask(service, "PUT", "/v1/users/anna", {"attributes": {"age": 44}})
    assert because(service, "anna")
    removed = ask(service, "DELETE", "/v1/users/anna")
    assert {name: removed[name] for name in ("events", "attributes", "ids")} == {"events": 2, "attributes": 1, "ids": 1}
    assert because(service, "anna") == set()
    before = bought(service, "nobody special", "i5", "i9")
    after = bought(service, "anna", "i5", "i13")
    assert {**after, "request_id": ""} == {**before, "request_id": ""}, "an answer does not tell who is forgotten"
    assert ask(service, "PUT", "/v1/users/anna", {"attributes": {"age": 4}})["user_id"] == "anna"
    assert because(service, "anna") == set()
    home = Place.at(published[0])
    assert Tombstones.of(home).covers(pa.array(["anna", "bert"])).tolist() == [True, False]
    again = ask(service, "DELETE", "/v1/users/anna")
    assert (again["events"], again["attributes"]) == (0, 0)


def test_two_ids_become_one_person_and_two_again(service: LocalService) -> None:
    bought(service, "device", "i5")
    bought(service, "bea", "i2")
    device, bea = because(service, "device"), because(service, "bea")
    assert ask(service, "POST", "/v1/identities", {"alias": "device", "user_id": "bea"})["changed"] >= 1
    assert because(service, "device") == because(service, "bea") == device | bea == {"i5", "i2"}
    bought(service, "device", "i9")
    assert "i9" in because(service, "bea")
    assert ask(service, "DELETE", "/v1/identities/device")["changed"] == 1
    assert because(service, "bea") == bea
    assert because(service, "device") == {"i5", "i9"}
    assert ask(service, "DELETE", "/v1/identities/device")["changed"] == 0


def test_whoever_is_joined_is_forgotten_together(service: LocalService, published: tuple[Path, str]) -> None:
    bought(service, "phone", "i5")
    bought(service, "carl", "i2")
    ask(service, "POST", "/v1/identities", {"alias": "phone", "user_id": "carl"})
    assert ask(service, "DELETE", "/v1/users/phone")["ids"] == 2
    assert because(service, "carl") == because(service, "phone") == set()
    assert Tombstones.of(Place.at(published[0])).covers(pa.array(["phone", "carl"])).all()


def test_attributes_reach_the_query_and_the_requests_own_win(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    held = service._serving
    assert held is not None
    run = held.batcher.answer

    async def watched(queries: Any, deadline: Any) -> Any:
        seen.extend(dict(query.attributes) for query in queries)
        return await run(queries, deadline)

    monkeypatch.setattr(held.batcher, "answer", watched)
    ask(service, "PUT", "/v1/users/dora", {"attributes": {"age": 30, "member": True, "likes": ["tea"]}})
    ask(service, "PUT", "/v1/users/dora", {"attributes": {"member": None}})
    for own in ({}, {"age": 31, "city": "Rome"}, {}):
        ask(service, "POST", "/v1/recommendations", {"user_id": "dora", "attributes": own})
    assert seen == [{"age": 30.0, "likes": ["tea"]}, {"age": 31, "likes": ["tea"], "city": "Rome"}], "the third answer was cached"


def test_what_cannot_be_kept_is_refused_and_what_fails_is_said(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(service, "PUT", "/v1/users/emil", {"attributes": {"a\nb": 1}}, status=422)["error"]["where"] == "attributes"
    for user, status in (("emil", 200), ("fred", 200), ("gina", 200), ("hugo", 422)):
        answer = ask(service, "POST", "/v1/identities", {"alias": "library computer", "user_id": user}, status=status)
    assert answer["error"]["where"] == "alias"

    def broken(*_: Any, **__: Any) -> int:
        raise ServeError("disk full")

    assert service._stores is not None
    monkeypatch.setattr(service._stores.store, "delete", broken)
    refused = ask(service, "DELETE", "/v1/users/emil", status=503)
    assert refused["error"]["type"] == "not_stored"
    assert "disk" not in json.dumps(refused)


def test_what_a_snapshot_knows_of_people_is_loaded(tmp_path: Path) -> None:
    for name, rows in {
        "events": {"user": ["tv", "ann", "pad"], "item": ["i1", "i2", "i3"], "at": [1_700_000_000, 1_700_000_001, 1_700_000_002]},
        "users": {"user": ["ann", "bob"], "age": [30, 40]},
        "devices": {"device": ["tv", "pad"], "user": ["ann", "ann"]},
    }.items():
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    page = {
        "name": "home",
        "events": {
            "path": "events.parquet", "columns": {"user_id": "user", "item_id": "item", "timestamp": "at"}, "constants": {"event": "view"},
            "clock": {"unit": "s"},
        },
        "users": {"path": "users.parquet", "columns": {"user_id": "user"}, "keep": ["age"]},
        "identities": {"path": "devices.parquet", "columns": {"device_id": "device", "user_id": "user"}},
    }  # fmt: skip
    shot = ingest_local(SourceConfig.parse(page, "page"), Place.at(tmp_path), Place.at(tmp_path / "home"))
    store = SqliteStore(tmp_path / "online.sqlite", folds_nothing())
    store.describe("ann", {"age": 31})
    store.backfill(shot.events())
    said: list[str] = []
    for _ in range(2):
        load_people(store, shot, said.append)
    assert store.attributes("ann") == {"age": 31}, "what was said since stays"
    assert store.attributes("bob") == {"age": 40}
    assert store.aliases("tv") == ["ann", "pad", "tv"]
    assert store.get(["pad"])["pad"].items == ("i1", "i2", "i3")
    assert said[1:] == ["online store: 2 devices are users'", said[2], "online store: 0 devices are users'"]
    store.close()
    # Whoever is joined in the snapshot alone is one person as well.
    other = SqliteStore(tmp_path / "other.sqlite", folds_nothing())
    other.append([Happening("pad", "i9", "view", 5).stored(1)])
    home = Place.at(tmp_path / "home")
    assert [event["item_id"] for event in stored(other, home, "tv")["online_events"]] == ["i9"]
    assert forget(other, home, "tv") == Removed(1, 0, ("ann", "pad", "tv"))
    assert Snapshot.open(home).events().num_rows == 0
    other.close()


LOG = ("event_id", "user_id", "item_id", "event", "timestamp", "value")
Line = tuple[str, str, str, str, int, float | None]


def write(path: Path, *lines: Line) -> None:
    pq.write_table(pa.table(dict(zip(LOG, map(list, zip(*lines, strict=True)), strict=True))), path)


def log_source(**more: Any) -> SourceConfig:
    """Files log-*.parquet with times in seconds."""
    events = {"path": "log-*.parquet", "columns": {name: name for name in LOG}, "rules": [], "clock": {"unit": "s"}}
    checks = {"min_events": 1, "min_users": 1, "min_items": 1, "quarantined": "off"}
    return SourceConfig.parse({"name": "home", "events": events, "checks": checks, **more}, "page")


def held(store: SqliteStore, user: str) -> dict[str, float | None]:
    return {event.event_id: event.value for event in store.history(user)}


@pytest.mark.parametrize("append", [True, False])
def test_online_histories_follow_what_a_snapshot_nets_and_sets_aside(tmp_path: Path, append: bool) -> None:
    source = log_source(returns="net", behaviour=[{"kind": "rate", "events": 3, "minutes": 5, "max_share": 1.0}])
    day = 1_700_000_000
    write(
        tmp_path / "log-1.parquet", ("b1", "ann", "i1", "purchase", day, 2.0), ("b2", "ann", "i2", "purchase", day + 1, 3.0),
        ("v1", "bot", "i1", "view", day, None),
    )  # fmt: skip
    store = SqliteStore(tmp_path / "online.sqlite", folds_nothing())
    load_events(store, ingest_local(source, Place.at(tmp_path), Place.at(tmp_path / "home")), lambda line: None)
    assert (held(store, "ann"), held(store, "bot")) == ({"b1": 2.0, "b2": 3.0}, {"v1": None})
    # The shop sends on: what comes back, a robot; and what no snapshot knows yet.
    news: list[Line] = [("r1", "ann", "i1", "return", day + 9, 2.0), ("r2", "ann", "i2", "return", day + 9, 1.0)]
    news += [("n1", "bob", "i1", "view", day, None)]
    news += [(f"v{place}", "bot", f"i{place}", "view", day + place, None) for place in range(2, 6)]
    store.append([Event(one, user, item, kind, at * 1_000_000, value) for one, user, item, kind, at, value in news])
    store.append([Event("late", "ann", "i3", "view", (day + 99) * 1_000_000)])
    write(tmp_path / "log-2.parquet", *news)
    make = append_local if append else ingest_local
    shot = make(source, Place.at(tmp_path), Place.at(tmp_path / "home"))
    assert (shot.parent is not None) == append
    said: list[str] = []
    for _ in range(2):
        load_events(store, shot, said.append)
        assert (held(store, "ann"), held(store, "bot")) == ({"b2": 2.0, "late": None}, {})
    assert said[shot.num_buckets - 1] == "online store: 0 events added, 1 changed, 8 dropped"
    assert said[-1] == "online store: 0 events added, 0 changed, 0 dropped"
    store.close()


def test_online_histories_follow_ids_that_are_stitched_and_parted(tmp_path: Path) -> None:
    write(
        tmp_path / "log-1.parquet",
        *((f"e{n}", user, "i1", "view", 1_700_000_000 + n, None) for n, user in enumerate(("ann", "pad", "bob"))),
    )
    home = Place.at(tmp_path / "home")
    pq.write_table(pa.table({"device_id": ["pad"], "user_id": ["ann"]}), tmp_path / "devices.parquet")
    devices = {"path": "devices.parquet", "columns": {"device_id": "device_id", "user_id": "user_id"}}
    store = SqliteStore(tmp_path / "online.sqlite", folds_nothing())
    load_events(store, ingest_local(log_source(identities=devices), Place.at(tmp_path), home), lambda line: None)
    assert set(held(store, "ann")) == {"e0", "e1"}
    for to, wanted in (
        ("bob", {"ann": {"e0"}, "bob": {"e1", "e2"}, "pad": set()}),
        ("ann", {"ann": {"e0", "e1"}, "bob": {"e2"}, "pad": set()}),
    ):
        load_events(store, restitch(home, pa.table({"device_id": ["pad"], "user_id": [to]})), lambda line: None)
        assert {user: set(held(store, user)) for user in wanted} == wanted
    store.close()


def test_everything_stored_about_a_person_is_shown(tmp_path: Path) -> None:
    day = 86_400_000_000
    happenings = [
        Happening("ann", "apple", "purchase", 1, 2.0, 1.5), Happening("ann", "cup", "view", 2), Happening("bob", "cup", "view", 3),
    ]  # fmt: skip
    snapshot(tmp_path, happenings, 1000)
    home = Place.at(tmp_path / "home")
    store = SqliteStore(tmp_path / "online.sqlite", folds_nothing())
    store.append([Happening("tablet", "dish", "view", day).stored(7)])
    store.merge(["tablet"], "ann")
    store.describe("ann", {"age": 30})
    told = stored(store, home, "ann")
    assert told["ids"] == ["ann", "tablet"]
    assert told["attributes"] == {"age": 30}
    assert [(event["user_id"], event["item_id"]) for event in told["online_events"]] == [("tablet", "dish")]
    assert [event["item_id"] for event in told["snapshot"]["events"]] == ["apple", "cup"]
    assert json.loads(json.dumps(told)) == told
    assert "bob" not in json.dumps(told)
    removed = forget(store, home, "tablet")
    assert (removed.events, removed.attributes, removed.ids) == (1, 1, ("ann", "tablet"))
    gone = stored(store, home, "ann")
    assert (gone["online_events"], gone["attributes"], gone["snapshot"]["events"]) == ([], {}, [])
    assert stored(store, Place.at(tmp_path / "nothing"), "ann")["snapshot"] is None
    store.close()
