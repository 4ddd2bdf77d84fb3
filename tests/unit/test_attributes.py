"""Columns of users, items and contexts as features: what is fitted of each type, how values are read on both sides, what is refused."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shop import ITEMS, T0, Happening, offline, online, table

from maple.data.dataset import Dataset, Histories
from maple.errors import ArtifactError, ConfigError
from maple.features.attributes import Encoding, Field, Kind, passed, plain_rows
from maple.features.content import ItemContent
from maple.features.extras import Extras, Requests
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.train.rows import contexts_of, queries_at

SPEC = FeatureSpec()
USERS = pa.table(
    {
        "user_id": ["u", "v", "w", "x"],
        "age": pa.array([20, 30, None, 99], pa.int32()),
        "income": pa.array([Decimal("1.5"), None, None, None], pa.decimal128(5, 2)),
        "city": ["Oslo", "Rome", "Oslo", "Paris"],
        "name": ["A", "B", "C", "D"],
        "email_id": ["a", "a", "b", "b"],
        "club": [True, False, None, True],
        "born": pa.array([date(2000, 1, 1), None, None, None]),
        "likes": [["tea", "art"], ["tea"], None, ["tea"]],
        "nested": pa.array([{"a": 1}] * 4),
        "empty": pa.nulls(4, pa.float64()),
    }
)
LOG = [Happening("u", "apple", "purchase", 0), Happening("v", "cup", "view", 1), Happening("w", "cup", "purchase", DAY)]


def data() -> Dataset:
    events = table(online(LOG)).append_column("device", pa.array(["app", "web", "app"]))
    events = events.append_column("shelf", pa.array([7, 8, None], pa.int64())).append_column("visitor_id", pa.array(["1", "2", "3"]))
    items = ITEMS.append_column("margin", pa.array([0.1, 0.2, 0.3, 0.4, None], pa.float32()))
    return Dataset.from_tables(events, items, USERS)


def by_name(fields: tuple[Field, ...]) -> dict[str, Field]:
    return {field.name: field for field in fields}


def test_what_is_taken_by_itself() -> None:
    fitted = Encoding.fit(data(), SPEC)
    users, items = by_name(fitted.user), by_name(fitted.item)
    assert {name: field.kind for name, field in users.items()} == {
        "age": Kind.NUMBER, "income": Kind.NUMBER, "club": Kind.CODE, "born": Kind.TIME, "likes": Kind.TAGS, "city": Kind.CODE,
    }  # fmt: skip
    assert users["city"].values == ("Oslo", "Rome"), "who has no events is not looked at"
    assert users["likes"].values == ("art", "tea")
    assert set(items) == {"category", "margin"}, "of the items with events all have one brand"
    assert by_name(fitted.context) == {"device": Field("device", Kind.CODE, ("app", "web"))}
    assert Encoding.of(json.loads(json.dumps(fitted.plain()))) == fitted


def test_what_is_named_is_taken_and_what_cannot_be_is_refused() -> None:
    def fit(**attributes: Any) -> Encoding:
        return Encoding.fit(data(), FeatureSpec.parse({"attributes": attributes, "context": ["shelf", "surface"]}, "test"))

    fitted = fit(user=["name", "age"], item=["price"])
    assert [field.name for field in fitted.user] == ["name", "age"]
    assert fitted.user[0].values == ("A", "B", "C")
    assert fitted.item == (Field("price", Kind.NUMBER),)
    assert fitted.context == (Field("shelf", Kind.CODE, ("7", "8")),)
    assert fit(user=["name"], max_values=2).user[0].values == ("A", "B"), "of equally frequent ones the first"
    with pytest.raises(ConfigError, match=r"attributes.user: unknown column 'agge'.*Did you mean 'age'"):
        fit(user=["agge"])
    with pytest.raises(ConfigError, match=r"column 'nested' is struct.*cannot be a feature"):
        fit(user=["nested"])


def test_values_of_requests_and_of_tables_are_read_alike() -> None:
    fields = by_name(Encoding.fit(data(), SPEC).user)
    assert fields["city"].encode(["Rome", "Oslo", "Bonn", None, "", 3, ["Oslo"]])[0].tolist() == [1, 0, -1, -1, -1, -1, -1]
    assert fields["club"].encode([True, False, "true", None])[0].tolist() == [1, 0, 1, -1]
    numbers = fields["age"].encode([20, 20.5, "7", "seven", None, True, math.inf, 10**400, Decimal("2.5"), [1]])[0]
    np.testing.assert_array_equal(numbers, np.array([20, 20.5, 7, *[np.nan] * 2, 1, np.nan, np.nan, 2.5, np.nan], np.float32))
    art, tea = fields["likes"].encode([["tea"], [], None, "art", ["art", "x", 3]])
    np.testing.assert_array_equal(art, np.array([0, 0, np.nan, 1, 1], np.float32))
    np.testing.assert_array_equal(tea, np.array([1, 0, np.nan, 0, 0], np.float32))
    born = datetime(2000, 1, 1, tzinfo=UTC)
    micro = born.timestamp() * 1e6
    told = [date(2000, 1, 1), "2000-01-01", "2000-01-01T01:00:00+01:00", born, micro, "soon", None, True]
    np.testing.assert_array_equal(fields["born"].encode(told)[0], [micro] * 5 + [np.nan] * 3)
    whole = Field("shelf", Kind.CODE, ("1234567", "2.5"))
    assert whole.encode([1234567, 1234567.0, "1234567", 2.5, math.nan])[0].tolist() == [0, 0, 0, 1, -1]


def test_time_that_has_passed() -> None:
    now = np.array([T0, T0, T0])
    np.testing.assert_allclose(passed(np.array([T0 - 3.0 * DAY, T0 + 1.0, np.nan]), now), [math.log(4), np.nan, np.nan], rtol=1e-6)


@given(
    st.lists(
        st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=5), st.lists(st.text(max_size=3), max_size=3)),
        max_size=8,
    )
)
def test_no_value_fails_a_request(values: list[Any]) -> None:
    for kind in Kind:
        for column in Field("x", kind, ("a", "1")).encode(values):
            assert column.shape == (len(values),)
            assert column.dtype == {Kind.CODE: np.int32, Kind.TIME: np.float64}.get(kind, np.float32)


def test_rows_of_users_as_requests_would_give_them() -> None:
    rows = dict(plain_rows(USERS))
    born = {"born": "2000-01-01"}
    assert (
        rows["u"] == {"age": 20, "income": 1.5, "city": "Oslo", "name": "A", "email_id": "a", "club": True, "likes": ["tea", "art"]} | born
    )
    assert rows["w"] == {"city": "Oslo", "name": "C", "email_id": "b"}
    assert json.loads(json.dumps(rows)) == rows


def test_vocabularies_know_the_training_part_only() -> None:
    early = Extras.fit(data(), SPEC, until=T0 + 1)
    assert early.encoding.context == (Field("device", Kind.CODE, ("app",)),)
    assert by_name(early.encoding.user)["likes"].values == ("art", "tea")
    assert "city" not in by_name(early.encoding.user), "one value says nothing"


def test_columns_of_a_request() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 0], [-1, 0]], np.float32)
    extras = Extras.fit(data(), SPEC, content={"text": ItemContent(vectors, {}, {})})
    one = (np.array([0, 2]), np.array([1, 1]), np.array([T0, T0 + 7 * DAY]))  # the cup a week after the apple
    asked = Requests(
        np.array([T0 + 8 * DAY] * 2), Histories.of([one, ([], [], [])]), [{"device": "web", "mood": "good"}, {}],
        [{"age": 5, "city": "Rome"}, {"city": "Bonn"}],
    )  # fmt: skip
    got = extras.columns(asked, np.array([0, 3, 4]), np.array([0, 3, 7, 4], np.int32))
    assert tuple(got) == extras.names
    assert got["context.device"].tolist() == [1, 1, 1, -1]
    assert got["user.attribute.city"].tolist() == [1, 1, 1, -1]
    np.testing.assert_array_equal(got["user.attribute.age"], np.array([5, 5, 5, np.nan], np.float32))
    np.testing.assert_array_equal(got["item.attribute.margin"], np.array([0.1, 0.4, np.nan, np.nan], np.float32))
    assert got["item.attribute.category"].tolist() == [0, 1, -1, -1]
    np.testing.assert_array_equal(got["item.content.text.0"], np.array([1, np.nan, np.nan, -1], np.float32))
    profile = np.array([0.6, 0.8]) + np.array([1, 0]) / 2
    expected = [profile[0] / np.linalg.norm(profile), np.nan, np.nan, np.nan]
    np.testing.assert_allclose(got["user_item.content.text"], expected, rtol=1e-6)


def test_brand_new_items_have_what_is_known_of_them() -> None:
    extras = Extras.fit(data(), SPEC, content={"text": ItemContent(np.eye(5, 2, dtype=np.float32), {}, {})})
    new = pa.table({"item_id": ["fork", "gum"], "category": ["home", None], "margin": pa.array([None, 0.5])})
    live = extras.extended(new, {"text": np.array([[0, 1], [0, 0]], np.float32)})
    asked = Requests(np.array([T0 + DAY]), Histories.of([([], [], [])]), [{}], [{}])
    got = live.columns(asked, np.array([0, 4]), np.array([5, 6, 7, 2], np.int32))
    assert got["item.attribute.category"].tolist() == [1, -1, -1, 1]
    np.testing.assert_array_equal(got["item.attribute.margin"], np.array([np.nan, 0.5, np.nan, 0.3], np.float32))
    np.testing.assert_array_equal(got["item.content.text.1"], np.array([1, np.nan, np.nan, np.nan], np.float32))
    assert np.isnan(got["user_item.together.count"]).all()


def test_stored_extras_are_checked() -> None:
    extras = Extras.fit(data(), SPEC).at(T0 + DAY)
    again = Extras.from_tensors(json.loads(json.dumps(extras.plain())), extras.tensors(), 5, {})
    assert again.names == extras.names
    with pytest.raises(ArtifactError, match="not those of 6 items"):
        Extras.from_tensors(extras.plain(), extras.tensors(), 6, {})
    with pytest.raises(ArtifactError, match="publish the bundle again"):
        Extras.from_tensors(extras.plain(), {}, 5, {})


def test_requests_of_the_past_say_what_the_event_they_led_to_says() -> None:
    made, users = data(), np.arange(4, dtype=np.int32)
    assert made.users.ids.to_pylist() == ["u", "v", "w", "x"]
    assert contexts_of(made, users, T0, T0 + DAY) == [{"device": "app", "shelf": "7"}, {}, {}, {}]
    assert contexts_of(made, users[::-1], T0 + 1, T0 + DAY + 1) == [{}, {"device": "app"}, {}, {}], "a view is no target"
    (query,) = queries_at(made, users[:1], T0 + DAY, history_limit=5, contexts=[{"device": "tv"}])
    assert query.context == {"device": "tv"}
    assert query.attributes == dict(plain_rows(USERS))["u"]


def test_a_log_without_circumstances_has_none() -> None:
    plain = offline(online(LOG))
    assert plain.contexts == {}
    assert contexts_of(plain, np.array([0], np.int32), T0, T0 + DAY) == [{}]
    assert "visitor_id" not in data().contexts
    assert data().before(T0 + 1).log.context["device"].tolist() == [0]
