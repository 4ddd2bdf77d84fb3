"""The online store: an event log that is durable when it says so, and the folded state of every user, read in one round trip.

``OnlineStore`` is the contract; tests/contract/test_store.py holds every backend to it. ``SqliteStore`` is the embedded one (one
node, any number of threads and processes); ``store_redis.RedisStore`` is the one of a cluster. The log is the truth: a state that is
missing, damaged, of another revision of the log or of other features is folded again from the log.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from maple.errors import ArtifactError, DataError, ServeError, unknown_name
from maple.features.folder import Folder, Rows
from maple.features.states import UserState
from maple.schema import EVENT_CODES, EVENT_TYPES, check_id

MAX_CONTEXT_BYTES = 8192


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
        if not 0 <= self.timestamp < 1 << 52:
            raise DataError(f"timestamp of event {self.event_id!r} is not a time in microseconds since 1970")
        for name, number in (("value", self.value), ("price", self.price)):
            if number is not None and not (math.isfinite(number) and abs(number) <= 1e9):
                raise DataError(f"{name} of event {self.event_id!r} is not a number between -1e9 and 1e9")
        if len(json.dumps(dict(self.context))) > MAX_CONTEXT_BYTES:
            raise DataError(f"context of event {self.event_id!r} is longer than {MAX_CONTEXT_BYTES} bytes as JSON")
        return self

    @property
    def order(self) -> tuple[int, str]:
        """Events of a user are folded in this order."""
        return self.timestamp, self.event_id


class Ack(StrEnum):
    """What became of an event. Both mean: it is on disk, exactly once."""

    STORED = "stored"
    DUPLICATE = "duplicate"


@runtime_checkable
class OnlineStore(Protocol):
    """Events in, user states out. Safe to call from several threads."""

    folder: Folder  # the features that ``append`` keeps up to date; others are folded when first read

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """Store events; durable when it returns. An event id that the user already has changes nothing.

        An invalid event is a ``DataError`` and nothing is stored. After a ``ServeError`` send all of it again: repeating is harmless.
        """

    def get(self, user_ids: Sequence[str], folder: Folder | None = None) -> dict[str, UserState]:
        """The states of these users, in one round trip; a user without events has an empty state."""

    def history(self, user_id: str) -> list[Event]:
        """All events of a user in order."""

    def delete(self, user_id: str) -> int:
        """Forget a user; returns how many events there were."""

    def backfill(self, events: pa.Table) -> int:
        """Load an EVENTS table; events that are there already stay as they are. Returns how many were new."""

    def adopt(self, folder: Folder) -> None:
        """Keep the states of other features up to date from now on: those of a new bundle."""

    def close(self) -> None:
        """Close all connections; the store may not be used after."""


# -- what the backends share -------------------------------------------------------------------------------------------


def rows_of(logs: Sequence[Sequence[Event]]) -> Rows:
    """Logs of several users, each in order, as columns."""
    flat = [event for log in logs for event in log]

    def numbers(values: Iterable[float | None]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float32)

    offsets = np.concatenate([[0], np.cumsum([len(log) for log in logs])]).astype(np.int64)
    kinds = np.array([EVENT_CODES[event.event] for event in flat], np.int8)
    times = np.array([event.timestamp for event in flat], np.int64)
    values, prices = numbers(event.value for event in flat), numbers(event.price for event in flat)
    return Rows(offsets, [event.event_id for event in flat], [event.item_id for event in flat], kinds, times, values, prices)


def fold_new(
    folder: Folder, new: Mapping[str, Sequence[Event]], held: Mapping[str, UserState | None], log: Callable[[str], Sequence[Event]]
) -> list[UserState]:
    """The states of users after new events. Who has no usable state, or got an event that is older than the last one folded,
    is folded from the whole ``log``, which already has the new events."""
    starts, logs = [], []
    for user, events in new.items():
        state = held.get(user)
        fresh = sorted(events, key=lambda event: event.order)
        if state is not None and state.tail < fresh[0].order:
            starts.append(state)
            logs.append(fresh)
        else:
            starts.append(folder.empty(user))
            logs.append(list(log(user)))
    return folder.advance(starts, rows_of(logs))


def events_of(table: pa.Table) -> Iterator[list[Event]]:
    """The events of an EVENTS table in chunks of whole rows, checked."""
    names = ["event_id", "user_id", "item_id", "event", "timestamp", "value", "price", "session_id", "request_id"]
    table = table.select(names).set_column(4, "timestamp", table["timestamp"].cast(pa.int64()))
    for batch in table.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("event_id", "ascending")]).to_batches(10_000):
        yield [Event(*row).check() for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)]


# -- SQLite ------------------------------------------------------------------------------------------------------------

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  user_id TEXT NOT NULL, event_id TEXT NOT NULL, timestamp INTEGER NOT NULL, item_id TEXT NOT NULL, event TEXT NOT NULL,
  value REAL, price REAL, session_id TEXT, request_id TEXT, context TEXT, PRIMARY KEY (user_id, event_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS users (user_id TEXT PRIMARY KEY, revision TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS states (
  user_id TEXT NOT NULL, digest TEXT NOT NULL, blob BLOB NOT NULL, PRIMARY KEY (user_id, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (one INTEGER PRIMARY KEY CHECK (one = 1), value INTEGER NOT NULL);
INSERT OR IGNORE INTO counter VALUES (1, 0);
"""
_COLUMNS = "event_id, user_id, item_id, event, timestamp, value, price, session_id, request_id, context"
_LOG = f"SELECT {_COLUMNS} FROM events WHERE user_id = ? ORDER BY timestamp, event_id"  # noqa: S608  # constants only
_INSERT = f"INSERT OR IGNORE INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
_GET = (
    "SELECT u.user_id, u.revision, s.blob FROM users u LEFT JOIN states s ON s.user_id = u.user_id AND s.digest = ? WHERE u.user_id IN (?)"
)
_KEEP = "INSERT OR REPLACE INTO states SELECT ?, ?, ? WHERE EXISTS (SELECT 1 FROM users WHERE user_id = ? AND revision = ?)"


class _Waiting:
    """Work of one caller, waiting for a commit."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.acks: list[Ack] | None = None
        self.error: BaseException | None = None


class SqliteStore:
    """An embedded store in one SQLite file (WAL, synchronous=FULL), for one node.

    Callers that append at the same time share a commit: whoever gets the write lock commits for all who wait. Every commit gives the
    users it touches a revision that is never used again, so a state folded from an older log can never be taken for the current one.
    """

    def __init__(self, path: str | Path, folder: Folder, *, busy_seconds: float = 10.0) -> None:
        self.path = Path(path)
        self.folder = folder
        self._busy = busy_seconds
        self._turn = threading.Lock()  # held while committing
        self._queue: list[_Waiting] = []
        self._queue_lock = threading.Lock()
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # what people did is nobody else's business
        try:
            self._writer = self._connect()
            self._writer.execute("PRAGMA journal_mode=WAL")
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise ArtifactError(f"{self.path} is an online store of version {version}, this Maple reads {_SCHEMA_VERSION}")
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._writer.execute(statement)
                self._writer.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            self.close()
            raise ArtifactError(
                f"{self.path} cannot be opened as an online store: {error}. If it is damaged, move it away and load the snapshot again."
            ) from None

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See ``OnlineStore``."""
        work = _Waiting([event.check() for event in events])
        if not work.events:
            return []
        with self._queue_lock:
            self._queue.append(work)
        with self._turn:
            if work.acks is None and work.error is None:
                with self._queue_lock:
                    batch, self._queue = self._queue, []
                self._commit(batch)
        if work.error is not None:
            raise ServeError(f"the events could not be stored in {self.path}: {work.error}. Send them again.")
        assert work.acks is not None, "a commit answers everyone in its batch"
        return work.acks

    def get(self, user_ids: Sequence[str], folder: Folder | None = None) -> dict[str, UserState]:
        """See ``OnlineStore``."""
        folder = folder or self.folder
        out: dict[str, UserState] = {}
        stale: list[str] = []
        revisions = self._states(self._reader(), user_ids, folder)
        for user in user_ids:
            if user not in revisions:
                out[user] = folder.empty(user)
            else:
                state = folder.unpack(revisions[user][1], user, revisions[user][0])
                if state is None:
                    stale.append(user)
                else:
                    out[user] = state
        if stale:
            out |= self._refold(stale, folder)
        return out

    def history(self, user_id: str) -> list[Event]:
        """See ``OnlineStore``."""
        return _log(self._reader(), user_id)

    def delete(self, user_id: str) -> int:
        """See ``OnlineStore``. The freed pages are overwritten (secure_delete) and the write-ahead log is emptied."""
        with self._turn, self._errors():
            with self._transaction():
                count = self._writer.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount
                self._writer.execute("DELETE FROM states WHERE user_id = ?", (user_id,))
                self._writer.execute("DELETE FROM users WHERE user_id = ?", (user_id,))
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return count

    def backfill(self, events: pa.Table) -> int:
        """See ``OnlineStore``. One short transaction per 10,000 events, so that others may write in between."""
        added = 0
        for chunk in events_of(events):
            with self._turn, self._errors(), self._transaction():
                acks, new = self._insert(chunk)
                self._update(new)
                added += sum(ack == Ack.STORED for ack in acks)
        return added

    def adopt(self, folder: Folder) -> None:
        """See ``OnlineStore``."""
        self.folder = folder

    def prune(self, keep: Sequence[Folder]) -> int:
        """Delete the states of all other features; returns how many."""
        marks = ", ".join("?" for _ in keep)
        with self._turn, self._errors(), self._transaction():
            query = f"DELETE FROM states WHERE digest NOT IN ({marks})"  # noqa: S608  # question marks only
            return self._writer.execute(query, [folder.digest for folder in keep]).rowcount

    def close(self) -> None:
        """See ``OnlineStore``."""
        for connection in self._connections:
            connection.close()
        self._connections = []

    # -- inside --------------------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self._busy, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA secure_delete=ON")
        return connection

    def _reader(self) -> sqlite3.Connection:
        """This thread's connection for reading."""
        if not hasattr(self._local, "connection"):
            connection = self._connect()
            connection.execute("PRAGMA query_only=ON")
            self._local.connection = connection
        found: sqlite3.Connection = self._local.connection
        return found

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ServeError(f"the online store {self.path} failed: {error}. Check the disk and who locks the file.") from error

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        try:
            with self._transaction():
                acks, new = self._insert([event for work in batch for event in work.events])
                self._update(new)
        except BaseException as error:
            for work in batch:
                work.error = error
            if not isinstance(error, Exception):
                raise
            return
        start = 0
        for work in batch:
            work.acks = acks[start : start + len(work.events)]
            start += len(work.events)

    def _insert(self, events: Sequence[Event]) -> tuple[list[Ack], dict[str, list[Event]]]:
        """Put events in the log; acks in order, and what was new by user."""
        acks: list[Ack] = []
        new: dict[str, list[Event]] = {}
        for e in events:
            context = json.dumps(dict(e.context)) if e.context else None
            row = (e.event_id, e.user_id, e.item_id, e.event, e.timestamp, e.value, e.price, e.session_id, e.request_id, context)
            stored = self._writer.execute(_INSERT, row).rowcount == 1
            acks.append(Ack.STORED if stored else Ack.DUPLICATE)
            if stored:
                new.setdefault(e.user_id, []).append(e)
        return acks, new

    def _update(self, new: Mapping[str, Sequence[Event]]) -> None:
        """Bring the states of users up to date with new events, in the open transaction."""
        if not new:
            return
        folder = self.folder
        found = self._states(self._writer, list(new), folder)
        held = {user: folder.unpack(blob, user, revision) for user, (revision, blob) in found.items()}
        held |= {user: folder.empty(user) for user in new if user not in found}
        states = fold_new(folder, new, held, lambda user: _log(self._writer, user))
        revision = str(self._writer.execute("UPDATE counter SET value = value + 1 RETURNING value").fetchall()[0][0])
        self._writer.executemany("INSERT OR REPLACE INTO users VALUES (?, ?)", [(state.user, revision) for state in states])
        rows = [(state.user, folder.digest, folder.pack(state, revision)) for state in states]
        self._writer.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", rows)

    def _states(self, connection: sqlite3.Connection, users: Sequence[str], folder: Folder) -> dict[str, tuple[str, bytes | None]]:
        """Revision and packed state of those users that have events."""
        out: dict[str, tuple[str, bytes | None]] = {}
        with self._errors():
            for start in range(0, len(users), 500):
                some = users[start : start + 500]
                marks = ", ".join("?" for _ in some)
                query = _GET.replace("(?)", f"({marks})")
                out |= {user: (revision, blob) for user, revision, blob in connection.execute(query, (folder.digest, *some))}
        return out

    def _refold(self, users: Sequence[str], folder: Folder) -> dict[str, UserState]:
        """Fold users from their logs, and keep the result if nobody is writing."""
        reader = self._reader()
        with self._errors():
            reader.execute("BEGIN")
            try:
                revisions = {user: revision for user, (revision, _) in self._states(reader, users, folder).items()}
                logs = [_log(reader, user) for user in users]
            finally:
                reader.execute("COMMIT")
        states = folder.advance([folder.empty(user) for user in users], rows_of(logs))
        if self._turn.acquire(blocking=False):
            try:
                self._writer.execute("PRAGMA busy_timeout=0")
                with contextlib.suppress(sqlite3.Error), self._transaction():
                    rows = [(state, revisions[state.user]) for state in states if state.user in revisions]
                    self._writer.executemany(
                        _KEEP, [(state.user, folder.digest, folder.pack(state, revision), state.user, revision) for state, revision in rows]
                    )  # fmt: skip
            finally:
                self._writer.execute(f"PRAGMA busy_timeout={int(self._busy * 1000)}")
                self._turn.release()
        return {state.user: state for state in states}


def _log(connection: sqlite3.Connection, user: str) -> list[Event]:
    return [Event(*(*row[:9], json.loads(row[9] or "{}"))) for row in connection.execute(_LOG, (user,))]
