"""The online store: appends and reads per second with their latencies, on each backend, held against what the bare medium does.

Every append is durable when it returns. The reference of an append is one bare write of the same size in the same run: to a file with
fsync for SQLite, a SET to the same Redis for Redis; of a read it is the bare SELECT or GET of the same state. A read is that of a request:
the state of one user as it is now, unpacked; ``read-after-append`` when an event has just come. Users have 40 events, ``heavy`` 8,000.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from harness import row
from redis_here import redis_here

from maple.data.dataset import Vocab
from maple.features.catalogue import Catalogue
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.store import Event, OnlineStore
from maple.features.store_redis import RedisStore
from maple.features.store_sqlite import SqliteStore
from maple.hashing import rng
from maple.schema import EVENTS, TIMESTAMP

COMMAND = "python benchmarks/data.py --only store"
USERS, ITEMS, PAST, HEAVY = 2000, 2000, 40, 8000
LOADED = 400_000  # events of the backfill that is timed
START = 1_700_000_000_000_000
SECOND = 1_000_000
KINDS = ("view", "click", "add_to_cart", "purchase")

Operation = Callable[[int], float | None]
"""One call, given its number; the seconds of the part that counts where it is not all of it."""


def run(scratch: Path) -> list[dict[str, Any]]:
    """The rows of this part."""
    rows = []
    for backend, opened in (("sqlite", sqlite_store(scratch)), ("redis", redis_store(scratch))):
        with opened as (store, bare_write, bare_read):
            rows += measured(backend, store, bare_write, bare_read)
    return rows


def measured(backend: str, store: OnlineStore, bare_write: Operation, bare_read: Operation, seconds: float = 4.0) -> list[dict[str, Any]]:
    """Load the store, then everything about one backend; ``seconds`` for each figure."""
    loaded = table(LOADED, LOADED // 100, "load")
    started = time.perf_counter()
    store.backfill(loaded)
    rate = LOADED / (time.perf_counter() - started)
    what = f"{LOADED:,} events of {LOADED // 100:,} users, their states folded"
    rows = [row(f"data/store/{backend}/backfill/events_per_s", rate, "events/s", what, None, COMMAND)]
    store.backfill(table(USERS * PAST, USERS, "u"))
    store.backfill(table(HEAVY, 1, "heavy"))
    draw = rng(2, backend)
    numbers = iter(range(1 << 60))  # of events; next() is one step of the interpreter
    recent = START + 10**6 * SECOND

    def events(user: str, count: int) -> list[Event]:
        return [event(user, next(numbers), recent) for _ in range(count)]

    def append(count: int) -> Operation:
        return lambda number: check(store.append([e for _ in range(count) for e in events(f"u{draw.integers(USERS)}", 1)]), count)

    def read(number: int) -> None:
        user = f"u{draw.integers(USERS)}"
        assert store.get([user])[user].size > 0, "the user was loaded"

    def read_after(number: int) -> float:
        user = f"u{draw.integers(USERS)}"
        store.append(events(user, 1))
        start = time.perf_counter()
        store.get([user])
        return time.perf_counter() - start

    slow_write, slow_read = timings(bare_write, 1, seconds), timings(bare_read, 1, seconds)
    store.get([f"u{number}" for number in range(USERS)])
    store.get(["heavy0"])
    written, found = np.median(slow_write) * 1e3, np.median(slow_read) * 1e3
    cases: list[tuple[str, Operation, int, int, str, float]] = [
        ("read", read, 1, 1, "bare read of a state", found),
        ("read/8-threads", read, 8, 1, "bare read of a state", found),
        ("read-after-append", read_after, 1, 1, "bare read of a state", found),
        ("read-heavy", lambda number: check(store.get(["heavy0"]), 1), 1, 1, "bare read of a state", found),
        ("append", append(1), 1, 1, "bare durable write", written),
        ("append-32", append(32), 1, 32, "bare durable write", written),
        ("append/8-threads", append(1), 8, 1, "bare durable write", written),
        ("append-32/8-threads", append(32), 8, 32, "bare durable write", written),
        ("append-heavy", lambda number: check(store.append(events("heavy0", 1)), 1), 1, 1, "bare durable write", written),
    ]
    for name, operation, threads, size, reference, value in cases:
        taken = timings(operation, threads, seconds)
        p50, p99 = np.percentile(taken, [50, 99]) * 1e3
        rows.append(row(f"data/store/{backend}/{name}/p50_ms", p50, "ms", reference, value, COMMAND))
        rows.append(row(f"data/store/{backend}/{name}/p99_ms", p99, "ms", reference, value, COMMAND))
        total = len(taken) * size * threads / taken.sum()
        unit = "users/s" if name.startswith("read") else "events/s"
        rows.append(row(f"data/store/{backend}/{name}/per_s", total, unit, f"1 / {reference}", 1e3 / value, COMMAND))
    return rows


def timings(operation: Operation, threads: int, seconds: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of each call, from so many threads that call one after the other for so long."""
    taken: list[list[float]] = [[] for _ in range(threads)]
    for number in range(5):
        operation(number)
    end = time.perf_counter() + seconds

    def work(mine: list[float]) -> None:
        while (start := time.perf_counter()) < end:
            own = operation(len(mine))
            mine.append(own or time.perf_counter() - start)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return np.concatenate(taken)


def check(answer: Any, count: int) -> None:
    """As many answers as there were questions."""
    assert len(answer) == count, "an answer is missing"


def event(user: str, number: int, after: int) -> Event:
    """An event like any other."""
    return Event(f"e{number:09d}", user, f"i{number * 7919 % ITEMS}", KINDS[number % 4], after + number * SECOND, 1.0, 9.5)


def table(count: int, users: int, prefix: str) -> pa.Table:
    """So many events of users ``<prefix>0`` and on, as an EVENTS table."""
    draw = rng(1, prefix)
    who, what = draw.integers(users, size=count), (draw.random(count) ** 2 * ITEMS).astype(int)
    columns: dict[str, Any] = {
        "event_id": [f"{prefix}-{number:08d}" for number in range(count)],
        "user_id": [f"{prefix}{user}" for user in who.tolist()],
        "item_id": [f"i{item}" for item in what.tolist()],
        "event": [KINDS[kind] for kind in draw.integers(4, size=count).tolist()],
        "timestamp": pa.array(START + np.arange(count) * SECOND).cast(TIMESTAMP),
        "value": np.ones(count, np.float32),
        "price": draw.uniform(1, 50, count).astype(np.float32),
    }
    arrays = [pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(count, field.type) for field in EVENTS]
    return pa.table(arrays, schema=EVENTS)


def folder() -> Folder:
    """All features, over a catalogue of ``ITEMS``."""
    names = pa.array([f"i{number}" for number in range(ITEMS)])
    price = pa.array(np.linspace(1, 50, ITEMS), pa.float32())
    groups = {"category": [f"c{number % 60}" for number in range(ITEMS)], "brand": [f"b{number % 200}" for number in range(ITEMS)]}
    items = pa.table({"item_id": names, **groups, "price": price})
    vocab = Vocab.of(names)
    return Folder(FeatureSpec(), Catalogue.from_table(vocab, items.take(pa.array(np.argsort(vocab.encode(names))))))


@contextmanager
def sqlite_store(scratch: Path) -> Iterator[tuple[OnlineStore, Operation, Operation]]:
    """The store, a bare durable write of an event's size, and a bare read of a user's state."""
    store = SqliteStore(scratch / "store.sqlite", folder())
    raw = sqlite3.connect(scratch / "bare.sqlite", check_same_thread=False)
    raw.execute("CREATE TABLE states (name TEXT PRIMARY KEY, blob BLOB)")
    raw.executemany("INSERT INTO states VALUES (?, ?)", [(f"u{number}", os.urandom(8000)) for number in range(USERS)])
    raw.commit()
    file = os.open(scratch / "bare.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def write(number: int) -> None:
        os.write(file, b"x" * 100)
        os.fsync(file)

    def read(number: int) -> None:
        raw.execute("SELECT blob FROM states WHERE name = ?", (f"u{number % USERS}",)).fetchone()

    try:
        yield store, write, read
    finally:
        store.close()
        raw.close()
        os.close(file)


@contextmanager
def redis_store(scratch: Path) -> Iterator[tuple[OnlineStore, Operation, Operation]]:
    """The same on a Redis that has everything on disk before it acknowledges."""
    with redis_here(scratch / "redis", durable=True) as url:
        store = RedisStore(url, folder())
        client = redis.Redis.from_url(url)
        for number in range(USERS):
            client.set(f"bare{number}", os.urandom(8000))
        try:
            yield (
                store,
                lambda number: check([client.set("bare", b"x" * 100)], 1),
                lambda number: check([client.get(f"bare{number % USERS}")], 1),
            )
        finally:
            store.close()
            client.close()
