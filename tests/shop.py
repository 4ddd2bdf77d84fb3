"""A tiny shop for feature tests: events as plain tuples, as a data set, and as events of the online store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from maple.artifacts import Place
from maple.data.dataset import Dataset
from maple.data.ingest import ingest_local
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.features.fold import DAY
from maple.features.log_reader import LogReader
from maple.features.states import StateReader
from maple.features.store import Event
from maple.schema import EVENTS, TIMESTAMP

#: A Monday, midnight UTC.
T0 = 1_700_438_400_000_000
HOUR = DAY // 24

ITEMS = pa.table(
    {
        "item_id": ["apple", "bread", "cup", "dish", "egg"],
        "category": ["food", "food", "home", "home", None],
        "brand": ["a", "b", "a", None, None],
        "price": pa.array([1.0, 2.0, 8.0, 10.0, None], pa.float32()),
    }
)


@dataclass(frozen=True)
class Happening:
    """One event of the tiny shop; ``at`` is in microseconds after T0."""

    user: str
    item: str
    event: str
    at: int
    value: float | None = None
    price: float | None = None
    name: str = ""

    def stored(self, place: int) -> Event:
        return Event(self.name or f"e{place:04d}", self.user, self.item, self.event, T0 + self.at, self.value, self.price)


def online(happenings: Sequence[Happening]) -> list[Event]:
    """As events of the store, numbered in order where they have no name."""
    return [happening.stored(place) for place, happening in enumerate(happenings)]


def table(events: Sequence[Event]) -> pa.Table:
    """As an EVENTS table."""
    columns = {name: [getattr(event, name) for event in events] for name in EVENTS.names}
    made = pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in EVENTS if field.name != "timestamp"})
    return made.append_column("timestamp", pa.array(columns["timestamp"], pa.int64()).cast(TIMESTAMP))


def offline(events: Sequence[Event], users: Sequence[str] = ()) -> Dataset:
    """As a data set; ``users`` may name users without events."""
    known = pa.table({"user_id": sorted({event.user_id for event in events} | set(users))})
    return Dataset.from_tables(table(events), ITEMS, known)


def snapshot(folder: Path, happenings: Sequence[Happening], rows_per_bucket: int) -> Snapshot:
    """As a snapshot under ``folder / "home"``."""
    pq.write_table(table(online(happenings)), folder / "events.parquet")
    pq.write_table(ITEMS, folder / "items.parquet")
    keys = {name: name for name in ("event_id", "user_id", "item_id", "event", "timestamp", "value", "price")}
    columns = {name: name for name in ITEMS.column_names}
    plain = {
        "name": "tiny",
        "events": {"path": "events.parquet", "columns": keys},
        "items": {"path": "items.parquet", "columns": columns},
    }
    home = Place.at(folder / "home")
    return ingest_local(SourceConfig.parse(plain, "tiny"), Place.at(folder), home, rows_per_bucket=rows_per_bucket)


def user_columns(reader: LogReader | StateReader, users: Any, now: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float32]]:
    """The users' own features, of queries without candidates."""
    return reader.columns(users, now, np.zeros(len(users) + 1, np.int64), np.empty(0, np.int32))[0]
