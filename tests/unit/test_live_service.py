"""The live catalogue through the service: a change is durable and counts everywhere within a poll."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from taste_shop import group, publish

from maple.artifacts import Place
from maple.errors import ServeError
from maple.recommend.bundle import load
from maple.recommend.live import LiveBundle
from maple.serve.api import ItemState, iso
from maple.serve.http import create_app
from maple.serve.live import Poller
from maple.serve.service import LocalService
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_store

PURCHASES = [{"user_id": "anna", "item_id": item, "event": "purchase", "event_id": item} for item in ("i5", "i9")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A home with two bundles."""
    home = tmp_path_factory.mktemp("home")
    return home, publish(home, "popularity", "item-knn"), publish(home, "popularity", "ease")


def serving(shop: tuple[Path, str, str], folder: Path, **more: Any) -> LocalService:
    home, *digests = shop
    page = ServeSettings.parse({"home": str(home), "store": {"path": str(folder / "online.sqlite")}, "live_poll_s": 0.02, **more}, "test")
    service = LocalService(page, lambda folding: open_store(page, folding))
    service.hold({digest: service.prepare(load(Place.at(home), digest)) for digest in digests}, digests[0], 1)
    return service


@pytest.fixture
def replicas(shop: tuple[Path, str, str], tmp_path: Path) -> Iterator[tuple[LocalService, LocalService]]:
    """Two replicas of one service."""
    one, two = serving(shop, tmp_path), serving(shop, tmp_path)
    yield one, two
    one.close()
    two.close()


def ask(service: LocalService, method: str, path: str, body: Mapping[str, Any] | None = None, status: int = 200) -> Any:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://maple") as client:
            return await client.request(method, path, json=body)

    answer = asyncio.run(run())
    assert answer.status_code == status, answer.text
    return answer.json()


def put(service: LocalService, item: str, **changes: Any) -> ItemState:
    return ItemState.model_validate(ask(service, "PUT", f"/v1/items/{item}", changes))


def slate(service: LocalService, user: str = "anna", k: int = 20, **fields: Any) -> list[str]:
    answer = ask(service, "POST", "/v1/recommendations", {"user_id": user, "k": k, **fields})
    assert not answer["degraded"]
    return [item["item_id"] for item in answer["items"]]


def soon(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_change_counts_everywhere_within_a_poll(replicas: tuple[LocalService, LocalService]) -> None:
    here, there = replicas
    first = slate(here)[0]
    assert slate(there)[0] == first
    said = put(here, first, stock=0)
    assert (said.item_id, said.in_bundle, said.stock, said.version) == (first, True, 0, 1)
    soon(lambda: first not in slate(here))  # a cached answer would be stale
    soon(lambda: first not in slate(there))
    assert put(there, first, stock=None).version == 2
    soon(lambda: slate(there)[0] == slate(here)[0] == first)


def test_a_price_counts_in_filters_and_is_told(replicas: tuple[LocalService, LocalService]) -> None:
    here, _ = replicas
    before = ItemState.model_validate(ask(here, "GET", "/v1/items/i7"))
    assert before.price is not None
    assert (before.title, before.category, before.version, before.in_bundle) == ("Thing 7", "c3", 0, True)
    put(here, "i7", price=99.5)
    after = put(here, "i7", title="Better thing")
    assert (after.price, after.title, after.category) == (99.5, "Better thing", "c3")

    def found() -> list[tuple[str, str]]:
        answer = ask(here, "POST", "/v1/recommendations", {"user_id": "u", "filters": {"price": {"min": 90}}})
        return [(item["item_id"], item["title"]) for item in answer["items"]]

    soon(lambda: found() == [("i7", "Better thing")])
    assert put(here, "i7", price=None).price == before.price


def test_a_brand_new_item_is_recommended_without_training(replicas: tuple[LocalService, LocalService]) -> None:
    here, there = replicas
    ask(here, "POST", "/v1/events", {"events": PURCHASES})
    created = put(here, "sku/new", category="c1", price=4, title="Just in", created_at="2026-01-01T00:00:00Z")
    assert (created.in_bundle, created.version, created.created_at) == (False, 1, "2026-01-01T00:00:00Z")
    soon(lambda: "sku/new" in slate(here))
    answer = ask(here, "POST", "/v1/recommendations", {"user_id": "anna", "k": 10})
    (found,) = [item for item in answer["items"] if item["item_id"] == "sku/new"]
    assert (found["title"], found["source"], found["reason"]["text"]) == ("Just in", "new items", "new in c1")
    assert "sku/new" not in slate(here, history=[{"item_id": "i2", "event": "purchase", "timestamp": "2025-10-01T12:00:00Z"}])
    similar = ask(here, "GET", "/v1/items/sku%2Fnew/similar?k=3")["items"]
    assert {group(item["item_id"]) for item in similar} == {1}
    assert here.info()["live"]["new"] == 1
    soon(lambda: "sku/new" in slate(there))
    # Events of it are events like all others; the answer is then no news to this user.
    ask(there, "POST", "/v1/events", {"events": [{"user_id": "anna", "item_id": "sku/new", "event": "view"}]})
    again = ask(there, "POST", "/v1/recommendations", {"user_id": "anna", "k": 10})["items"]
    assert [item["reason"]["kind"] for item in again if item["item_id"] == "sku/new"] == ["again"]
    assert ask(here, "DELETE", "/v1/items/sku%2Fnew")["withdrawn"]
    soon(lambda: "sku/new" not in slate(here))
    soon(lambda: "sku/new" not in slate(there))
    ask(here, "GET", "/v1/items/sku%2Fnew", status=404)
    assert put(there, "sku/new").withdrawn is False, "put again, it is back"


def test_a_new_item_stays_new_for_the_next_bundle_that_does_not_know_it(replicas: tuple[LocalService, LocalService]) -> None:
    here, _ = replicas
    put(here, "novelty", category="c1")
    soon(lambda: here.info()["live"]["new"] == 1)
    held = dict(here._held)
    here.hold(held, list(held)[1], 2)
    assert "novelty" in slate(here, "new here")
    assert here.info()["live"]["new"] == 1


def test_what_nobody_knows_is_a_404(replicas: tuple[LocalService, LocalService]) -> None:
    here, _ = replicas
    for method, path in (("GET", "/v1/items/nothing"), ("DELETE", "/v1/items/nothing"), ("GET", "/v1/items/nothing/similar")):
        assert ask(here, method, path, status=404)["error"]["type"] == "unknown_item"
    assert ask(here, "PUT", "/v1/items/i3", {"category": "a\nb"}, status=422)["error"]["hint"]


def test_promotions_start_by_themselves(replicas: tuple[LocalService, LocalService]) -> None:
    here, _ = replicas
    start, end = here.now() + 400_000, here.now() + 3_600_000_000
    said = put(here, "i7", promotion={"start": iso(start), "end": end})
    assert said.promotion is not None
    assert (said.promotion.start, said.promotion.end) == (iso(start), iso(end))
    if here.now() < start:
        assert slate(here, filters={"promotion": [True]}) in ([], ["i7"])
    soon(lambda: slate(here, filters={"promotion": [True]}) == ["i7"])
    assert here.now() >= start


def test_requests_in_flight_keep_the_catalogue_they_came_to(replicas: tuple[LocalService, LocalService]) -> None:
    here, _ = replicas

    async def scenario(client: httpx.AsyncClient) -> list[Any]:
        async def ask_(number: int) -> Any:
            return (await client.post("/v1/recommendations", json={"user_id": f"u{number}", "k": 10})).json()

        asked: list[Awaitable[Any]] = []
        for step in range(8):
            asked += [asyncio.create_task(ask_(4 * step + number)) for number in range(4)]
            await asyncio.sleep(0.002)
            await client.put(f"/v1/items/new-{step}", json={"category": f"c{step % 4}"})
        return await asyncio.gather(*asked)

    async def run() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(here)), base_url="http://maple") as client:
            return await scenario(client)

    for answer in asyncio.run(run()):
        assert not answer["degraded"]
        assert len(answer["items"]) == 10
        assert sum(item["source"] == "new items" for item in answer["items"]) <= 1


def test_a_store_that_cannot_be_read_stops_nothing(replicas: tuple[LocalService, LocalService], monkeypatch: pytest.MonkeyPatch) -> None:
    here, _ = replicas
    put(here, "i7", stock=0)
    soon(lambda: "i7" not in slate(here, k=80))

    def broken(version: int) -> Any:
        raise ServeError("no connection")

    assert here._stores is not None
    monkeypatch.setattr(here._stores.live.items, "since", broken)
    time.sleep(0.1)
    assert "i7" not in slate(here, k=80)
    assert here.info()["live"]["read_s"] > 0.05


def test_a_far_segment_is_asked_for_the_catalogue_of_the_request(shop: tuple[Path, str, str], tmp_path: Path) -> None:
    asked: list[int] = []

    def remote(bundle: LiveBundle) -> None:
        asked.append(len(bundle.space.items))

    home, digest, _ = shop
    page = ServeSettings.parse({"home": str(home), "store": {"path": str(tmp_path / "online.sqlite")}}, "test")
    service = LocalService(page, lambda folder: open_store(page, folder), remote=remote)
    service.hold({digest: service.prepare(load(Place.at(home), digest))}, digest, 1)
    put(service, "n")
    soon(lambda: asked == [80, 81])
    service.close()


def test_a_poller_goes_on_after_an_error_and_ends() -> None:
    calls: list[int] = []
    slow = Poller(lambda: calls.append(0), 1000)
    slow.wake()
    soon(lambda: len(calls) == 1)
    slow.close()
    calls.clear()

    def sometimes() -> None:
        calls.append(len(calls))
        if len(calls) % 2:
            raise ServeError("now and then")

    poller = Poller(sometimes, 0.005)
    soon(lambda: len(calls) > 4)
    poller.close()
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count
