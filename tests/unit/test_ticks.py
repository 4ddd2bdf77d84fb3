"""Item timelines: which tick a time reads, storage, and reads against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
from shop import ITEMS, T0, Happening, offline, online

from maple.data.dataset import Vocab, align
from maple.errors import ArtifactError
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.features.ticks import PARTIALS, ItemReader, ItemTimeline, StoredItems, partials
from maple.hashing import rng

SPEC = FeatureSpec()


def random_log(count: int = 300) -> list[Happening]:
    draw = rng(7, "ticks")
    kinds = ["view", "purchase", "add_to_cart"]
    names = ["apple", "bread", "cup", "dish", "egg"]
    users, items, events, times = (draw.integers(bound, size=count).tolist() for bound in (9, 5, 3, 30 * DAY))
    return [Happening(f"u{u}", names[i], kinds[e], t) for u, i, e, t in zip(users, items, events, times, strict=True)]


def test_a_tick_is_closed_from_its_end_on() -> None:
    timeline = ItemTimeline.from_data(offline(online(random_log(5))), SPEC)
    day = T0 // DAY
    assert timeline.closed(np.array([T0, T0 + 1, T0 + DAY - 1, T0 + DAY])).tolist() == [day - 1, day - 1, day - 1, day]


def test_decayed_counts_equal_the_direct_sum() -> None:
    data = offline(online(random_log()))
    reader = ItemReader(ItemTimeline.from_data(data, SPEC))
    for at in (T0 + 3 * DAY + 5, T0 + 17 * DAY, T0 + 200 * DAY):
        end = at // DAY * DAY
        log = data.log
        columns = reader.item_columns(np.arange(5, dtype=np.int32), np.full(5, at))
        for item in range(5):
            rows = (log.item == item) & (log.event == 3) & (log.time < end)
            direct = np.exp2(-(end - log.time[rows]) / (7 * DAY)).sum()
            assert columns["item.activity.purchase_7d"][item] == pytest.approx(np.log1p(direct), rel=1e-5)


def test_the_same_item_and_tick_asked_twice_is_answered_twice() -> None:
    data = offline(online(random_log()))
    reader = ItemReader(ItemTimeline.from_data(data, SPEC))
    items = np.array([2, 0, 2, 2, -1], np.int32)
    now = T0 + np.array([9, 9, 9, 20, 9]) * DAY
    columns = reader.item_columns(items, now)
    for name, column in columns.items():
        assert len(column) == 5
        np.testing.assert_array_equal(column[0], column[2], err_msg=name)
        assert np.isnan(column[4])
        one = reader.item_columns(items[3:4], now[3:4])[name]
        np.testing.assert_array_equal(column[3:4], one, err_msg=name)
    assert reader.item_columns(items[:0], now[:0])["item.age.age"].shape == (0,)


def test_ticks_of_an_hour() -> None:
    spec = SPEC.with_(tick_hours=1.0)
    data = offline(online([Happening("u", "cup", "purchase", DAY // 48)]))
    reader = ItemReader(ItemTimeline.from_data(data, spec))
    seen = reader.item_columns(data.items.encode(["cup", "cup"]), np.array([T0 + DAY // 24 - 1, T0 + DAY // 24]))["item.buyers.all"]
    np.testing.assert_allclose(seen, [0.0, np.log(2)], rtol=1e-6)


def test_tables_of_shards_join_to_the_whole_and_misfits_are_refused() -> None:
    data = offline(online(random_log()))
    whole = ItemTimeline.from_data(data, SPEC)
    table = partials(data, SPEC)
    shards = []
    for names in (["cup", "apple"], ["bread", "dish", "egg"]):
        catalogue = Catalogue.from_table(Vocab.of(names), align(ITEMS, "item_id", Vocab.of(names)))
        shards.append(ItemTimeline.of([table], SPEC, catalogue).table())
    again = ItemTimeline.joined(shards[::-1], SPEC, Catalogue.of(data))
    for mine, theirs in ((again.offsets, whole.offsets), (again.ticks, whole.ticks), (again.state, whole.state)):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ArtifactError, match="does not fit the feature spec"):
        ItemTimeline.joined(shards, SPEC.with_(views=["item.trend"]), Catalogue.of(data))
    with pytest.raises(ArtifactError, match="does not know"):
        ItemTimeline.joined(shards, SPEC, Catalogue.from_table(Vocab.of(["cup"]), align(ITEMS, "item_id", Vocab.of(["cup"]))))


def test_a_timeline_is_folded_in_chunks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = offline(online(random_log()))
    whole = ItemTimeline.from_data(data, SPEC)
    monkeypatch.setattr("maple.features.ticks.CHUNK", 7)
    np.testing.assert_array_equal(ItemTimeline.from_data(data, SPEC).state, whole.state)


def test_no_item_views_and_no_events_are_timelines_too() -> None:
    data = offline(online(random_log(20)))
    bare = SPEC.with_(views=["user.baskets"])
    found = ItemTimeline.joined([ItemTimeline.from_data(data, bare).table()], bare, Catalogue.of(data))
    assert found.state.shape == (len(ItemTimeline.from_data(data, SPEC).ticks), 0)
    empty = ItemTimeline.of([PARTIALS.empty_table()], SPEC, Catalogue.of(data))
    assert len(ItemTimeline.joined([], SPEC, Catalogue.of(data)).ticks) == len(empty.ticks) == 0
    assert np.isnan(empty.read(3)["item.conversion.cart"]).all()


def test_a_catalogue_that_knows_fewer_items_leaves_the_rest_out() -> None:
    data = offline(online(random_log()))
    table = partials(data, SPEC)
    small = Catalogue.from_table(type(data.items).of(["bread", "cup"]), data.item_table.slice(1, 2))
    timeline = ItemTimeline.of([table], SPEC, small)
    whole = ItemTimeline.from_data(data, SPEC)
    now = np.full(2, T0 + 20 * DAY)
    mine = ItemReader(timeline).item_columns(np.array([0, 1], np.int32), now)
    theirs = ItemReader(whole).item_columns(np.array([1, 2], np.int32), now)
    for name in mine:
        if not name.startswith("item.price.percentile"):
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_stored_columns_are_gathered_with_missing_for_unknown() -> None:
    stored = StoredItems({"item.x": np.array([1.0, 2.0], np.float32)})
    np.testing.assert_array_equal(stored.item_columns(np.array([1, -1, 0], np.int32), np.zeros(3, np.int64))["item.x"], [2.0, np.nan, 1.0])
