"""Offline equals online on real shops: every event is appended to a store, one at a time and in order; then what the store knew at random
moments is held against what the log says of them, for every feature of every view.

A moment lies strictly between two timestamps of the shop. The online side is a request at that moment: the user's state as the store
read it then, and of items what a bundle made from the events before the last closed tick holds. The offline side reads the whole log.
Two values agree if both are missing or if they differ by at most 1e-6 of their size plus 1e-7: features are float32 (6e-8 apart), the
sums behind them are float64 in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from harness import data_folder, row
from redis_here import redis_here

from maple.artifacts import Place
from maple.data.dataset import Dataset
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.snapshot import Snapshot
from maple.features.catalogue import Catalogue
from maple.features.extras import Extras
from maple.features.folder import Folder
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.states import UserState
from maple.features.store import Event, OnlineStore
from maple.features.store_redis import RedisStore
from maple.features.store_sqlite import SqliteStore
from maple.features.ticks import ItemReader, ItemTimeline, StoredItems, partials
from maple.features.together import Pairs
from maple.hashing import rng
from maple.recommend.engine import Query
from maple.recommend.rankers import LogFeatures, StateFeatures
from maple.train.rows import queries_at

COMMAND = "python benchmarks/data.py --only parity"
SHOPS = ("online-retail", "complete-journey")
POINTS = 1000
CANDIDATES = 20
RTOL, ATOL = 1e-6, 1e-7


@dataclass(frozen=True)
class Point:
    """A user at a moment that lies between timestamps, and the codes of items to ask about (-1 = an unknown one)."""

    user: str
    at: int
    items: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Parity:
    """What was compared. ``worst``: the columns that differ, with an example each."""

    points: int
    cells: int
    mismatches: int
    worst: Mapping[str, str]


def run(scratch: Path) -> list[dict[str, Any]]:
    """The rows of this part."""
    rows = []
    for shop in SHOPS:
        snapshot = ingest_local(*load_source(shop, data_folder() / shop), Place.at(scratch / shop))
        data, spec = snapshot.dataset(), FeatureSpec()
        asked = points(data, POINTS)
        folder = Folder(spec, Catalogue.of(data))
        states: dict[str, list[UserState]] = {}
        store: OnlineStore = SqliteStore(scratch / f"{shop}.sqlite", folder, durable=False)
        states["sqlite"] = replay(snapshot, store, asked)
        with redis_here(scratch / f"{shop}.redis", durable=False) as url:
            store = RedisStore(url, folder, durable=False)
            states["redis"] = replay(snapshot, store, asked)
        for backend, found in compare(data, spec, asked, states).items():
            for column, example in found.worst.items():
                print(f"  {shop} {backend}: {column} {example}")
            what = f"of {found.cells} values at {found.points} points, {snapshot.num_events} events appended one by one"
            rows.append(row(f"data/parity/{shop}/{backend}/mismatches", found.mismatches, "values", what, None, COMMAND))
    return rows


def points(data: Dataset, count: int, seed: int = 1) -> list[Point]:
    """Random points by time: the user of a random event, at a moment after it and before their next one, or (one in twenty) any user at
    any moment. Of the items half are the user's own, the rest any, and the last is unknown."""
    draw = rng(seed, "parity")
    moments = np.unique(data.log.time)
    gaps = np.flatnonzero(np.diff(moments) > 1)
    ends = np.append(data.log.time[1:], moments[-1])
    ends[data.offsets[1:] - 1] = moments[-1]
    out: list[Point] = []
    while len(out) < count:
        place = int(draw.integers(len(data.log)))
        user, low, high = int(data.log.user[place]), int(data.log.time[place]), int(ends[place])
        if draw.random() < 0.05:
            user, low, high = int(draw.integers(len(data.users))), int(moments[0]), int(moments[-1])
        first, last = np.searchsorted(moments[gaps], (low, high))
        if first == last:
            continue  # nothing lies between
        gap = gaps[draw.integers(first, last)]
        at = int(draw.integers(moments[gap] + 1, moments[gap + 1]))
        own = data.log.item[data.offsets[user] : data.offsets[user + 1]]
        own = np.unique(own[own >= 0])
        mixed = np.concatenate([draw.permutation(own)[: CANDIDATES // 2], draw.integers(0, len(data.items), CANDIDATES)])
        items = np.append(mixed[: CANDIDATES - 1], -1).astype(np.int32)
        out.append(Point(data.users.decode(np.array([user]))[0], at, items))
    return sorted(out, key=lambda point: point.at)


def replay(snapshot: Snapshot, store: OnlineStore, asked: Sequence[Point]) -> list[UserState]:
    """Append every event on its own, by (time, event id); the state of each point's user when everything before it was appended."""
    users = snapshot.users()
    if users is not None:
        store.backfill_users(users)
    waiting = iter(asked)
    point = next(waiting, None)
    states = []
    for event in in_time(snapshot.events()):
        while point is not None and point.at < event.timestamp:
            states.append(store.get([point.user])[point.user])
            point = next(waiting, None)
        store.append([event])
    assert point is None, "every point lies before the last event"
    store.close()
    return states


def in_time(table: pa.Table) -> list[Event]:
    """The events of an EVENTS table by (time, event id)."""
    names = ["event_id", "user_id", "item_id", "event", "timestamp", "value", "price"]
    table = table.select(names).sort_by([("timestamp", "ascending"), ("event_id", "ascending")])
    table = table.set_column(4, "timestamp", table["timestamp"].cast(pa.int64()))
    return [Event(*each) for each in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def compare(data: Dataset, spec: FeatureSpec, asked: Sequence[Point], states: Mapping[str, Sequence[UserState]]) -> dict[str, Parity]:
    """What the states of each backend say at the points, against the log."""
    catalogue = Catalogue.of(data)
    extras = Extras.fit(data, spec)
    logged = LogFeatures(LogReader(data, spec), ItemReader(ItemTimeline.from_data(data, spec)), extras)
    offsets = np.arange(len(asked) + 1, dtype=np.int64) * CANDIDATES
    queries = [
        queries_at(data, data.users.encode([point.user]), point.at, history_limit=spec.history_limit)[0] for point in asked
    ]  # fmt: skip
    past = logged.columns(queries, offsets, np.concatenate([point.items for point in asked]))
    bundles = _Bundles(data, spec, catalogue, extras)
    wrong = dict.fromkeys(states, 0)
    worst: dict[str, dict[str, str]] = {backend: {} for backend in states}
    for place, point in enumerate(asked):
        served = bundles.at(point.at)
        for backend, found in states.items():
            state = found[place]
            query = Query(point.user, data.items.encode(state.items), state.events, state.times, point.at, state=state)
            live = served.columns([query], np.array([0, CANDIDATES]), point.items)
            assert set(live) == set(past), "both sides give the same columns"
            for name, column in live.items():
                expected = past[name][offsets[place] : offsets[place + 1]]
                bad = ~np.isclose(column, expected, rtol=RTOL, atol=ATOL, equal_nan=True)
                if bad.any():
                    wrong[backend] += int(bad.sum())
                    at = int(np.flatnonzero(bad)[0])
                    worst[backend][name] = f"{column[at]} online, {expected[at]} offline, user {point.user} at {point.at}"
    cells = len(past) * len(asked) * CANDIDATES
    return {backend: Parity(len(asked), cells, wrong[backend], worst[backend]) for backend in states}


class _Bundles:
    """What a bundle that is made at a moment serves: it knows of items what happened before its last closed tick, and nothing after."""

    def __init__(self, data: Dataset, spec: FeatureSpec, catalogue: Catalogue, extras: Extras) -> None:
        self._data, self._spec, self._catalogue, self._extras = data, spec, catalogue, extras
        self._tick: int | None = None
        self._week: int | None = None

    def at(self, moment: int) -> StateFeatures:
        """Moments are asked for in order."""
        tick = moment // self._spec.tick - 1
        if tick != self._tick:
            before = self._data.before((tick + 1) * self._spec.tick)
            timeline = ItemTimeline.of([partials(before, self._spec)], self._spec, self._catalogue)
            self._tick, self._items = tick, StoredItems(timeline.read(tick))
        settings = self._spec.together
        if settings is not None and moment // settings.tick - 1 != self._week:
            self._week = moment // settings.tick - 1
            pairs = Pairs.of(self._data.before((self._week + 1) * settings.tick), settings)
            self._extras = replace(self._extras, together=pairs.at(self._week))
        return StateFeatures(self._spec, self._catalogue, self._items, self._extras)
