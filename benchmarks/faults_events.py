"""Faults 36 and 37: clocks that are wrong, and events that come five times, in any order, and a week late.

Both are asked of what is served: the service with its store (36), both stores and the ingestion of batches (37). Nothing acknowledged
may be lost or counted twice, no duration may be negative, and what is known of every user must be, bit for bit, what one clean
replay gives.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
from data_parity import in_time
from data_store import ITEMS, event, folder, table
from faults import Outcome
from redis_here import redis_here

from maple.artifacts import Place
from maple.clock import SteadyClock
from maple.data.dataset import Dataset
from maple.data.ingest import append_local, ingest_local
from maple.data.sources import SourceConfig
from maple.features.fold import DAY
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.states import UserState
from maple.features.store import Event, OnlineStore, rows_of, to_table
from maple.features.store_redis import RedisStore
from maple.features.store_sqlite import SqliteStore
from maple.features.ticks import ItemTimeline, StoredItems
from maple.hashing import rng
from maple.models.base import FitContext
from maple.recommend.bundle import Bundle, load
from maple.recommend.engine import Query
from maple.recommend.rankers import StateFeatures
from maple.recommend.settings import PipelineSettings
from maple.serve.http import create_app
from maple.serve.service import LocalService
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_store
from maple.train.fit import fit_sources

HOUR = DAY // 24
USERS, EVENTS = 40, 4000


def fault_36(scratch: Path) -> Outcome:
    """Clocks of senders and of the server are a day off, change by an hour, or are set back: no loss, no negative duration"""
    wrong = []
    with served(scratch) as (service, wall):
        told: dict[str, int] = {}  # event id -> the service's time when it took it
        refused = negative = sent = 0
        skews = {"right": 0, "day-behind": -DAY, "hour-behind": -HOUR, "minute-ahead": 60 * 1_000_000, "hour-ahead": HOUR, "day-ahead": DAY}
        before = service.now()
        true = wall.now
        for step in (0, -DAY, DAY, -HOUR, HOUR, -DAY, -DAY):  # the server's clock is set, then ten real seconds pass
            wall.now += step
            wall.pass_by(10_000_000)
            true += 10_000_000
            negative += service.now() < before
            before = service.now()
            for name, skew in skews.items():
                sent += 1
                made = {"event_id": f"e{sent}", "user_id": f"s{sent % 3}", "item_id": "i7", "event": "purchase"}
                status, _ = ask(service, "/v1/events", {"events": [{**made, "timestamp": true + skew}]})
                if status == 200:
                    told[made["event_id"]] = service.now()
                refused += status == 422
                # a sender who is right, or only late, must never be turned away
                if status != 200 and (skew <= 0 or status != 422):
                    wrong.append(f"{name} after a step of {step / HOUR:.0f} h was answered {status}")
            status, answer = ask(service, "/v1/recommendations", {"user_id": "s0"})
            negative += status != 200 or min(answer["latency_ms"].values()) < 0
        stored = [found for user in ("s0", "s1", "s2") for found in service._stores.store.history(user)]  # type: ignore[union-attr]
        lost = set(told) - {found.event_id for found in stored}
        ahead = [found.event_id for found in stored if found.timestamp > told[found.event_id]]
    below = negative_features(scratch)
    holds = not (wrong or lost or ahead or negative or below) and len(stored) == len(told)
    measured = (
        f"{len(told)} events taken and {len(stored)} found, {refused} refused as lying in the future, {len(lost)} lost, {len(ahead)} later "
        f"than their receipt, {negative} steps back or negative latencies, {len(below)} features below zero {below[:3]} {wrong[:3]}"
    )
    return Outcome(
        holds, "what was taken is found once, no later than its receipt; only senders an hour ahead are refused; 0 negative", measured
    )


def fault_37(scratch: Path) -> Outcome:
    """Every event five times, out of order, some seven days late: states, features of items and snapshots are those of a clean replay"""
    every = folder()
    clean = [spread(each) for each in in_time(table(EVENTS, USERS, "u"))]
    arriving = delivered(clean)
    expected = {user: folded(every, clean, user) for user in sorted({each.user_id for each in clean})}
    different = {"sqlite": replayed(SqliteStore(scratch / "store.sqlite", every), arriving, expected)}
    if shutil.which("redis-server") is not None:
        with redis_here(scratch / "redis", durable=True) as url:
            different["redis"] = replayed(RedisStore(url, every), arriving, expected)
    different["ingestion in batches"] = ingested(scratch, clean, arriving)
    newest = np.maximum.accumulate([each.timestamp for each in arriving])
    late = sum(each.timestamp <= most - 6 * DAY for each, most in zip(arriving, newest.tolist(), strict=True))
    measured = ", ".join(f"{name}: {count} differ" for name, count in different.items())
    what = f"{len(arriving)} deliveries ({late} six days late or more) of {len(clean)} events of {len(expected)} users"
    return Outcome(not any(different.values()), "0 users, items or rows differ from the clean replay", f"{what}; {measured}")


# -- 36 ----------------------------------------------------------------------------------------------------------------


class Wall:
    """A machine's clocks in our hand: the wall clock, which can be set, and the ticks, which only go on."""

    def __init__(self, now: int) -> None:
        self.now, self.ticks = now, 0

    def pass_by(self, microseconds: int) -> None:
        """Time passes."""
        self.now += microseconds
        self.ticks += microseconds


@contextmanager
def served(scratch: Path) -> Iterator[tuple[LocalService, Wall]]:
    """A service on a small bundle whose clock is ours."""
    data = Dataset.from_tables(table(2000, USERS, "past"))
    page = PipelineSettings.parse({"sources": [{"name": "popularity", "model": "popularity", "quota": 20}]}, "pipeline")
    sources, _ = fit_sources(data, page, FitContext(), lambda text: None)
    digest = Bundle.assemble(page, data, sources, fingerprint="0" * 64).save(Place.at(scratch))
    settings = ServeSettings.parse({"home": str(scratch), "cache": {"size": 0}}, "serve")
    service = LocalService(settings, lambda made: open_store(settings, made))
    wall = Wall(int(data.span[1]) + DAY)
    service._clock = SteadyClock(lambda: wall.now * 1000, lambda: wall.ticks * 1000)
    service.hold({digest: service.prepare(load(Place.at(scratch), digest))}, digest, 1)
    try:
        yield service, wall
    finally:
        service.close()


def ask(service: LocalService, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer of one request through the HTTP application."""

    async def talk() -> tuple[int, Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://maple") as client:
            answer = await client.post(path, json=body)
            return answer.status_code, answer.json()

    return asyncio.run(talk())


def negative_features(scratch: Path) -> list[str]:
    """Counts, ages and recencies that are below zero where the reader's clock is up to a day behind the user's last events."""
    every = folder()
    store = SqliteStore(scratch / "skew.sqlite", every)
    now = 1_700_000_000_000_000
    store.append([event("u", number, now - DAY + number % 7 * 8 * HOUR) for number in range(50)])
    state = store.get(["u"])["u"]
    store.close()
    served = StateFeatures(every.spec, every.catalogue, StoredItems({}))
    items = np.arange(ITEMS, dtype=np.int32)
    features = {name: each for view in every.spec.all_views for name, each in zip(view.names, view.features.values(), strict=True)}
    # durations, counts and shares are never below zero; sums of money and their differences may be
    positive = {
        name for name, each in features.items() if each.unit.startswith(("log(1 +", "share")) and each.unit != "log(1 + money)"
    }  # fmt: skip
    found = []
    for at in (now - 2 * DAY, now - DAY, now - HOUR, now, now + DAY):
        query = Query("u", np.empty(0, np.int32), np.empty(0, np.int8), np.empty(0, np.int64), at, state=state)
        for name, column in served.columns([query], np.array([0, ITEMS]), items).items():
            if name in positive and (column < 0).any():
                found.append(f"{name} at {(at - now) / HOUR:.0f} h")
    assert len(positive) > 50, "most features are of that kind"
    return found


# -- 37 ----------------------------------------------------------------------------------------------------------------


def delivered(clean: Sequence[Event]) -> list[Event]:
    """Five deliveries of each event: the first within a day or (one in five) seven days late, the others any time in that week."""
    draw = rng(1, "fault 37")
    first = np.where(draw.random(len(clean)) < 0.2, 7 * DAY, draw.integers(0, DAY, len(clean)))
    delays = np.concatenate([first[:, None], np.maximum(first[:, None], draw.integers(0, 7 * DAY, (len(clean), 4)))], axis=1)
    times = np.array([each.timestamp for each in clean])[:, None] + delays
    order = np.argsort(times.ravel(), kind="stable")
    return [clean[place // 5] for place in order]


def spread(each: Event) -> Event:
    """An event every quarter of an hour: a shop of six weeks."""
    start = 1_700_000_000_000_000
    return replace(each, timestamp=start + (each.timestamp - start) * 900)


def folded(every: Folder, clean: Sequence[Event], user: str) -> UserState:
    """The state of a user, folded once and in order."""
    return every.advance([every.empty(user)], rows_of([[each for each in clean if each.user_id == user]]))[0]


def replayed(store: OnlineStore, arriving: Sequence[Event], expected: Mapping[str, UserState]) -> int:
    """How many users are known otherwise than expected, after the store got all deliveries in calls of any size, with reads in between."""
    draw = rng(2, "fault 37")
    users = sorted(expected)
    place = 0
    while place < len(arriving):
        size = int(draw.integers(1, 60))
        store.append(arriving[place : place + size])
        store.get([users[draw.integers(len(users))]])
        place += size
    states = store.get(users)
    store.close()
    pack = store.folder.pack
    return sum(pack(states[user], "") != pack(expected[user], "") for user in users)


def ingested(scratch: Path, clean: Sequence[Event], arriving: Sequence[Event]) -> int:
    """Rows and item states that differ between an ingestion of the clean events and one of the deliveries in five batches."""
    names = ("event_id", "user_id", "item_id", "event", "timestamp", "value", "price")
    page: dict[str, Any] = {"name": "shop", "events": {"path": "events-*.parquet", "columns": {name: name for name in names}}}
    page["max_quarantined_share"] = 1.0  # nearly everything is a repetition
    found = []
    for name, batches in (("clean", [clean]), ("deliveries", np.array_split(np.arange(len(arriving)), 5))):
        root, home = scratch / name, Place.at(scratch / f"{name}-home")
        root.mkdir()
        for number, batch in enumerate(batches):
            events = list(batch) if name == "clean" else [arriving[place] for place in batch]
            pq.write_table(to_table(events).select(names), root / f"events-{number}.parquet")
            take = ingest_local if number == 0 else append_local
            snapshot = take(SourceConfig.parse(page, "shop"), Place.at(root), home)
        found.append(snapshot)
    one, two = (each.events().sort_by("event_id") for each in found)
    rows = sum(left != right for left, right in itertools.zip_longest(one.to_pylist(), two.to_pylist()))
    first, second = (ItemTimeline.from_data(each.dataset(), FeatureSpec()) for each in found)
    same = np.array_equal(first.ticks, second.ticks) and np.array_equal(first.state, second.state, equal_nan=True)
    return int(rows) + (not same)
