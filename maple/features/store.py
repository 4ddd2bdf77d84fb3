"""The online store: an event log that is durable when it says so, and the folded state of every user, read in one round trip.

``OnlineStore`` is the contract; tests/contract/test_store.py holds every backend to it. ``store_sqlite.SqliteStore`` is the embedded
one (one node, any number of threads and processes); ``store_redis.RedisStore`` is the one of a cluster. The log is the truth. A
state is a checkpoint of it: reading folds in what came since, and folds from the log whatever is missing, damaged, of other
features, or overtaken by a late event; so appending costs the same for a new user and for one with a long past.

Times: the log takes an event's time as it comes, however late; whoever receives events from outside holds them to its own clock.
A person may have several ids (``merge``): each event stays under the id it came with, reading sees those of all, once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.errors import DataError, unknown_name
from maple.features.folder import Folder, Rows
from maple.features.states import Attribute, UserState
from maple.schema import EVENT_CODES, EVENT_TYPES, EVENTS, TIMESTAMP, check_id, legal_ids

MAX_CONTEXT_BYTES = 8192
MAX_TIME = 1 << 52  # microseconds since 1970

#: What a fold needs of an event: event id, item id, kind, time, value, price.
Line: TypeAlias = tuple[str, str, str, int, float | None, float | None]
Progress: TypeAlias = Callable[[int], None]
"""Told how many rows are done."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event as a shop sends it. ``timestamp`` in microseconds since 1970, UTC. ``event_id`` makes repeating it harmless, per user."""

    event_id: str
    user_id: str
    item_id: str
    event: str
    timestamp: int
    value: float | None = None
    price: float | None = None
    session_id: str | None = None
    request_id: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> Event:
        """The event itself, or a ``DataError`` that says what is wrong with it."""
        check_id(self.event_id, "event_id")
        check_id(self.user_id, "user_id")
        check_id(self.item_id, "item_id")
        if self.event not in EVENT_CODES:
            raise DataError(unknown_name("event type", self.event, EVENT_TYPES))
        if not 0 <= self.timestamp < MAX_TIME:
            raise DataError(f"timestamp of event {self.event_id!r} is not a time in microseconds since 1970")
        for name, number in (("value", self.value), ("price", self.price)):
            if number is not None and not (math.isfinite(number) and abs(number) <= 1e9):
                raise DataError(f"{name} of event {self.event_id!r} is not a number between -1e9 and 1e9")
        if self.context and len(json.dumps(dict(self.context))) > MAX_CONTEXT_BYTES:
            raise DataError(f"context of event {self.event_id!r} is longer than {MAX_CONTEXT_BYTES} bytes as JSON")
        return self

    @property
    def order(self) -> tuple[int, str]:
        """Events of a user are folded in this order."""
        return self.timestamp, self.event_id

    @property
    def key(self) -> tuple[str, str]:
        """What makes it one event: event ids are those of a user."""
        return self.user_id, self.event_id

    @property
    def line(self) -> Line:
        """What a fold needs of it."""
        return self.event_id, self.item_id, self.event, self.timestamp, self.value, self.price


class Ack(StrEnum):
    """What became of an event. The first two mean: it is on disk, exactly once."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    DELETED = "deleted"  # its user was deleted for good: the event was dropped


@dataclass(frozen=True, slots=True)
class Reconciled:
    """How many events became other ones in the log, by what happened to them."""

    added: int = 0
    changed: int = 0
    dropped: int = 0

    def __add__(self, other: Reconciled) -> Reconciled:
        return Reconciled(self.added + other.added, self.changed + other.changed, self.dropped + other.dropped)


@runtime_checkable
class OnlineStore(Protocol):
    """Events in, user states out. Safe to call from several threads."""

    folder: Folder  # the features that ``get`` reads by default

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """Store events; durable when it returns. An event id that the user already has changes nothing.

        An invalid event is a ``DataError`` and nothing is stored. After a ``ServeError`` send all of it again: repeating is harmless.
        """

    def get(self, user_ids: Sequence[str], folder: Folder | None = None) -> dict[str, UserState]:
        """The states of these users with their attributes, in one round trip; a user without events has an empty state."""

    def history(self, user_id: str) -> list[Event]:
        """All events of a person in order, each with the id it came with."""

    def delete(self, user_id: str, *, block: bool = False) -> int:
        """Forget a person, all their ids, attributes and links; returns how many events there were.

        Events that are sent later are those of a new user; with ``block`` they are dropped for ever (``Ack.DELETED``), and so are
        attributes and links. Blocked ids are kept as keyed hashes only.
        """

    def export(self, batch_rows: int = 50_000) -> Iterator[pa.Table]:
        """All events as EVENTS tables of about so many rows, each event under the id it came with; others may write meanwhile."""

    def expire(self, before: int) -> int:
        """Forget all events earlier than a time in microseconds; returns how many. States are then those of what is left."""

    def backfill(self, events: pa.Table, progress: Progress | None = None) -> int:
        """Load an EVENTS table; events that are there already stay as they are. Returns how many were new."""

    def reconcile(self, events: pa.Table, gone: pa.Table, progress: Progress | None = None) -> Reconciled:
        """Load an EVENTS table that has the last word: what a fold reads of an event that is there already becomes that of the table.

        Events of ``gone`` (user_id, event_id) are dropped; all others stay as they are.
        """

    def describe(self, user_id: str, attributes: Mapping[str, Attribute]) -> Ack:
        """Say something of a user: named attributes are replaced, None takes one away, the others stay. Durable when it returns."""

    def attributes(self, user_id: str) -> dict[str, Attribute]:
        """What a person is described by."""

    def backfill_users(self, users: pa.Table, progress: Progress | None = None) -> int:
        """Load a USERS table; an attribute that a user has already stays as it is. Returns how many users there were."""

    def merge(self, user_ids: Sequence[str], into: str) -> int:
        """These ids are aliases of ``into``: from now on all are one person, with all their events. Returns how many ids joined.

        ``DataError`` where they would be too many (see ``people``); nothing is changed then.
        """

    def unmerge(self, alias: str) -> int:
        """Take back what was told of an alias; both sides are as if it had never been. Returns how many links that were."""

    def aliases(self, user_id: str) -> list[str]:
        """All ids of the person that an id belongs to, sorted; the id alone where it was never merged."""

    def prune(self, keep: Sequence[Folder]) -> int:
        """Drop the states of all other features, and those not refreshed for long; returns how many. They can be folded again."""

    def adopt(self, folder: Folder) -> None:
        """Read these features by default from now on: those of a new bundle."""

    def close(self) -> None:
        """Close all connections; the store may not be used after."""


# -- events as columns -------------------------------------------------------------------------------------------------


def rows_of(logs: Sequence[Sequence[Event]]) -> Rows:
    """Logs of several users, each in order, as columns."""
    return rows_of_lines([[event.line for event in log] for log in logs])


def rows_of_lines(logs: Sequence[Sequence[Line]]) -> Rows:
    """The same from lines."""
    flat = [line for log in logs for line in log]
    ids, items, kinds, times, values, prices = zip(*flat, strict=True) if flat else ((),) * 6
    offsets = np.concatenate([[0], np.cumsum([len(log) for log in logs])]).astype(np.int64)
    codes = np.fromiter(map(EVENT_CODES.__getitem__, kinds), np.int8, len(flat))
    # None becomes NaN
    return Rows(
        offsets, list(ids), list(items), codes, np.array(times, np.int64), np.array(values, np.float32), np.array(prices, np.float32)
    )


def in_order(lines: Iterable[Line]) -> list[Line]:
    """Lines in the order they are folded in."""
    return sorted(lines, key=lambda line: (line[3], line[0]))


def once(lines: Iterable[Line]) -> list[Line]:
    """In order, and of each event id the first: several ids of one person may have sent the same event."""
    seen: dict[str, Line] = {}
    for line in sorted(lines, key=lambda line: (line[3], line[0], line[1], line[2], line[4] or 0.0, line[5] or 0.0)):
        seen.setdefault(line[0], line)
    return list(seen.values())


def folds_alike(one: Line, two: Line) -> bool:
    """Whether two lines are the same to a fold: it reads numbers in single precision, as tables keep them."""
    return one[:4] == two[:4] and all(
        a == b if a is None or b is None else np.float32(a) == np.float32(b) for a, b in zip(one[4:], two[4:], strict=True)
    )


def ids_by_user(pairs: pa.Table, at_most: int = 1000) -> Iterator[tuple[str, list[str]]]:
    """The event ids of each user in a table of (user_id, event_id), in lists of at most so many."""
    grouped = pairs.group_by("user_id").aggregate([("event_id", "list")])
    for user, ids in zip(grouped["user_id"].to_pylist(), grouped["event_id_list"].to_pylist(), strict=True):
        for start in range(0, len(ids), at_most):
            yield user, ids[start : start + at_most]


_EVENT_COLUMNS = ["event_id", "user_id", "item_id", "event", "timestamp", "value", "price", "session_id", "request_id"]


def events_of(table: pa.Table, rows: int = 10_000) -> Iterator[list[Event]]:
    """The events of an EVENTS table by user and time, in chunks, checked."""
    table = table.select(_EVENT_COLUMNS).set_column(4, "timestamp", table["timestamp"].cast(pa.int64()))
    numbers = [
        pc.fill_null(pc.less_equal(pc.abs(table[name].cast(pa.float64())), 1e9), table[name].is_null()) for name in ("value", "price")
    ]
    fine = [pc.and_(pc.greater_equal(table["timestamp"], 0), pc.less(table["timestamp"], MAX_TIME)), *numbers]
    fine += [legal_ids(table[name]) for name in _EVENT_COLUMNS[:3]] + [pc.is_in(table["event"], value_set=pa.array(EVENT_TYPES))]
    for mask in fine:
        place = pc.index(mask, pa.scalar(False)).as_py()
        if place >= 0:
            Event(*table.slice(place, 1).to_pylist()[0].values()).check()
            raise DataError(f"row {place} of the events is not a legal event")
    ordered = table.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("event_id", "ascending")])
    for start in range(0, ordered.num_rows, rows):
        columns = ordered.slice(start, rows).columns
        yield [Event(*row) for row in zip(*(column.to_pylist() for column in columns), strict=True)]


def to_table(events: Sequence[Event]) -> pa.Table:
    """Events as an EVENTS table; their contexts are left behind."""
    columns = {name: [getattr(event, name) for event in events] for name in EVENTS.names}
    times = pa.array(columns.pop("timestamp"), pa.int64()).cast(TIMESTAMP)
    return pa.table([times if field.name == "timestamp" else pa.array(columns[field.name], field.type) for field in EVENTS], schema=EVENTS)


# -- reading: a checkpoint and what came since -------------------------------------------------------------------------

#: A state is stored again when at least this many events came since, or none is stored ...
KEEP_EVENTS = 8
#: ... and it takes at most so many bytes for each of them: who has a long past is folded on for longer before it is written again.
KEEP_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Found:
    """What one round trip finds of the person whom an id belongs to."""

    person: str  # the id they go by
    epoch: str  # changes when the log changes in another way than by appending; "" = no events
    blob: bytes | None  # the packed state, of this epoch
    covered: int  # the place in the log up to which it holds events
    place: int  # ... and up to which ``pending`` does
    pending: Sequence[Line]  # events since then, in no order
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True, slots=True)
class Past:
    """A person's whole log, in order, and where it stands."""

    epoch: str
    place: int
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state to be stored, if the person's epoch is still the same and nothing newer is stored."""

    person: str
    epoch: str
    place: int
    blob: bytes


class Backend(Protocol):
    """What reading needs of a store."""

    def find(self, user_ids: Sequence[str], digest: str) -> list[Found]:
        """Everything about these users, in one round trip."""

    def pasts(self, people: Sequence[str]) -> list[Past]:
        """The whole logs of people."""

    def keep(self, checkpoints: Sequence[Checkpoint], digest: str) -> None:
        """Store checkpoints, or not: nothing depends on it."""


def read_states(backend: Backend, user_ids: Sequence[str], folder: Folder) -> dict[str, UserState]:
    """The states of users as of now: all that need folding in one batch."""
    asked = list(dict.fromkeys(user_ids))
    found = dict(zip(asked, backend.find(asked, folder.digest), strict=True)) if asked else {}
    people = {each.person: each for each in found.values()}
    states: dict[str, UserState] = {}
    marks: dict[str, tuple[str, int]] = {}
    starts: dict[str, UserState] = {}
    lines: dict[str, Sequence[Line]] = {}
    for person, each in people.items():
        state = folder.empty(person) if not each.epoch else folder.unpack(each.blob, person, f"{each.epoch}:{each.covered}")
        since = in_order(each.pending)
        if state is None or (since and state.tail >= (since[0][3], since[0][0])):
            continue  # from the log
        if since:
            starts[person], lines[person], marks[person] = state, since, (each.epoch, each.place)
        else:
            states[person] = state
    again = [person for person in people if person not in states and person not in starts]
    for person, past in zip(again, backend.pasts(again) if again else (), strict=True):
        starts[person], lines[person], marks[person] = folder.empty(person), past.lines, (past.epoch, past.place)
    if starts:
        folded = folder.advance(list(starts.values()), rows_of_lines(list(lines.values())))
        states |= zip(starts, folded, strict=True)
        kept = []
        for person in starts:
            blob, (epoch, place) = people[person].blob, marks[person]
            if epoch and (person in again or (len(lines[person]) >= KEEP_EVENTS and len(blob or b"") <= KEEP_BYTES * len(lines[person]))):
                kept.append(Checkpoint(person, epoch, place, folder.pack(states[person], f"{epoch}:{place}")))
        if kept:
            backend.keep(kept, folder.digest)
    return {user: replace(states[each.person], user=user, attributes=each.attributes) for user, each in found.items()}


def heavy_users(events: Sequence[Event], at_least: int = 64) -> list[str]:
    """Users with so many events in a sorted chunk that their states are better folded now than when first read."""
    counts: dict[str, int] = {}
    for event in events:
        counts[event.user_id] = counts.get(event.user_id, 0) + 1
    return [user for user, count in counts.items() if count >= at_least]
