"""Offline equals online, for every feature of every view: the log read at random moments, and states folded through the real store.

The store gets the events shuffled, repeated, late and in pieces; the log has them once and in order. Equal timestamps are common.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import ITEMS, T0, Happening, offline, online

from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.folder import Folder
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.states import StateReader, hydrate
from maple.features.store import Event
from maple.features.store_sqlite import SqliteStore
from maple.features.ticks import ItemReader, ItemTimeline, StoredItems, partials
from maple.features.views import VIEWS

USERS = ("u", "v", "w")
KINDS = ("view", "click", "add_to_cart", "purchase", "purchase", "return", "rating", "like")
# few distinct moments, so that many are equal; some far apart
moments = st.sampled_from([0, 1, 2, DAY // 2, DAY, DAY + 1, 5 * DAY, 40 * DAY, 41 * DAY])
SPEC = FeatureSpec()

happenings = st.builds(
    Happening,
    user=st.sampled_from(USERS[:2]),  # w has none
    item=st.sampled_from(ITEMS["item_id"].to_pylist()),
    event=st.sampled_from(KINDS),
    at=moments,
    value=st.sampled_from([None, 1.0, 2.0, 4.5]),
    price=st.sampled_from([None, 0.0, 3.25, 100.0]),
)
queries = st.lists(st.tuples(st.sampled_from(USERS), st.one_of(moments, st.integers(0, 60 * DAY))), min_size=1, max_size=4)


def feed(store: SqliteStore, events: list[Event], chaos: random.Random) -> None:
    """Events shuffled, some of them twice, in calls of random size."""
    arriving = events + chaos.sample(events, len(events) // 2)
    chaos.shuffle(arriving)
    while arriving:
        size = chaos.choice([1, 2, 5, 100])
        store.append(arriving[:size])
        arriving = arriving[size:]


@given(st.lists(happenings, min_size=1, max_size=25), queries, st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_every_user_feature_is_the_same_offline_and_online(made: list[Happening], asked: list[tuple[str, int]], seed: int) -> None:
    chaos = random.Random(seed)
    names = [f"id{n:03d}" for n in range(len(made))]
    chaos.shuffle(names)  # the order of ids is not the order of arrival
    events = [replace(event, event_id=name) for name, event in zip(names, online(made), strict=True)]
    data = offline(events, USERS)
    catalogue = Catalogue.of(data)
    log_reader, state_reader = LogReader(data, SPEC), StateReader(SPEC, catalogue)
    items = ItemReader(ItemTimeline.from_data(data, SPEC))
    candidates = np.array([*range(len(data.items)), -1], np.int32)
    offsets = np.array([0, len(candidates)])
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "store.db", Folder(SPEC, catalogue))
        done = 0
        for user, at in sorted(asked, key=lambda query: query[1]):
            feed(store, [event for event in events if done <= event.timestamp - T0 < at], chaos)
            done = max(done, at)
            now = np.array([T0 + at])
            states = [store.get([user])[user]]
            past = hydrate(log_reader, items, data.users.encode([user]), now, offsets, candidates)
            live = hydrate(state_reader, items, states, now, offsets, candidates)
            assert tuple(past) == tuple(live) == SPEC.columns
            for name in past:
                np.testing.assert_allclose(live[name], past[name], rtol=1e-6, atol=1e-7, err_msg=f"{name} of {user} at {at}")
        store.close()


@given(st.lists(happenings, min_size=1, max_size=40), st.lists(st.integers(0, 60 * DAY), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_every_item_feature_is_what_a_bundle_of_the_last_closed_tick_holds(made: list[Happening], asked: list[int]) -> None:
    data = offline(online(made))
    catalogue = Catalogue.of(data)
    timeline = ItemTimeline.from_data(data, SPEC)
    reader = ItemReader(timeline)
    items = np.array([*range(len(data.items)), -1], np.int32)
    for at in asked:
        now = np.full(len(items), T0 + at)
        closed = int(timeline.closed(now)[0])
        before = data.before((closed + 1) * SPEC.tick)  # a bundle made at the end of that tick knows nothing else
        assert len(before.log) == 0 or int(before.log.time.max()) < T0 + at
        stored = StoredItems(ItemTimeline.of([partials(before, SPEC)], SPEC, catalogue).read(closed))
        past, live = reader.item_columns(items, now), stored.item_columns(items, now)
        for name in past:
            np.testing.assert_allclose(live[name], past[name], rtol=1e-6, atol=1e-7, err_msg=name)


@given(st.lists(happenings, min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_partials_of_disjoint_users_merge_to_the_whole(made: list[Happening]) -> None:
    data = offline(online(made))
    catalogue = Catalogue.of(data)
    whole = ItemTimeline.from_data(data, SPEC)
    parts = [partials(data.where(data.log.user == user), SPEC) for user in range(len(data.users))]
    merged = ItemTimeline.of(parts[::-1], SPEC, catalogue)
    np.testing.assert_array_equal(merged.ticks, whole.ticks)
    np.testing.assert_allclose(merged.state, whole.state, rtol=1e-12, atol=1e-12)


def test_the_parity_test_covers_every_view() -> None:
    assert {type(view) for view in SPEC.all_views} == set(VIEWS)
