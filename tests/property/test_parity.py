"""Offline equals online, for every feature of every view: the log read at random moments, and states folded through the real store.

The store gets the events shuffled, repeated, late and in pieces; the log has them once and in order. Equal timestamps are common.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import ITEMS, T0, Happening, offline, online

from maple.features.catalogue import Catalogue
from maple.features.content import ItemContent
from maple.features.extras import Extras
from maple.features.fold import DAY
from maple.features.folder import Folder
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.store import Event
from maple.features.store_sqlite import SqliteStore
from maple.features.ticks import ItemReader, ItemTimeline, StoredItems, partials
from maple.features.views import VIEWS
from maple.recommend.engine import Query
from maple.recommend.rankers import LogFeatures, StateFeatures
from maple.schema import TIMESTAMP
from maple.train.rows import queries_at

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


PEOPLE = pa.table(
    {
        "user_id": USERS,
        "age": pa.array([33, None, 41]),
        "city": ["Oslo", "Rome", None],
        "club": [True, False, True],
        "since": pa.array([T0 - 9 * DAY, T0 + 2 * DAY, None], TIMESTAMP),
        "likes": [["tea", "art"], [], None],
    }
)
THINGS = ITEMS.append_column("weight", pa.array([0.5, 1.5, None, 4.0, 8.0])).append_column(
    "made", pa.array([T0 - DAY, T0 + DAY, None, T0, T0 - 400 * DAY], TIMESTAMP)
)
VECTORS = ItemContent(np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 0], [-1, 0]], np.float32), {}, {})


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
    data = replace(offline(events, USERS), user_table=PEOPLE, item_table=THINGS)
    catalogue = Catalogue.of(data)
    extras = Extras.fit(data, SPEC, content={"text": VECTORS})
    items = ItemReader(ItemTimeline.from_data(data, SPEC))
    logged = LogFeatures(LogReader(data, SPEC), items, extras)
    candidates = np.array([*range(len(data.items)), -1], np.int32)
    offsets = np.array([0, len(candidates)])
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "store.db", Folder(SPEC, catalogue))
        store.backfill_users(PEOPLE)
        done = 0
        for user, at in sorted(asked, key=lambda query: query[1]):
            feed(store, [event for event in events if done <= event.timestamp - T0 < at], chaos)
            done = max(done, at)
            state = store.get([user])[user]
            known = data.items.encode(state.items)
            told = Query(user, known, state.events, state.times, T0 + at, state=state, context={"device": "tv"})
            asked_of_log = queries_at(data, data.users.encode([user]), T0 + at, history_limit=SPEC.history_limit, contexts=[told.context])
            past = logged.columns(asked_of_log, offsets, candidates)
            served = StateFeatures(SPEC, catalogue, items, extras.at(T0 + at))  # as a bundle of this moment
            live = served.columns([told], offsets, candidates)
            assert set(past) == set(live) == {*SPEC.columns, *extras.names}
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


def test_the_parity_test_covers_every_view_and_everything_beside() -> None:
    assert {type(view) for view in SPEC.all_views} == set(VIEWS)
    data = replace(offline(online([Happening(user, "cup", "purchase", 0) for user in USERS])), user_table=PEOPLE, item_table=THINGS)
    data = replace(data, log=replace(data.log, item=np.array([0, 1, 2], np.int32)))
    names = Extras.fit(data, SPEC, content={"text": VECTORS}).names
    for part in ("user.attribute.age", "user.attribute.club", "user.attribute.since", "user.attribute.likes.tea", "item.attribute.weight",
                 "item.attribute.made", "user_item.together.count", "user_item.content.text", "item.content.text.1"):  # fmt: skip
        assert part in names
