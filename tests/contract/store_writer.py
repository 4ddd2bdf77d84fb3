"""Appends events to a store for ever and prints the number of the last one that was acknowledged: killed by test_store.py.

Arguments: an SQLite file or a Redis URL, and a name of this writer that its event ids start with.
"""

from __future__ import annotations

import sys

from shop import T0
from store_suite import FOLDER

from maple.features.store import Event
from maple.features.store_redis import RedisStore
from maple.features.store_sqlite import SqliteStore

where, name = sys.argv[1:]
store = RedisStore(where, FOLDER) if where.startswith("redis://") else SqliteStore(where, FOLDER)
number = 0
while True:
    size = 1 + number % 4
    store.append([Event(f"{name}{n:06d}", f"u{n % 3}", "cup", "purchase", T0 + n) for n in range(number, number + size)])
    number += size
    print(number, flush=True)
    if number % 5 == 0:
        store.get(["u0", "u1", "u2"])
