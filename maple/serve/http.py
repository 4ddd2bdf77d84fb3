"""The HTTP face of the service, without Ray: a FastAPI application over anything that fulfils ``Service``.

One ASGI wrapper outside the routes takes the time of arrival (the deadline starts there), gives every request an id, caps
the body while it streams, and turns whatever escapes into the API's one error shape without a traceback.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Path, Query, Request
from fastapi.openapi.utils import get_openapi
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maple import __version__
from maple.errors import DataError, MapleError
from maple.schema import check_id
from maple.serve.api import (
    MAX_K,
    REQUEST_MODELS,
    Accepted,
    ErrorBody,
    EventIn,
    EventsRequest,
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
    Wire,
)  # fmt: skip

log = logging.getLogger("maple.serve")

RECOMMEND_BYTES = 256 << 10
EVENTS_BYTES = 1 << 20
CHANGE_BYTES = 64 << 10
PathId = Annotated[str, Path(json_schema_extra={"minLength": 1, "maxLength": 256})]
W = TypeVar("W", bound=Wire)
_LEGAL_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class Call:
    """What belongs to one HTTP request besides its body: its id, and when it arrived on ``time.monotonic()``."""

    request_id: str
    arrived: float


class Service(Protocol):
    """What the API needs. Answers are JSON-ready mappings of the models in ``serve.api``; refusals are ``RequestError``."""

    async def recommend(self, request: RecommendationRequest, call: Call) -> Mapping[str, Any]: ...
    async def similar(self, item_id: str, k: int, call: Call) -> Mapping[str, Any]: ...
    async def events(self, events: list[EventIn], call: Call) -> Mapping[str, Any]: ...
    @property
    def items(self) -> Items: ...
    @property
    def people(self) -> People: ...
    def info(self) -> Mapping[str, Any]: ...
    def health(self) -> Mapping[str, Any]: ...


class Items(Protocol):
    """Single items of the live catalogue."""

    async def put(self, item_id: str, changes: ItemChanges, call: Call) -> Mapping[str, Any]: ...
    async def get(self, item_id: str, call: Call) -> Mapping[str, Any]: ...
    async def withdraw(self, item_id: str, call: Call) -> Mapping[str, Any]: ...


class People(Protocol):
    """Single users and the ids they go by."""

    async def describe(self, user_id: str, changes: UserChanges, call: Call) -> Mapping[str, Any]: ...
    async def forget(self, user_id: str, call: Call) -> Mapping[str, Any]: ...
    async def join(self, request: IdentityRequest, call: Call) -> Mapping[str, Any]: ...
    async def part(self, alias: str, call: Call) -> Mapping[str, Any]: ...


def create_app(service: Service, *, echo_request_id: bool = True) -> FastAPI:
    """The application. ``echo_request_id`` sends ``x-request-id`` back; off where a proxy in front does that already."""
    app = FastAPI(
        title="Maple", version=__version__, summary="Recommendations, similar items, events, live items, users", openapi_url="/openapi.json"
    )

    reading = _answers(Recommendations, 400, 413, 415, 422, 503)

    @app.post("/v1/recommendations", responses=reading, openapi_extra=_body("RecommendationRequest"))
    async def recommendations(request: Request) -> Response:
        """The best items for a user. A user that nobody has seen gets what is popular."""
        wanted = await read_request(request, RecommendationRequest, RECOMMEND_BYTES)
        return _json(await service.recommend(wanted, _call(request)))

    @app.get("/v1/items/{item_id:path}/similar", responses=_answers(Similar, 404, 422, 503))
    async def similar(
        request: Request,
        item_id: PathId,
        k: Annotated[str, Query(json_schema_extra={"type": "integer", "minimum": 1, "maximum": MAX_K})] = "10",
    ) -> Response:
        """The items most like an item."""
        _check(item_id, "item_id")
        if not re.fullmatch(r"[0-9]{1,3}", k) or not 1 <= int(k) <= MAX_K:
            raise RequestError(422, "invalid_request", f"k must be an integer from 1 to {MAX_K}", "k", "leave it out for 10")
        return _json(await service.similar(item_id, int(k), _call(request)))

    @app.post("/v1/events", responses=_answers(Accepted, 400, 413, 415, 422, 503), openapi_extra=_body("EventsRequest"))
    async def events(request: Request) -> Response:
        """Store events. They are durable when this answers, and the next request of that user sees them."""
        wanted = await read_request(request, EventsRequest, EVENTS_BYTES)
        return _json(await service.events(wanted.events, _call(request)))

    _item_routes(app, service)
    _people_routes(app, service)

    @app.get("/healthz", responses={200: {"model": Health}, 503: {"model": Health}})
    async def healthz() -> Response:
        """Whether this process can answer."""
        health = service.health()
        return _json(health, 200 if health["status"] == "ok" else 503)

    @app.get("/v1/info", responses=_answers(Info, 503))
    async def info() -> Response:
        """What is being served: bundle, data, models, versions."""
        return _json(service.info())

    app.exception_handler(RequestError)(refused)
    app.exception_handler(HTTPException)(_not_routed)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Boundary, echo_request_id=echo_request_id)
    return app


def _item_routes(app: FastAPI, service: Service) -> None:
    """The live catalogue: single items."""
    writing = _answers(ItemState, 400, 413, 415, 422, 503)

    @app.put("/v1/items/{item_id:path}", responses=writing, openapi_extra=_body("ItemChanges"))
    async def put_item(request: Request, item_id: PathId) -> Response:
        """Change price, stock, availability or promotion of an item, or add a new one. Durable when this answers."""
        _check(item_id, "item_id")
        changes = await read_request(request, ItemChanges, CHANGE_BYTES)
        return _json(await service.items.put(item_id, changes, _call(request)))

    @app.get("/v1/items/{item_id:path}", responses=_answers(ItemState, 404, 422, 503))
    async def get_item(request: Request, item_id: PathId) -> Response:
        """What is known of an item now."""
        _check(item_id, "item_id")
        return _json(await service.items.get(item_id, _call(request)))

    @app.delete("/v1/items/{item_id:path}", responses=_answers(ItemState, 404, 422, 503))
    async def withdraw_item(request: Request, item_id: PathId) -> Response:
        """Recommend an item no more; putting it again brings it back."""
        _check(item_id, "item_id")
        return _json(await service.items.withdraw(item_id, _call(request)))


def _people_routes(app: FastAPI, service: Service) -> None:
    """Users: what they are described by, forgetting them, and the ids that are one person."""

    @app.put("/v1/users/{user_id:path}", responses=_answers(UserStored, 400, 413, 415, 422, 503), openapi_extra=_body("UserChanges"))
    async def put_user(request: Request, user_id: PathId) -> Response:
        """Attributes of a user, such as age or membership. The next request of the user knows them."""
        _check(user_id, "user_id")
        changes = await read_request(request, UserChanges, CHANGE_BYTES)
        return _json(await service.people.describe(user_id, changes, _call(request)))

    @app.delete("/v1/users/{user_id:path}", responses=_answers(UserRemoved, 422, 503))
    async def delete_user(request: Request, user_id: PathId) -> Response:
        """Forget a user and every id joined with it: gone at once, and out of everything that is learned from now on."""
        _check(user_id, "user_id")
        return _json(await service.people.forget(user_id, _call(request)))

    @app.post("/v1/identities", responses=_answers(Joined, 400, 413, 415, 422, 503), openapi_extra=_body("IdentityRequest"))
    async def join(request: Request) -> Response:
        """A device, a guest or a second account is this user: their histories are one from now on."""
        return _json(await service.people.join(await read_request(request, IdentityRequest, CHANGE_BYTES), _call(request)))

    @app.delete("/v1/identities/{alias:path}", responses=_answers(Joined, 422, 503))
    async def part(request: Request, alias: PathId) -> Response:
        """Take it back: both histories are as if they had never been joined."""
        _check(alias, "alias")
        return _json(await service.people.part(alias, _call(request)))


class Boundary:
    """Pure ASGI, outermost: arrival time and id into the scope, ids out, and nothing but the API's error shape past it."""

    def __init__(self, app: ASGIApp, echo_request_id: bool = True) -> None:
        self.app, self.echo = app, echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["call"] = Call(request_id, time.monotonic())
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self.echo:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            if started:
                raise
            if isinstance(error, MapleError):
                log.error("request %s: %s: %s", request_id, type(error).__name__, error)
                refusal = RequestError(503, "unavailable", "the service cannot answer this now", "", "try again; its log has the reason", 1)
            else:
                log.exception("request %s failed", request_id)
                refusal = RequestError(500, "internal", "a fault inside the service", "", "its log has the reason under this request id")
            await _error(refusal, request_id)(scope, receive, sending)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _check(text: str, where: str) -> None:
    """``RequestError`` 422 for a path that is not a legal id; bytes that are not UTF-8 arrive as U+FFFD, so no path may name that."""
    if "\ufffd" in text:
        raise RequestError(422, "invalid_request", "the id in the path is not UTF-8", where, "escape the id's bytes of UTF-8")
    try:
        check_id(text, "the id")
    except DataError as error:
        raise RequestError(422, "invalid_request", str(error), where, "escape the id as one part of the path") from None


def _call(request: Request) -> Call:
    call: Call = request.scope["state"]["call"]
    return call


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _LEGAL_REQUEST_ID.fullmatch(text):
                return str(text)
            break
    return uuid.uuid4().hex


async def read_request(request: Request, model: type[W], limit: int) -> W:
    """The typed body of a request; a ``RequestError`` if it is not JSON, not of that type, or longer than ``limit`` bytes."""
    return model.read(await _raw_body(request, limit))


async def _raw_body(request: Request, limit: int) -> bytes:
    """The whole body, at most ``limit`` bytes, refused as soon as it is known to be longer."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "unsupported_media_type", "the body must be JSON", "content-type", "send `content-type: application/json`")
    stated = request.headers.get("content-length", "")
    too_long = RequestError(413, "body_too_large", f"the body is longer than {limit} bytes", "body", "send less at once")
    if stated.isdecimal() and int(stated[:20]) > limit:
        raise too_long
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_long
        chunks.append(chunk)
    return b"".join(chunks)


def _json(plain: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, status, headers, "application/json")


def _error(refusal: RequestError, request_id: str) -> Response:
    headers = {} if refusal.retry_after_s is None else {"retry-after": str(refusal.retry_after_s)}
    if refusal.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return _json(refusal.plain(request_id), refusal.status, headers)


async def refused(request: Request, error: Exception) -> Response:
    """The exception handler of ``RequestError``."""
    assert isinstance(error, RequestError)
    return _error(error, _call(request).request_id)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        refusal = RequestError(404, "not_found", "there is no such path", "path", "see /openapi.json for the paths")
    elif error.status_code == 405:
        refusal = RequestError(405, "method_not_allowed", "this path does not take that method", "method", "see /openapi.json")
    else:
        refusal = RequestError(error.status_code, "refused", "the request was refused", "", "see /openapi.json")
    answer = _error(refusal, _call(request).request_id)
    answer.headers.update(error.headers or {})
    return answer


_MEANING = {
    400: "The body is not JSON in UTF-8",
    404: "No such path, or an item that the bundle does not know",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    422: "A field is missing, unknown, of the wrong type or out of range",
    503: "Overloaded or starting; try again after `Retry-After` seconds",
}


def _answers(model: type, *statuses: int) -> dict[int | str, dict[str, Any]]:
    out: dict[int | str, dict[str, Any]] = {200: {"model": model}}
    for status in statuses:
        out[status] = {"model": ErrorBody, "description": _MEANING[status]}
    return out


def _body(name: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document plus the request models, which the routes read themselves from the raw body."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        schemas = document["components"]["schemas"]
        for model in REQUEST_MODELS:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas[model.__name__] = schema
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422, which this API never gives
            schemas.pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
