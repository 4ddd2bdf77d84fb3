"""A Redis that hangs: recommendations are answered around it within their deadline, and as before once it goes on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
from redis_server import RedisServer
from taste_shop import publish

from maple.artifacts import Place
from maple.recommend.bundle import load
from maple.serve.http import create_app
from maple.serve.service import LocalService
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_store


def ask(service: LocalService, path: str, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to requests at once."""

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://maple") as client:
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

    answers = asyncio.run(scenario())
    assert [answer.status_code for answer in answers] == [200] * len(bodies), answers[0].text
    return [answer.json() for answer in answers]


def test_a_hung_redis_is_answered_around_within_the_deadline(tmp_path: Path) -> None:
    digest = publish(tmp_path / "home", "popularity", "item-knn")
    server = RedisServer(tmp_path)
    page = ServeSettings.parse(
        {"home": str(tmp_path / "home"), "store": {"kind": "redis", "url": server.url}, "deadline_ms": 800}, "test"
    )  # fmt: skip
    service = LocalService(page, lambda folder: open_store(page, folder))
    try:
        service.hold({digest: service.prepare(load(Place.at(tmp_path / "home"), digest))}, digest, 1)
        ask(service, "/v1/events", {"events": [{"user_id": "ann", "item_id": "i5", "event": "purchase"}]})
        (before,) = ask(service, "/v1/recommendations", {"user_id": "ann", "k": 5})
        assert before["degraded"] == []
        server.hang()
        start = time.monotonic()
        late = ask(service, "/v1/recommendations", *({"user_id": "ann", "k": 5, "context": {"n": n}} for n in range(20)))
        took = time.monotonic() - start
        server.go_on()
        assert took < 2.5, "the store is waited for no longer than the deadline allows, however many wait"
        assert {tuple(answer["degraded"]) for answer in late} == {("user: store",)}
        assert all("cold" in answer["path"] and len(answer["items"]) == 5 for answer in late)
        start = time.monotonic()
        while (after := ask(service, "/v1/recommendations", {"user_id": "ann", "k": 5})[0])["degraded"]:
            assert time.monotonic() - start < 10, "it recovers"
        assert after["items"] == before["items"]
        server.kill()
        (gone,) = ask(service, "/v1/recommendations", {"user_id": "ann", "k": 5})
        assert gone["degraded"] == ["user: store"]
    finally:
        server.go_on()
        server.kill()
        service.close()
