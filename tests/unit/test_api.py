"""Wire types: strict JSON, strict fields, errors that never repeat the input."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple.schema import EVENT_TYPES
from maple.serve.api import EventIn, EventsRequest, ItemChanges, RecommendationRequest, RequestError, UserChanges, iso, read_json

OK = {"user_id": "u1"}


def read(**fields: object) -> RecommendationRequest:
    return RecommendationRequest.read(json.dumps({**OK, **fields}).encode())


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400), (b"{", 400), (b"nul", 400), (b"[1,]", 400), (b"{'user_id': 'a'}", 400), (b'{"user_id":"a"} x', 400),
        (b'\xef\xbb\xbf{"user_id":"a"}', 400), ('{"user_id":"a"}'.encode("utf-16"), 400), (b'{"user_id":"\xff"}', 400),
        (b"[" * 100_000, 400), (b'{"a":' * 100_000, 400),
        (b'{"user_id":"a","k":NaN}', 422), (b'{"user_id":"a","k":Infinity}', 422), (b'{"user_id":"a","k":-Infinity}', 422),
        (b'{"user_id":"a","k":1e400}', 422), (b'{"user_id":"a","k":' + b"9" * 5000 + b"}", 422),
        (b'{"user_id":"\\ud800"}', 422), (b'{"\\udfff":1}', 422), (b'{"user_id":"a","user_id":"b"}', 422),
        (b"null", 422), (b"[]", 422), (b'"a"', 422), (b"1", 422),
    ],
)  # fmt: skip
def test_raw_bytes_that_are_refused(raw: bytes, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        RecommendationRequest.read(raw)
    assert caught.value.status == status
    assert len(json.dumps(caught.value.plain("r"))) < 2048


@pytest.mark.parametrize(
    "fields",
    [
        {"user_id": ""}, {"user_id": None}, {"user_id": 5}, {"user_id": "a" * 257}, {"user_id": "é" * 129}, {"user_id": "a\x00"},
        {"user_id": "a\r\nb"}, {"k": 0}, {"k": -1}, {"k": 101}, {"k": 10**9}, {"k": True}, {"k": "10"}, {"k": 10.0}, {"k": None},
        {"history": [{"item_id": "i"}]}, {"history": [{"item_id": "i", "timestamp": "2026-01-01T00:00:00"}]},
        {"history": [{"item_id": "i", "timestamp": 1_700_000_000}]}, {"history": [{"item_id": "i", "timestamp": True}]},
        {"history": [{"item_id": "i", "timestamp": "2026-01-01T00:00:00Z", "event": "bought"}]},
        {"history": [{"item_id": "i", "timestamp": "2026-01-01T00:00:00Z"}] * 1001}, {"history": {}},
        {"exclude": ["i"] * 1001}, {"exclude": "i"}, {"exclude": [1]}, {"filters": {"category": []}}, {"filters": {"category": "a"}},
        {"filters": {"category": [["a"]]}}, {"filters": {str(n): ["a"] for n in range(17)}}, {"context": {"a": {}}},
        {"attributes": {"a": {}}}, {"attributes": {"a": ["x", 1]}}, {"attributes": {str(n): 1 for n in range(65)}}, {"attributes": []},
        {"context": {"a": "x" * 257}}, {"context": {str(n): 1 for n in range(33)}}, {"limit": 3},
    ],
)  # fmt: skip
def test_fields_that_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.kind) == (422, "invalid_request")
    assert caught.value.where
    assert caught.value.hint


def test_what_is_accepted() -> None:
    request = read(
        k=100, exclude=["a/../b", "'; DROP TABLE x", "ключ"], filters={"category": ["a", 1, 2.5, True]}, context={"page": "home"},
        history=[{"item_id": "i", "timestamp": "2026-01-31T12:00:00.000001+01:00", "event": "purchase"}],
    )  # fmt: skip
    assert request.history is not None
    assert request.history[0].timestamp == 1_769_857_200_000_001
    assert request.filters["category"] == ["a", 1, 2.5, True]
    assert read().k == 10


def test_integer_microseconds_equal_the_iso_time() -> None:
    read_at = [
        EventIn.read(json.dumps({"user_id": "u", "item_id": "i", "event": "view", "timestamp": when}).encode()).timestamp
        for when in (1_769_857_200_000_000, "2026-01-31T11:00:00Z", "2026-01-31T12:00:00+01:00")
    ]
    assert len(set(read_at)) == 1


def test_every_event_type_of_the_schema_is_an_event_of_the_api() -> None:
    events = [{"user_id": "u", "item_id": "i", "event": name} for name in EVENT_TYPES]
    assert len(EventsRequest.read(json.dumps({"events": events}).encode()).events) == len(EVENT_TYPES)


def test_unknown_field_is_not_repeated_but_the_near_one_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        RecommendationRequest.read(b'{"user_id": "u", "filterz": 1}')
    said = json.dumps(caught.value.plain("r"))
    assert "filterz" not in said
    assert "'filters'" in said


def test_changes_hold_what_was_sent_and_nothing_else() -> None:
    sent = ItemChanges.read(
        b'{"price": 3, "stock": null, "promotion": {"end": "2026-01-31T11:00:00Z"}, "attributes": {"a": null, "b": [ "x" ]}}'
    )
    assert sent.given() == {"price": 3, "stock": None, "promotion": (None, 1_769_857_200_000_000), "attributes": {"a": None, "b": ["x"]}}
    assert ItemChanges.read(b"{}").given() == {}
    assert ItemChanges.read(b'{"promotion": null}').given() == {"promotion": None}
    assert UserChanges.read(b'{"attributes": {"age": 4, "vip": true, "name": null}}').attributes == {"age": 4, "vip": True, "name": None}


def test_times_go_out_as_iso_and_come_back_the_same() -> None:
    assert iso(None) is None
    for at in (1_769_857_200_000_001, 1 << 47):
        text = json.dumps({"created_at": iso(at)})
        assert ItemChanges.read(text.encode()).created_at == at


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def refusal_of(body: bytes) -> RequestError | None:
    try:
        RecommendationRequest.read(body)
    except RequestError as refusal:
        return refusal
    return None


@given(ANY)
def test_any_json_is_read_or_refused(value: object) -> None:
    try:
        out = read_json(json.dumps(value).encode())
    except RequestError:
        return  # any other exception fails the test
    assert out == value


MARKER = "zqxjkvbp"
ODD = [
    MARKER, [MARKER], {MARKER: MARKER}, [{MARKER: 1}], {"item_id": MARKER}, 1e9, -1, None,
    [{"item_id": MARKER + "\n", "timestamp": MARKER}],
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(["user_id", "k", "history", "exclude", "filters", "context", MARKER]), st.sampled_from(ODD)))
def test_no_refusal_repeats_the_input(body: dict[str, object]) -> None:
    refusal = refusal_of(json.dumps(body).encode())
    assert refusal is None or MARKER not in json.dumps(refusal.plain("r"))
