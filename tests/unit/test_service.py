"""The service in one process on a real bundle and a real store, through HTTP but without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from taste_shop import group, publish

from maple.artifacts import Place
from maple.recommend.bundle import load
from maple.recommend.engine import Candidates, Deadline, FunctionStage, Query, Segment, SegmentResult
from maple.schema import ITEMS, TIMESTAMP
from maple.serve.api import Info, Recommendations, Similar
from maple.serve.http import create_app
from maple.serve.service import LocalService
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_store

Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A home with two bundles."""
    home = tmp_path_factory.mktemp("home")
    return home, publish(home, "popularity", "item-knn"), publish(home, "popularity", "ease")


def serving(shop: tuple[Path, str, str], tmp_path: Path, **settings: Any) -> LocalService:
    """A service that answers from the first bundle and holds the second."""
    home, *digests = shop
    page = ServeSettings.parse({"home": str(home), "store": {"path": str(tmp_path / "online.sqlite")}, **settings}, "test")
    service = LocalService(page, lambda folder: open_store(page, folder))
    held = {digest: service.prepare(load(Place.at(home), digest)) for digest in digests}
    service.hold(held, digests[0], 1)
    return service


@pytest.fixture
def service(shop: tuple[Path, str, str], tmp_path: Path) -> Iterator[LocalService]:
    built = serving(shop, tmp_path)
    yield built
    built.close()


def talk(service: LocalService, scenario: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://maple") as client:
            return await scenario(client)

    return asyncio.run(run())


def recommend(service: LocalService, user: str, **fields: Any) -> Recommendations:
    async def scenario(client: httpx.AsyncClient) -> Recommendations:
        answer = await client.post("/v1/recommendations", json={"user_id": user, **fields})
        assert answer.status_code == 200, answer.text
        return Recommendations.model_validate(answer.json())

    out: Recommendations = talk(service, scenario)
    return out


def send(service: LocalService, *events: Mapping[str, Any]) -> httpx.Response:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/events", json={"events": list(events)})

    out: httpx.Response = talk(service, scenario)
    return out


def bought(user: str, item: str, **fields: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "event": "purchase", **fields}


def test_a_new_user_gets_what_is_popular(service: LocalService) -> None:
    answer = recommend(service, "somebody new", k=7)
    assert len(answer.items) == 7
    assert answer.path[0] == "cold"
    assert {item.source for item in answer.items} == {"popularity"}
    assert all(item.reason is not None and item.reason.kind == "popular" for item in answer.items)
    assert {"user", "queue", "retrieve", "finish", "total"} <= answer.latency_ms.keys()


def test_the_next_request_sees_the_event(service: LocalService) -> None:
    before = recommend(service, "anna", k=10)
    assert recommend(service, "anna", k=10).path[0] == "cache"
    assert send(service, bought("anna", "i5"), bought("anna", "i9")).json()["accepted"] == 2
    after = recommend(service, "anna", k=10)
    assert after.path[0] == "retrieve"
    assert [item.item_id for item in after.items] != [item.item_id for item in before.items]
    because = [item for item in after.items if item.reason is not None and item.reason.kind == "because"]
    assert because
    assert all(group(item.item_id) == 1 for item in because)
    assert {item.reason.item_id for item in because if item.reason} <= {"i5", "i9"}


def test_repeated_events_count_once(service: LocalService) -> None:
    event = bought("bert", "i4", event_id="order-1/line-1")
    timed = bought("bert", "i8", timestamp="2025-10-01T12:00:00Z")
    assert send(service, event, timed).json()["accepted"] == 2
    again = send(service, event, timed, event).json()
    assert (again["accepted"], again["duplicates"]) == (0, 3)


def test_events_from_the_future_are_refused_and_nothing_is_kept(service: LocalService) -> None:
    soon = int((time.time() + 60) * 1e6)
    assert send(service, bought("cleo", "i3", timestamp=soon)).status_code == 200
    before = recommend(service, "cleo")
    answer = send(service, bought("cleo", "i7"), bought("cleo", "i7", timestamp=soon + 86_400_000_000))
    assert answer.status_code == 422
    assert answer.json()["error"]["where"] == "events.1.timestamp"
    assert [item.item_id for item in recommend(service, "cleo").items] == [item.item_id for item in before.items]


def test_a_context_too_large_for_the_store_is_a_422(service: LocalService) -> None:
    context = {f"key{n}": "é" * 256 for n in range(32)}
    assert send(service, bought("dora", "i3", context=context)).status_code == 422


def test_a_history_in_the_request_counts_as_if_it_were_stored(service: LocalService) -> None:
    times = ["2025-10-01T12:00:00Z", "2025-10-02T12:00:00Z"]
    history = [{"item_id": item, "event": "purchase", "timestamp": at} for item, at in zip(("i6", "i10"), times, strict=True)]
    unknown = {"item_id": "no such item", "timestamp": times[0]}
    given = recommend(service, "visitor", history=[*history, unknown])
    send(service, *(bought("emil", event["item_id"], timestamp=event["timestamp"]) for event in history))
    stored = recommend(service, "emil")
    assert [(item.item_id, item.score) for item in given.items] == [(item.item_id, item.score) for item in stored.items]
    assert recommend(service, "visitor").path[0] == "cold", "a history in a request is not stored"


def test_a_history_from_the_future_is_refused(service: LocalService) -> None:
    now = int(time.time() * 1e6)
    history = [{"item_id": "i6", "timestamp": now - 1}, {"item_id": "i10", "timestamp": now + 86_400_000_000}]

    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/recommendations", json={"user_id": "visitor", "history": history})

    answer = talk(service, scenario)
    assert (answer.status_code, answer.json()["error"]["where"]) == (422, "history.1.timestamp")
    assert recommend(service, "visitor", history=[{"item_id": "i6", "timestamp": now + 60_000_000}]).items, "clocks differ a little"


def test_exclude_and_filters(service: LocalService) -> None:
    everything = recommend(service, "filt", k=20)
    barred = [item.item_id for item in everything.items[:5]]
    rest = recommend(service, "filt", k=20, exclude=[*barred, "unknown"])
    assert not set(barred) & {item.item_id for item in rest.items}
    only = recommend(service, "filt", k=10, filters={"category": ["c2"]})
    assert only.items
    assert {group(item.item_id) for item in only.items} == {2}
    cheap = recommend(service, "filt", k=50, filters={"price": {"max": 4.5}})
    assert 0 < len(cheap.items) < 50


@pytest.mark.parametrize("filters", [{"nope": ["a"]}, {"title": {"min": 3}}, {"price": {}}, {"price": {"least": 1}}])
def test_filters_that_cannot_be_answered_are_refused(service: LocalService, filters: dict[str, Any]) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/recommendations", json={"user_id": "u", "filters": filters})

    answer = talk(service, scenario)
    assert answer.status_code == 422
    assert answer.json()["error"]["hint"]


def test_no_filter_on_any_item_column_is_an_error_of_the_server(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert service._serving is not None
    items = service._serving.bundle.base.parts.item_columns
    made = {
        pa.string(): "a", pa.float32(): 2.0, pa.bool_(): True, TIMESTAMP: 1_700_000_000_000_000, pa.date32(): 19_000,
        pa.list_(pa.string()): ["a"], pa.decimal128(9, 2): Decimal("1.50"), pa.int64(): 1 << 60, pa.time64("us"): 1,
        pa.duration("s"): 1, pa.struct([("a", pa.int8())]): {"a": 1}, pa.binary(): b"\xff", pa.null(): None,
    }  # fmt: skip
    rest = [None] * (len(items) - 1)
    kinds = {field.name: field.type for field in ITEMS if field.name != "item_id"} | {f"extra {kind}": kind for kind in made}
    columns = {name: pa.array([made[kind], *rest], kind) for name, kind in kinds.items()}
    monkeypatch.setattr(items, "table", pa.table({"item_id": items.table["item_id"], **columns}))
    wanted = ({"min": 1e9}, {"max": -1}, {"min": 0, "max": 7e15}, ["a"], [2.0, True], [1_700_000_000_000_000], [10**19])

    async def scenario(client: httpx.AsyncClient) -> dict[str, list[int]]:
        asked = [(name, {"user_id": "u", "filters": {name: value}}) for name in columns for value in wanted]
        out: dict[str, list[int]] = {}
        for name, body in asked:
            out.setdefault(name, []).append((await client.post("/v1/recommendations", json=body)).status_code)
        return out

    statuses = talk(service, scenario)
    assert all(status in (200, 422) for each in statuses.values() for status in each), statuses
    assert {name for name, each in statuses.items() if set(each) == {200}} >= {"created_at", "price", "stock", "margin"}
    assert set(statuses["title"][:3]) == {422}
    assert set(statuses["title"][3:]) == {200}


def test_similar_items(service: LocalService) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get(f"/v1/items/{item}/similar?k=3") for item in ("i5", "nothing")]

    found, missing = talk(service, scenario)
    items = Similar.model_validate(found.json()).items
    assert len(items) == 3
    assert all(group(item.item_id) == 1 and item.item_id != "i5" for item in items)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "unknown_item")


def test_info(service: LocalService, shop: tuple[Path, str, str]) -> None:
    info = Info.model_validate(service.info())
    assert (info.bundle, info.generation, info.held) == (shop[1], 1, [shop[1], shop[2]])
    assert info.models == {"popularity": "popularity", "item-knn": "item-knn"}
    assert info.data_fingerprint == "f" * 64


def test_a_flip_changes_the_answers_and_the_cache_keeps_them_apart(service: LocalService, shop: tuple[Path, str, str]) -> None:
    send(service, bought("flip", "i7"))
    assert recommend(service, "flip").bundle == shop[1]
    service.hold(service._held, shop[2], 2)
    after = recommend(service, "flip")
    assert after.bundle == shop[2]
    assert after.path[0] != "cache"
    assert service.info()["generation"] == 2


def test_a_request_keeps_its_bundle_while_the_service_flips(service: LocalService, shop: tuple[Path, str, str]) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        async def ask(number: int) -> dict[str, Any]:
            return dict((await client.post("/v1/recommendations", json={"user_id": f"u{number}"})).json())

        asked = []
        for step in range(10):
            asked += [asyncio.create_task(ask(4 * step + number)) for number in range(4)]
            await asyncio.sleep(0.002)  # they have begun and wait for a thread
            service.hold(service._held, shop[1 + (step + 1) % 2], step)
        return await asyncio.gather(*asked)

    answers = talk(service, scenario)
    sources = {shop[1]: {"popularity", "item-knn"}, shop[2]: {"popularity", "ease"}}
    assert {answer["bundle"] for answer in answers} == set(sources)
    for answer in answers:
        assert not answer["degraded"]
        assert {item["source"] for item in answer["items"]} <= sources[answer["bundle"]]


def test_a_slow_ranker_is_answered_around_in_time(shop: tuple[Path, str, str], tmp_path: Path) -> None:
    service = serving(shop, tmp_path, deadline_ms=80)
    held = service._serving
    assert held is not None

    def sleeps(queries: Sequence[Query], candidates: Candidates) -> Candidates:
        time.sleep(0.5)
        return candidates

    slow = replace(held.pipeline, rank=(FunctionStage("slow ranker", sleeps),))
    held.batcher.answer = lambda queries, deadline: service._run(slow, None, queries, deadline)
    start = time.monotonic()
    answer = recommend(service, "u1", k=5)
    assert time.monotonic() - start < 0.45
    assert answer.degraded == ["rank: deadline"]
    assert len(answer.items) == 5
    assert recommend(service, "u1", k=5).path[0] != "cache", "a degraded answer is not kept"
    service.close()


def test_a_failed_far_segment_falls_back(shop: tuple[Path, str, str], tmp_path: Path) -> None:
    async def broken(queries: Sequence[Query], candidates: Candidates, deadline: Deadline | None) -> SegmentResult:
        raise ConnectionError("no such replica")

    home, digest, _ = shop
    page = ServeSettings.parse({"home": str(home), "store": {"path": str(tmp_path / "online.sqlite")}}, "test")
    far: dict[Segment, Any] = {"retrieve": broken}
    service = LocalService(page, lambda folder: open_store(page, folder), remote=lambda digest: far)
    service.hold({digest: service.prepare(load(Place.at(home), digest))}, digest, 1)
    answer = recommend(service, "u1", k=5)
    assert answer.degraded == ["retrieve: error:ConnectionError"]
    assert "fallback" in answer.path
    assert len(answer.items) == 5
    service.close()


def test_too_many_at_once_are_refused_at_once(shop: tuple[Path, str, str], tmp_path: Path) -> None:
    service = serving(shop, tmp_path, max_in_flight=4)

    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/recommendations", json={"user_id": f"u{n}"}) for n in range(20)))

    answers = talk(service, scenario)
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 4
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["error"]["type"] == "overloaded"
    assert refused.headers["retry-after"] == "1"
    assert recommend(service, "u1").items, "it recovers"
    service.close()


def test_nothing_loaded_yet(shop: tuple[Path, str, str]) -> None:
    page = ServeSettings.parse({"home": str(shop[0])}, "test")
    service = LocalService(page, lambda folder: open_store(page, folder))

    async def scenario(client: httpx.AsyncClient) -> list[int]:
        answers = [
            await client.post("/v1/recommendations", json={"user_id": "u"}),
            await client.get("/healthz"),
            await client.get("/v1/info"),
        ]
        return [answer.status_code for answer in answers]

    assert talk(service, scenario) == [503, 503, 503]


def test_the_service_can_live_in_the_time_of_its_data(shop: tuple[Path, str, str], tmp_path: Path) -> None:
    service = serving(shop, tmp_path, clock_offset_s=-3 * 365 * 86_400)
    assert abs(service.now() / 1e6 - (time.time() - 3 * 365 * 86_400)) < 5
    assert send(service, bought("gus", "i3", timestamp=int(time.time() * 1e6))).status_code == 422, "today lies in its future"
    service.close()
