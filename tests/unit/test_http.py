"""The HTTP face over a fake service: routing, limits, the one error shape, and no 5xx for anything a client can send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maple.errors import ArtifactError
from maple.serve.api import (
    Accepted,
    ErrorBody,
    EventIn,
    Health,
    IdentityRequest,
    Info,
    ItemChanges,
    ItemState,
    Joined,
    RecommendationRequest,
    Recommendations,
    RequestError,
    Similar,
    UserChanges,
    UserRemoved,
    UserStored,
)
from maple.serve.http import CHANGE_BYTES, EVENTS_BYTES, RECOMMEND_BYTES, Call, create_app

JSON = {"content-type": "application/json"}


class FakeItems:
    """Knows one item."""

    async def put(self, item_id: str, changes: ItemChanges, call: Call) -> Mapping[str, Any]:
        return self._told(item_id, call) | {"price": changes.price}

    async def get(self, item_id: str, call: Call) -> Mapping[str, Any]:
        return self._told(item_id, call)

    async def withdraw(self, item_id: str, call: Call) -> Mapping[str, Any]:
        if item_id != "known/../id":
            raise RequestError(404, "unknown_item", "nobody knows this item", "item_id", "use an id of the catalogue")
        return self._told(item_id, call) | {"withdrawn": True}

    def _told(self, item_id: str, call: Call) -> dict[str, Any]:
        nothing = dict.fromkeys(("available", "stock", "price", "promotion", "title", "category", "brand", "created_at"))
        said = {"in_bundle": True, "withdrawn": False, "version": 1, "attributes": {}}
        return {"request_id": call.request_id, "item_id": item_id, **nothing, **said}


class FakePeople:
    """Stores nothing."""

    async def describe(self, user_id: str, changes: UserChanges, call: Call) -> Mapping[str, Any]:
        return {"request_id": call.request_id, "user_id": user_id}

    async def forget(self, user_id: str, call: Call) -> Mapping[str, Any]:
        return {"request_id": call.request_id, "user_id": user_id, "events": 2, "attributes": 1, "ids": 1}

    async def join(self, request: IdentityRequest, call: Call) -> Mapping[str, Any]:
        return {"request_id": call.request_id, "user_id": request.user_id, "changed": 1}

    async def part(self, alias: str, call: Call) -> Mapping[str, Any]:
        return {"request_id": call.request_id, "user_id": alias, "changed": 0}


class Fake:
    """Answers every legal request; ``fault`` is raised instead where it is set."""

    fault: Exception | None = None
    up = True

    async def recommend(self, request: RecommendationRequest, call: Call) -> Mapping[str, Any]:
        if self.fault:
            raise self.fault
        reason = {"kind": "popular", "text": "popular", "item_id": None}
        item = {"item_id": "i", "score": 0.5, "source": "popular", "reason": reason, "title": None}
        return {
            "request_id": call.request_id, "bundle": "b", "path": ["retrieve", "finish"], "degraded": [], "latency_ms": {"total": 1.0},
            "items": [item] * request.k,
        }  # fmt: skip

    async def similar(self, item_id: str, k: int, call: Call) -> Mapping[str, Any]:
        if item_id != "known/../id":
            raise RequestError(404, "unknown_item", "the bundle does not know this item", "item_id", "use an id of the catalogue")
        return {"request_id": call.request_id, "bundle": "b", "item_id": item_id, "items": []}

    async def events(self, events: list[EventIn], call: Call) -> Mapping[str, Any]:
        if self.fault:
            raise self.fault
        return {"request_id": call.request_id, "accepted": len(events), "duplicates": 0}

    @property
    def items(self) -> FakeItems:
        return FakeItems()

    @property
    def people(self) -> FakePeople:
        return FakePeople()

    def info(self) -> Mapping[str, Any]:
        return {
            "live": {"version": 3, "items": 2, "new": 1, "read_s": 0.5},
            "bundle": "b", "generation": 1, "placement": "fused", "data_fingerprint": "d", "models": {}, "num_items": 1, "versions": {},
            "held": ["b"], "failed": {}, "store": "sqlite",
        }  # fmt: skip

    def health(self) -> Mapping[str, Any]:
        return {"status": "ok" if self.up else "starting", "bundle": "b" if self.up else None}


FAKE = Fake()
APP = create_app(FAKE)


def ask(method: str, path: str, **options: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://maple") as client:
            return await client.request(method, path, **options)

    return asyncio.run(call())


def post(path: str, content: Any, headers: Mapping[str, str] = JSON) -> httpx.Response:
    return ask("POST", path, content=content, headers=headers)


def put(path: str, content: Any, headers: Mapping[str, str] = JSON) -> httpx.Response:
    return ask("PUT", path, content=content, headers=headers)


def test_answers_have_their_documented_types() -> None:
    Recommendations.model_validate(post("/v1/recommendations", b'{"user_id":"u","k":3}').json())
    Accepted.model_validate(post("/v1/events", b'{"events":[{"user_id":"u","item_id":"i","event":"view"}]}').json())
    Similar.model_validate(ask("GET", "/v1/items/known%2F..%2Fid/similar?k=3").json())
    ItemState.model_validate(put("/v1/items/known%2F..%2Fid", b'{"price":3,"promotion":null}').json())
    ItemState.model_validate(ask("GET", "/v1/items/other").json())
    ItemState.model_validate(ask("DELETE", "/v1/items/known%2F..%2Fid").json())
    UserStored.model_validate(put("/v1/users/u", b'{"attributes":{"age":3,"tags":["a"],"old":null}}').json())
    UserRemoved.model_validate(ask("DELETE", "/v1/users/a%2Fb").json())
    Joined.model_validate(post("/v1/identities", b'{"alias":"device","user_id":"u"}').json())
    Joined.model_validate(ask("DELETE", "/v1/identities/device").json())
    Info.model_validate(ask("GET", "/v1/info").json())
    Health.model_validate(ask("GET", "/healthz").json())


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        ("GET", "/nowhere", b"", {}, 404), ("GET", "/v1/recommendations", b"", {}, 405), ("DELETE", "/v1/info", b"", {}, 405),
        ("GET", "/v1/items/other/similar", b"", {}, 404), ("GET", "/v1/items/a%00b/similar", b"", {}, 422),
        ("GET", "/v1/items/" + "a" * 300 + "/similar", b"", {}, 422), ("GET", "/v1/items/%ED%A0%80/similar", b"", {}, (404, 422)),
        *(("GET", f"/v1/items/known%2F..%2Fid/similar?k={k}", b"", {}, 422) for k in ("0", "-1", "101", "1e1", "٣", "10.0", "", "true")),
        ("POST", "/v1/recommendations", b"{}", JSON, 422), ("POST", "/v1/recommendations", b"{", JSON, 400),
        ("POST", "/v1/recommendations", b"user_id=1", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/v1/recommendations", b'{"user_id":"u"}', {"content-type": "text/plain"}, 415),
        ("POST", "/v1/recommendations", b'{"user_id":"u"}', {"content-type": "multipart/form-data; boundary=x"}, 415),
        ("POST", "/v1/recommendations", b" " * (RECOMMEND_BYTES + 1), JSON, 413),
        ("POST", "/v1/events", b" " * (EVENTS_BYTES + 1), JSON, 413),
        ("PUT", "/v1/items/i", b" " * (CHANGE_BYTES + 1), JSON, 413), ("PUT", "/v1/users/u", b"{}", {}, 415),
        ("PUT", "/v1/items/i", b'{"price":-1}', JSON, 422), ("PUT", "/v1/items/a%00b", b"{}", JSON, 422),
        ("PUT", "/v1/items/", b"{}", JSON, 422), ("PUT", "/v1/items/%FF", b"{}", JSON, 422), ("DELETE", "/v1/users/a%C3", b"", {}, 422),
        ("PUT", "/v1/items/i", b'{"promotion":{"start":"2026-01-02T00:00:00Z","end":"2026-01-01T00:00:00Z"}}', JSON, 422),
        ("DELETE", "/v1/items/other", b"", {}, 404), ("POST", "/v1/items/i", b"{}", JSON, 405), ("GET", "/v1/items/", b"", {}, 422),
        ("PUT", "/v1/users/u", b'{"attributes":{"a":{}}}', JSON, 422), ("PUT", "/v1/users/u", b"{}", JSON, 422),
        ("GET", "/v1/users/u", b"", {}, 405), ("DELETE", "/v1/users/a%0Ab", b"", {}, (404, 422)), ("DELETE", "/v1/users/", b"", {}, 422),
        ("POST", "/v1/identities", b'{"alias":"a","user_id":"a"}', JSON, 422), ("DELETE", "/v1/identities/" + "a" * 300, b"", {}, 422),
        ("POST", "/v1/events", b'{"events":[]}', JSON, 422), ("POST", "/v1/events", b'[{"user_id":"u"}]', JSON, 422),
    ],
)  # fmt: skip
def test_refusals_have_one_shape(method: str, path: str, content: bytes, headers: dict[str, str], status: int | tuple[int, ...]) -> None:
    answer = ask(method, path, content=content, headers=headers)
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    body = ErrorBody.model_validate(answer.json())
    assert body.error.type
    assert body.error.message
    assert body.request_id == answer.headers["x-request-id"]
    assert len(answer.content) < 2048


def test_a_body_without_length_is_cut_off_while_it_streams() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 30 << 20:
            sent += 1 << 16
            yield b" " * (1 << 16)

    assert post("/v1/recommendations", endless()).status_code == 413
    # httpx's in-process transport asks for chunks one by one, so this is how much the app has read.
    assert sent <= RECOMMEND_BYTES + (2 << 16)


def test_request_id_is_kept_where_legal_and_made_where_not() -> None:
    assert ask("GET", "/v1/info", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 129, "a;b", "é"):
        assert ask("GET", "/v1/info", headers={"x-request-id": bad.encode()}).headers["x-request-id"] != bad
    assert post("/v1/recommendations", b'{"user_id":"u"}', {**JSON, "x-request-id": "r9"}).json()["request_id"] == "r9"


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (RequestError(503, "overloaded", "too many requests at once", "", "try again", 2), 503, "overloaded"),
        (ArtifactError("/home/secret/bundle is torn"), 503, "unavailable"),
        (ValueError("/home/secret/path"), 500, "internal"),
    ],
)
def test_faults_inside_say_nothing_about_the_inside(fault: Exception, status: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAKE, "fault", fault)
    event = b'{"events":[{"user_id":"u","item_id":"i","event":"view"}]}'
    for path, body in (("/v1/recommendations", b'{"user_id":"u"}'), ("/v1/events", event)):
        answer = post(path, body)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == kind
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
        if status == 503:
            assert int(answer.headers["retry-after"]) >= 1


def test_health_follows_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAKE, "up", False)
    assert ask("GET", "/healthz").status_code == 503


def test_the_document_names_every_status_and_both_bodies() -> None:
    document = ask("GET", "/openapi.json").json()
    statuses = document["paths"]["/v1/recommendations"]["post"]["responses"].keys()
    assert {"200", "400", "413", "415", "422", "503"} == set(statuses)
    assert "404" in document["paths"]["/v1/items/{item_id}/similar"]["get"]["responses"]
    known = document["components"]["schemas"]
    text = json.dumps(document)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in known
    assert known["RecommendationRequest"]["properties"]["k"]["maximum"] == 100
    methods = {path: set(document["paths"][path]) for path in ("/v1/items/{item_id}", "/v1/users/{user_id}", "/v1/identities/{alias}")}
    assert [*methods.values()] == [{"put", "get", "delete"}, {"put", "delete"}, {"delete"}]
    assert {"ItemChanges", "UserChanges", "IdentityRequest", "Promotion"} <= known.keys()
    assert "HTTPValidationError" not in text


def legal(answer: httpx.Response) -> None:
    assert answer.status_code in {200, 400, 404, 405, 413, 415, 422}, (answer.status_code, answer.text)
    if answer.status_code != 200:
        ErrorBody.model_validate(answer.json())


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=150)
@given(st.binary(max_size=300), st.sampled_from(["/v1/recommendations", "/v1/events", "/v1/identities", "/v1/items/i", "/v1/users/u"]))
def test_any_bytes_get_a_4xx(raw: bytes, path: str) -> None:
    legal(put(path, raw) if path[-2] == "/" else post(path, raw))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["item_id", "timestamp", "event", "a"]), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(["user_id", "k", "history", "exclude", "filters", "context", "x"]), VALUES))
def test_any_fields_get_an_answer_or_a_4xx(body: dict[str, Any]) -> None:
    legal(post("/v1/recommendations", json.dumps({"user_id": "u", **body}).encode()))


CHANGES = ["available", "stock", "price", "promotion", "title", "category", "brand", "created_at", "attributes", "x"]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(CHANGES), VALUES))
def test_any_changes_get_an_answer_or_a_4xx(body: dict[str, Any]) -> None:
    legal(put("/v1/items/i", json.dumps(body).encode()))
    legal(put("/v1/users/u", json.dumps({"attributes": body}).encode()))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=100)
@given(st.text(min_size=1, max_size=30), st.text(max_size=5))
def test_any_item_id_and_k_get_an_answer_or_a_4xx(item: str, k: str) -> None:
    item, k = (quote(text.encode("utf-8", "replace"), safe="") for text in (item, k))
    legal(ask("GET", f"/v1/items/{item}/similar?k={k}"))
    for method, path in (("GET", "items"), ("DELETE", "items"), ("DELETE", "users"), ("DELETE", "identities")):
        legal(ask(method, f"/v1/{path}/{item}"))
