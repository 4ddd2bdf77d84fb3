"""Known answers of the views on a tiny shop, the feature list, and the settings that choose views."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from shop import HOUR, ITEMS, T0, Happening, offline, online, user_columns

from maple.data.dataset import Vocab
from maple.errors import ConfigError
from maple.features.attributes import Encoding, Field, Kind
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.log_reader import LogReader
from maple.features.page import listing, markdown, plain
from maple.features.spec import FeatureSpec
from maple.features.states import context_columns
from maple.features.ticks import ItemReader, ItemTimeline
from maple.features.view import Entity
from maple.features.views import VIEWS

SPEC = FeatureSpec()
LOG = [
    Happening("u", "apple", "view", 0),
    Happening("u", "apple", "purchase", 2 * HOUR, value=2.0, price=1.5),
    Happening("u", "cup", "purchase", 2 * HOUR, value=1.0),  # the catalogue's price: 8
    Happening("u", "apple", "purchase", 2 * DAY, value=1.0, price=1.5),
    Happening("u", "cup", "return", 3 * DAY, value=1.0),
    Happening("u", "bread", "rating", 3 * DAY, value=4.0),
    Happening("u", "egg", "rating", 3 * DAY, value=2.0),
    Happening("v", "apple", "purchase", 4 * DAY, value=3.0, price=2.0),
]


def user(at: int, name: str = "u") -> dict[str, float]:
    data = offline(online(LOG), ["nobody"])
    columns = user_columns(LogReader(data, SPEC), data.users.encode([name]), np.array([T0 + at]))
    return {key: float(column[0]) for key, column in columns.items()}


def user_item(at: int, item: str, name: str = "u") -> dict[str, float]:
    data = offline(online(LOG), ["nobody"])
    reader = LogReader(data, SPEC)
    columns = reader.columns(data.users.encode([name]), np.array([T0 + at]), np.array([0, 1]), data.items.encode([item]))[1]
    return {key: float(column[0]) for key, column in columns.items()}


def item(at: int, name: str) -> dict[str, float]:
    data = offline(online(LOG))
    columns = ItemReader(ItemTimeline.from_data(data, SPEC)).item_columns(data.items.encode([name]), np.array([T0 + at]))
    return {key: float(column[0]) for key, column in columns.items()}


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-5, abs=1e-6)


def test_activity_decays_by_half_lives() -> None:
    seen = user(7 * DAY)
    assert seen["user.activity.view_7d"] == close(math.log1p(0.5))
    assert seen["user.activity.purchase_7d"] == close(math.log1p(2 * 2 ** (-(7 * 24 - 2) / 168) + 2 ** (-5 / 7)))
    assert seen["user.activity.click_7d"] == 0.0


def test_a_row_sees_only_strictly_earlier_events() -> None:
    assert user(2 * HOUR)["user.baskets.count"] == 0.0
    assert user(2 * HOUR + 1)["user.baskets.count"] == close(math.log(2))


def test_recency_and_baskets() -> None:
    seen = user(4 * DAY)
    assert seen["user.recency.tenure"] == close(math.log1p(4))
    assert seen["user.recency.any"] == close(math.log1p(1))
    assert seen["user.recency.purchase"] == close(math.log1p(2))
    gap = (2 * 24 - 2) / 24
    assert seen["user.baskets.count"] == close(math.log1p(2))  # two lines share the first basket
    assert seen["user.baskets.size"] == close(math.log1p(1.5))
    assert seen["user.baskets.gap"] == close(math.log1p(gap))
    assert seen["user.baskets.due"] == close(math.log1p(2 / gap))


def test_spend_and_prices_fall_back_to_the_catalogue() -> None:
    seen = user(2 * HOUR + 1)
    amounts = [3.0, 8.0]
    logged = np.log1p(amounts)
    assert seen["user.spend.total"] == close(math.log1p(sum(amounts)))
    assert seen["user.spend.mean"] == close(logged.mean())
    assert seen["user.spend.std"] == close(logged.std())
    assert seen["user.price_level.bought"] == close(np.log1p([1.5, 8.0]).mean())
    assert math.isnan(user(1)["user.spend.mean"])


def test_rhythm_knows_hours_and_weekends() -> None:
    seen = user(1)  # one event at midnight of a Monday
    assert seen["user.rhythm.hour_cos"] == close(1.0)
    assert seen["user.rhythm.hour_match"] == close(1.0)
    assert user(12 * HOUR, "u")["user.rhythm.hour_match"] < 0
    assert seen["user.rhythm.weekend"] == 0.0
    context = {key: float(column[0]) for key, column in context_columns(np.array([T0 + 6 * HOUR])).items()}
    assert context["context.hour_sin"] == close(1.0)
    assert context["context.weekday_sin"] == close(math.sin(2 * math.pi / 28))


def test_returns_and_ratings() -> None:
    seen = user(4 * DAY)
    assert seen["user.returns.rate"] == close(1 / (3 + 1 + 5))
    assert seen["user.ratings.mean"] == close(3.0)
    assert seen["user.ratings.std"] == close(1.0)


def test_a_user_without_events_has_zero_counts_and_missing_rest() -> None:
    seen = user(4 * DAY, "nobody")
    assert seen["user.activity.purchase_30d"] == 0.0
    assert math.isnan(seen["user.recency.any"])
    assert user_item(4 * DAY, "apple", "nobody")["user_item.bought.times"] == 0.0


def test_bought_before() -> None:
    seen = user_item(4 * DAY, "apple")
    assert seen["user_item.bought.times"] == close(math.log1p(2))
    assert seen["user_item.bought.share"] == close(1.0)
    assert seen["user_item.bought.quantity"] == close(math.log1p(3))
    assert seen["user_item.bought.due"] == close(math.log1p(2 / (46 / 24)))
    assert user_item(4 * DAY, "cup")["user_item.bought.share"] == close(0.5)
    assert user_item(4 * DAY, "cup")["user_item.interest.returned"] == close(math.log1p(1))
    assert user_item(4 * DAY, "bread")["user_item.interest.rating"] == 4.0
    assert math.isnan(user_item(4 * DAY, "dish")["user_item.recency.any"])


def test_affinity_is_a_share_of_what_has_a_category() -> None:
    data = {name: user_item(3 * DAY, name) for name in ("bread", "dish", "egg")}
    food, home = data["bread"]["user_item.category.bought_share"], data["dish"]["user_item.category.bought_share"]
    assert food + home == close(1.0)
    early, late = 2 ** (-(72 - 2) / 720), 2 ** (-24 / 720)
    assert food == close((early + late) / (2 * early + late))
    assert data["egg"]["user_item.category.bought"] == 0.0
    assert math.isnan(data["egg"]["user_item.category.recency"])


def test_price_distance() -> None:
    seen = user_item(2 * HOUR + 1, "dish")
    assert seen["user_item.price.difference"] == close(math.log1p(10) - np.log1p([1.5, 8.0]).mean())
    assert user_item(2 * HOUR + 1, "bread")["user_item.price.distance"] == close(abs(math.log1p(2) - np.log1p([1.5, 8.0]).mean()))


def test_item_features_wait_for_the_end_of_the_tick() -> None:
    assert item(2 * DAY - 1, "apple")["item.activity.purchase_1d"] == close(math.log1p(2 ** (-22 / 24)))  # day 0 closed at its end
    assert item(DAY - 1, "apple")["item.activity.purchase_1d"] == 0.0
    assert item(5 * DAY, "apple")["item.buyers.all"] == close(math.log1p(3))
    assert item(5 * DAY, "apple")["item.age.age"] == close(math.log1p(5))
    assert item(5 * DAY, "cup")["item.returns.rate"] == close(1 / 12)
    assert item(5 * DAY, "bread")["item.ratings.mean"] == close(4.0)
    assert item(5 * DAY, "dish")["item.price.percentile"] == close(0.75)
    assert math.isnan(item(5 * DAY, "dish")["item.age.age"])


def test_distinct_buyers_count_a_user_once_a_tick() -> None:
    twice = [Happening("u", "cup", "purchase", hour * HOUR) for hour in (1, 2, 3)] + [Happening("v", "cup", "purchase", HOUR)]
    data = offline(online(twice))
    columns = ItemReader(ItemTimeline.from_data(data, SPEC)).item_columns(data.items.encode(["cup"]), np.array([T0 + DAY]))
    assert float(columns["item.buyers.all"][0]) == close(math.log1p(2))
    assert float(columns["item.buyers.lines"][0]) == close(math.log(2))


def test_a_steady_rate_has_no_trend_and_a_rise_has_one() -> None:
    steady = [Happening(f"u{day}", "cup", "purchase", day * DAY) for day in range(400)]
    rising = [Happening(f"u{day}", "cup", "purchase", day * DAY) for day in range(360, 400) for _ in range(1 + 20 * (day > 395))]
    seen = []
    for made in (steady, rising):
        data = offline(online(made))
        columns = ItemReader(ItemTimeline.from_data(data, SPEC)).item_columns(data.items.encode(["cup"]), np.array([T0 + 400 * DAY]))
        seen.append(float(columns["item.trend.purchases"][0]))
    assert abs(seen[0]) < 0.05
    assert seen[1] > 0.5


def test_sessions_end_with_a_pause_of_half_an_hour() -> None:
    minute = HOUR // 60
    visits = [Happening("u", "cup", "view", at * minute) for at in (0, 10, 40, 71, 72, 72 + 1440)]
    data = offline(online(visits))

    def seen(at: int) -> dict[str, float]:
        columns = user_columns(LogReader(data, SPEC), data.users.encode(["u"]), np.array([T0 + at * minute]))
        return {key.removeprefix("user.sessions."): float(column[0]) for key, column in columns.items() if "sessions" in key}

    assert seen(0) == {"count": 0.0, "events": pytest.approx(math.nan, nan_ok=True), "minutes": pytest.approx(math.nan, nan_ok=True),
                       "start": pytest.approx(math.nan, nan_ok=True), "gap": pytest.approx(math.nan, nan_ok=True), "open": 0.0}  # fmt: skip
    first, second, third = seen(41), seen(100), seen(102 + 1440)
    assert first["count"] == close(math.log(2))
    assert (first["events"], first["minutes"]) == (close(math.log1p(3)), close(math.log1p(40)))
    assert (first["start"], first["open"]) == (close(math.log1p(41 / 1440)), 1.0)
    assert (second["count"], second["minutes"]) == (close(math.log(3)), close(math.log1p((40 + 1) / 2)))
    assert (second["gap"], second["open"]) == (close(math.log1p(71 / 1440)), 1.0)
    assert third["open"] == 1.0, "the pause is exactly the gap"
    assert seen(103 + 1440)["open"] == 0.0
    assert third["start"] == close(math.log1p(30 / 1440))


def test_a_repeat_is_an_item_bought_at_an_earlier_time() -> None:
    bought = [("cup", 0), ("cup", 0), ("dish", DAY), ("cup", DAY), ("egg", 2 * DAY), ("dish", 3 * DAY)]
    made = [Happening("u", item, "purchase", at) for item, at in bought]
    made += [Happening("u", "bread", "view", DAY), Happening("u", "bread", "purchase", 4 * DAY), Happening("v", "egg", "purchase", 0)]
    data = offline(online(made))
    u = data.users.encode(["u"])
    for at, repeats, lines in ((1, 0, 2), (DAY + 1, 1, 4), (2 * DAY + 1, 1, 5), (3 * DAY + 1, 2, 6), (4 * DAY + 1, 2, 7)):
        columns = user_columns(LogReader(data, SPEC), u, np.array([T0 + at]))
        assert float(columns["user.repeats.rate"][0]) == close(repeats / lines)


def test_taste_is_measured_from_shares_of_categories() -> None:
    made = [Happening("u", item, "view", day * DAY) for day, item in enumerate(["apple", "cup", "bread", "egg", "dish", "bread"])]
    data = offline(online(made))
    columns = user_columns(LogReader(data, SPEC), data.users.encode(["u"]), np.array([T0 + 5 * DAY + 1]))
    weight = [2 ** (-(5 - day) / 30) for day in range(6)]
    food, home = weight[0] + weight[2] + weight[5], weight[1] + weight[4]  # the egg has no category
    shares = np.array([food, home]) / (food + home)
    assert float(columns["user.category.top"][0]) == close(shares.max())
    assert float(columns["user.category.breadth"][0]) == close(-math.log((shares**2).sum()))
    assert math.isnan(user_columns(LogReader(data, SPEC), data.users.encode(["u"]), np.array([T0]))["user.brand.top"][0])


def test_names_are_distinct_and_the_page_has_them_all() -> None:
    assert len(set(SPEC.columns)) == len(SPEC.columns)
    assert {entity: len(SPEC.of(entity)) for entity in Entity} == {Entity.USER: 12, Entity.USER_ITEM: 6, Entity.ITEM: 8}
    page, rows = markdown(listing(SPEC)), plain(listing(SPEC))
    for view in SPEC.all_views:
        assert view.doc in page
        for name in view.names:
            assert f"`{name}`" in page
    assert {row["name"] for row in rows} >= set(SPEC.columns)
    by_name = {row["name"]: row for row in rows}
    assert by_name["user.activity.view_7d"] == {
        "name": "user.activity.view_7d", "view": "user.activity", "meaning": "view events", "dtype": "float32", "shape": "[queries]",
        "unit": "log(1 + events)", "half_life_days": 7.0, "key": "user", "clock": "by event",
    }  # fmt: skip
    assert by_name["item.trend.events"]["clock"] == "by tick of 24 hours"


def test_the_page_tells_what_is_beside_the_folds() -> None:
    names = {row["name"]: row for row in plain(listing(SPEC))}
    assert {"context.device", "context.surface", "user.attribute.<column>", "user_item.together.share"} < set(names)
    assert names["context.device"]["dtype"] == "int32"
    fitted = Encoding((), (Field("age", Kind.NUMBER), Field("likes", Kind.TAGS, ("art", "tea"))), (Field("made", Kind.TIME),))
    spec = SPEC.with_(together=None, content={"text": {"dim": 2, "digest": "d"}})
    rows = {row["name"]: row for row in plain(listing(spec, fitted)) if row["name"] not in spec.columns}
    assert set(rows) == {"user.attribute.age", "user.attribute.likes.art", "user.attribute.likes.tea", "item.attribute.made",
                         "item.content.text.0", "item.content.text.1", "user_item.content.text"}  # fmt: skip
    assert rows["item.attribute.made"]["unit"] == "log(1 + days)"


def test_the_page_in_the_docs_is_fresh() -> None:
    page = Path(__file__).parents[2] / "docs" / "features.md"
    assert page.read_text() == markdown(listing(FeatureSpec())) + "\n", "write it anew: maple features list > docs/features.md"


def test_half_lives_on_the_page_are_those_of_slots() -> None:
    for view in SPEC.all_views:
        told = {feature.half_life for feature in view.features.values()} - {None}
        assert told <= set(SPEC.half_lives), view.name
        assert bool(told) == any(slot.half_life for slot in view.slots), f"{view.name} fades and does not say so, or the reverse"


def test_item_views_have_only_slots_that_merge() -> None:
    for view in SPEC.all_views:
        if view.entity == Entity.ITEM:
            assert {slot.op.name for slot in view.slots} <= {"SUM", "MAX", "MIN"}


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'user.activity'"):
        FeatureSpec.parse({"views": ["user.activty"]}, "features.yaml")
    with pytest.raises(ConfigError, match="ascending"):
        FeatureSpec.parse({"half_lives": [7, 1]}, "features.yaml")
    some = FeatureSpec.parse({"views": ["user.activity", "item.price"]}, "features.yaml")
    assert some.feature_names(Entity.USER_ITEM) == ()
    assert len(some.columns) == 4 + 18 + 3
    assert FeatureSpec.parse(some.plain(), "again").digest == some.digest != SPEC.digest


def test_every_view_is_named_after_its_entity() -> None:
    assert len({f"{view.entity}.{view.name}" for view in VIEWS}) == len(VIEWS)


def test_catalogue_codes_and_percentiles() -> None:
    found = Catalogue.from_table(Vocab(ITEMS["item_id"].combine_chunks()), ITEMS)
    assert found.categories.ids.to_pylist() == ["food", "home"]
    columns = found.take(np.array([0, 3, 4, -1], np.int32))
    assert columns.category.tolist() == [0, 1, -1, -1]
    np.testing.assert_allclose(columns.price_percentile, [0.25, 0.75, np.nan, np.nan])
    assert np.isnan(columns.log_price[2:]).all()
    other = Catalogue.from_table(found.items, ITEMS.set_column(1, "category", [["food", "home", "home", "home", None]]))
    assert other.digest != found.digest
