"""What goes over the wire: typed requests and answers of the HTTP API, strict JSON reading, and the one shape of an error.

Strict means strict: no coercion (``true`` is not 1, ``"10"`` is not 10), no unknown fields, no NaN or infinity, every
string valid UTF-8. An error never repeats what the client sent, so a bad request cannot grow its own answer.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from maple.errors import DataError, ServeError
from maple.schema import check_id

MAX_K = 100
MAX_HISTORY = 1000
MAX_EVENTS = 1000
MICROSECONDS = 1_000_000
#: Timestamps outside [2^46 us = 1972, year 2200) are taken for another unit and refused.
EARLIEST_US, LATEST_US = 1 << 46, 7_258_118_400 * MICROSECONDS

EventName: TypeAlias = Literal["view", "click", "add_to_cart", "purchase", "return", "rating", "like", "dislike", "impression", "other"]


class RequestError(ServeError):
    """A request that is refused, as HTTP will say it: status, a stable ``type`` for programs, and what / where / what to do for people."""

    def __init__(self, status: int, kind: str, message: str, where: str = "", hint: str = "", retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.where, self.hint, self.retry_after_s = status, kind, message, where, hint, retry_after_s

    def plain(self, request_id: str) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"type": self.kind, "message": self.message, "where": self.where, "hint": self.hint}, "request_id": request_id}


# -- strict JSON -------------------------------------------------------------------------------------------------------


def read_json(raw: bytes) -> Any:
    """Plain values of a JSON document; ``RequestError`` 400 if it is not JSON in UTF-8, 422 if it holds what no field could mean."""
    if raw[:3] == b"\xef\xbb\xbf":
        raise RequestError(400, "malformed_json", "the body starts with a byte-order mark", "body", "send plain UTF-8 without it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(400, "malformed_json", "the body is not UTF-8", "body", "encode the JSON document as UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer, object_pairs_hook=_object)
    except RecursionError:
        raise RequestError(400, "malformed_json", "the body is nested too deeply", "body", "see /openapi.json for the fields") from None
    except json.JSONDecodeError as error:
        where = f"character {error.pos} of the body"
        raise RequestError(400, "malformed_json", "the body is not JSON", where, "send one JSON object") from None
    if "\\u" in text:
        _refuse_surrogates(value)
    return value


def _no_constant(name: str) -> Any:
    raise RequestError(422, "not_finite", "NaN and Infinity are not JSON", "body", "leave the field out where there is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RequestError(422, "not_finite", "a number is too large for a double", "body", "leave the field out where there is no number")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise RequestError(422, "number_too_long", "an integer has more than 20 digits", "body", "send identifiers as strings")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise RequestError(422, "duplicate_key", "an object names the same field twice", "body", "name each field once")
    return out


def _refuse_surrogates(value: Any) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str) and any("\ud800" <= char <= "\udfff" for char in item):
            raise RequestError(422, "invalid_text", "a string holds half of a surrogate pair", "body", "send whole Unicode characters")


# -- requests ----------------------------------------------------------------------------------------------------------


class Wire(BaseModel):
    """Base of everything on the wire: strict, closed, finite, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """The typed request in a raw body, or a ``RequestError`` (400, 422) that names the place and not the content."""
        value = read_json(raw)
        if not isinstance(value, dict):
            raise RequestError(422, "invalid_request", "the body must be a JSON object", "body", "see /openapi.json for its fields")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _refusal(cls, error) from None


def _id(text: str) -> str:
    try:
        return check_id(text)
    except DataError as error:
        raise ValueError(str(error)) from None


def _time(value: Any) -> Any:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("expected an ISO 8601 time such as 2026-01-31T12:00:00Z, or integer microseconds since 1970") from None
        if moment.tzinfo is None:
            raise ValueError("the time has no offset; add Z or +01:00")
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
        value = (since.days * 86_400 + since.seconds) * MICROSECONDS + since.microseconds
    if isinstance(value, int) and not isinstance(value, bool) and not EARLIEST_US <= value < LATEST_US:
        raise ValueError("the time lies before 1972 or after 2200; integers are microseconds since 1970")
    return value


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, str) and len(value) > 256):
        raise ValueError("expected true, false, a number, or text of at most 256 characters")
    return value


Id: TypeAlias = Annotated[str, AfterValidator(_id), Field(json_schema_extra={"minLength": 1, "maxLength": 256})]
Time: TypeAlias = Annotated[
    int,
    BeforeValidator(_time),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string", "format": "date-time"}, {"type": "integer"}],
            "description": "ISO 8601 with an offset, or microseconds since 1970",
        }
    ),
]
Text: TypeAlias = Annotated[str, Field(max_length=256)]
Number: TypeAlias = Annotated[float, Field(ge=-1e9, le=1e9)]
Bound: TypeAlias = Annotated[float, Field(ge=-LATEST_US, le=LATEST_US)]
Scalar: TypeAlias = Annotated[
    Any,
    BeforeValidator(_scalar),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "number"}, {"type": "string", "maxLength": 256}]}),
]
Context: TypeAlias = Annotated[dict[Text, Scalar], Field(max_length=32)]
Attribute: TypeAlias = Annotated[list[Text], Field(max_length=32)] | Scalar
Attributes: TypeAlias = Annotated[dict[Text, Attribute | None], Field(max_length=64)]


class HistoryEvent(Wire):
    """One past event of the user, as the client knows it."""

    item_id: Id
    event: EventName = "view"
    timestamp: Time


class Range(Wire):
    """Numbers from ``min`` to ``max``, both included; of a time, microseconds since 1970."""

    min: Bound | None = None
    max: Bound | None = None


class RecommendationRequest(Wire):
    """Who asks, and what may be answered."""

    user_id: Id
    k: Annotated[int, Field(ge=1, le=MAX_K, description="how many items")] = 10
    history: Annotated[
        list[HistoryEvent] | None,
        Field(max_length=MAX_HISTORY, description="if given, it is used instead of the stored history; it is not stored"),
    ] = None
    exclude: Annotated[list[Id], Field(max_length=MAX_HISTORY, description="items that may not be answered")] = []
    filters: Annotated[
        dict[Text, Annotated[list[Scalar], Field(min_length=1, max_length=100)] | Range],
        Field(max_length=16, description="item column -> accepted values, or a range of a numeric one or a time"),
    ] = {}
    context: Annotated[Context, Field(description="anything about this request: device, page, place")] = {}
    attributes: Annotated[
        Attributes,
        Field(description="of the user; for this request they win over the stored ones, and with a `history` they are all there are"),
    ] = {}


class EventIn(Wire):
    """One thing that happened. ``event_id`` makes sending twice harmless; without it, it is derived from the content."""

    user_id: Id
    item_id: Id
    event: EventName
    event_id: Id | None = None
    timestamp: Annotated[Time | None, Field(description="default: now")] = None
    value: Annotated[Number | None, Field(description="quantity of a purchase or return, stars of a rating")] = None
    price: Annotated[Annotated[float, Field(ge=0, le=1e9)] | None, Field(description="unit price")] = None
    session_id: Id | None = None
    request_id: Annotated[Id | None, Field(description="the answer that this event follows")] = None
    context: Context = {}


class EventsRequest(Wire):
    """Events to store."""

    events: Annotated[list[EventIn], Field(min_length=1, max_length=MAX_EVENTS)]


class Promotion(Wire):
    """From ``start`` on and before ``end``; without one of them, open on that side."""

    start: Time | None = None
    end: Time | None = None

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Self:
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError("the promotion ends before it starts")
        return self


class ItemChanges(Wire):
    """What changes of an item; what is left out stays, null takes back what was said live. An unknown item is added: it needs no field."""

    available: Annotated[bool | None, Field(description="false = not recommended")] = None
    stock: Annotated[Annotated[float, Field(ge=0, le=1e9)] | None, Field(description="0 = not recommended")] = None
    price: Annotated[float, Field(ge=0, le=1e9)] | None = None
    promotion: Promotion | None = None
    title: Annotated[str, Field(max_length=1024)] | None = None
    category: Id | None = None
    brand: Id | None = None
    created_at: Time | None = None
    attributes: Annotated[Attributes, Field(description="other columns of items; null takes one away")] = {}

    def given(self) -> dict[str, Any]:
        """The changes that were sent, as the live items take them."""
        out = {name: getattr(self, name) for name in self.model_fields_set}
        if self.promotion is not None:
            out["promotion"] = (self.promotion.start, self.promotion.end)
        return out


class UserChanges(Wire):
    """What a user is described by; what is left out stays, null takes an attribute away."""

    attributes: Attributes


class IdentityRequest(Wire):
    """Two ids that are one person: the histories become one, under ``user_id`` or under an id it is joined with already."""

    alias: Id
    user_id: Id

    @model_validator(mode="after")
    def _two_ids(self) -> Self:
        if self.alias == self.user_id:
            raise ValueError("alias and user_id are the same id")
        return self


# -- answers -----------------------------------------------------------------------------------------------------------


class ReasonOut(Wire):
    """Why an item is there: ``kind`` for programs, ``text`` for people, ``item_id`` of the event that spoke for it."""

    kind: str
    text: str
    item_id: str | None


class ItemOut(Wire):
    """One recommended item. ``source`` is the retriever that brought it."""

    item_id: str
    score: float
    source: str
    reason: ReasonOut | None
    title: str | None = None


class Recommendations(Wire):
    """A slate, best first, and how it came about. ``latency_ms`` per stage and in total; ``degraded`` says what was answered around."""

    request_id: str
    bundle: str
    path: list[str]
    degraded: list[str]
    latency_ms: dict[str, float]
    items: list[ItemOut]


class SimilarItem(Wire):
    item_id: str
    score: float
    title: str | None = None


class Similar(Wire):
    """The items most like one item."""

    request_id: str
    bundle: str
    item_id: str
    items: list[SimilarItem]


class Accepted(Wire):
    """Events are durable when this is answered. ``duplicates`` had been stored before and changed nothing."""

    request_id: str
    accepted: int
    duplicates: int


class PromotionOut(Wire):
    """ISO 8601 times; null = open."""

    start: str | None
    end: str | None


class ItemState(Wire):
    """What is known of an item: the bundle's columns with what was put live over them. ``version`` of its last live change, 0 = none."""

    request_id: str
    item_id: str
    in_bundle: bool
    withdrawn: bool
    version: int
    available: bool | None
    stock: float | None
    price: float | None
    promotion: PromotionOut | None
    title: str | None
    category: str | None
    brand: str | None
    created_at: str | None
    attributes: dict[str, Any]


class UserStored(Wire):
    """The change is durable."""

    request_id: str
    user_id: str


class UserRemoved(Wire):
    """What was removed; the user is gone when this is answered, and what is still sent of them is dropped."""

    request_id: str
    user_id: str
    events: int
    attributes: int
    ids: int


class Joined(Wire):
    """The ids that are one person now. ``changed`` ids have just been joined, or parted."""

    request_id: str
    user_id: str
    changed: int


class LiveInfo(Wire):
    """The live items as this process knows them; ``new`` ones are not in the bundle. ``read_s``: seconds since they were last read."""

    version: int
    items: int
    new: int
    read_s: float


class Info(Wire):
    """What is being served."""

    bundle: str
    generation: int
    placement: str
    data_fingerprint: str
    models: dict[str, str]
    num_items: int
    versions: dict[str, str]
    held: list[str]
    failed: dict[str, str]
    store: str
    live: LiveInfo


class Health(Wire):
    status: Literal["ok", "starting"]
    bundle: str | None


class ErrorDetail(Wire):
    type: str
    message: str
    where: str
    hint: str


class ErrorBody(Wire):
    """Every error of the API has this shape."""

    error: ErrorDetail
    request_id: str


# -- telling what is wrong without repeating it ------------------------------------------------------------------------


def _refusal(cls: type[BaseModel], error: ValidationError) -> RequestError:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    known = _field_names(cls)
    places, lines, hint = [], [], "see /openapi.json for the fields and their types"
    for problem in problems[:3]:
        loc, message = problem["loc"], problem["msg"]
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(loc[-1])[:64], sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else hint
            loc, message = loc[:-1], "unknown field"
        place = ".".join(_part(part, known) for part in loc) or "body"
        if place not in places:
            places.append(place)
            lines.append(f"{place}: {message.removeprefix('Value error, ')}")
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return RequestError(422, "invalid_request", "; ".join(lines)[:1000] + more, ", ".join(places), hint)


def _part(part: int | str, known: Iterable[str]) -> str:
    return str(part) if isinstance(part, int) or part in known else "*"


def _field_names(cls: type[BaseModel]) -> set[str]:
    names: set[str] = set()
    for name, field in cls.model_fields.items():
        names.add(name)
        for inner in _models_in(field.annotation):
            names |= _field_names(inner)
    return names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def iso(moment: int | datetime | None) -> str | None:
    """A time (microseconds since 1970) as ISO 8601 in UTC."""
    if moment is None:
        return None
    if isinstance(moment, int):
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=moment)
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Stage durations in milliseconds, three decimals."""
    return {name: round(value * 1e3, 3) for name, value in seconds.items()}


REQUEST_MODELS: Sequence[type[Wire]] = (RecommendationRequest, EventsRequest, ItemChanges, UserChanges, IdentityRequest)
