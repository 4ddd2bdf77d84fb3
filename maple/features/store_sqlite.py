"""The embedded online store: one SQLite file, for one node, any number of threads and processes.

Callers that append at the same time share a commit: whoever gets the write lock commits for all who wait. Every commit has a number
(``seq``) that its events carry, so what a stored state lacks is found by index. A person's epoch is the number of the commit that last
changed their log in another way than by appending; a state of another epoch is never taken for the current one.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from maple.errors import ServeError
from maple.features import sqlite_statements as sql
from maple.features.folder import Folder
from maple.features.people import Link, check_attributes, check_group, check_links, groups, one_of_all, user_rows
from maple.features.sqlite_file import SqliteFile
from maple.features.states import Attribute, UserState
from maple.features.store import (
    Ack,
    Checkpoint,
    Event,
    Found,
    Line,
    Past,
    Progress,
    Reconciled,
    events_of,
    folds_alike,
    heavy_users,
    ids_by_user,
    in_order,
    once,
    read_states,
    to_table,
)
from maple.hashing import stable_hash
from maple.schema import check_id


class _Waiting:
    """Work of one caller, waiting for a commit."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.acks: list[Ack] | None = None
        self.error: BaseException | None = None


class SqliteStore:
    """See ``OnlineStore``. ``state_days``: states that were not refreshed for so long are dropped by ``prune``.

    ``durable=False`` does not wait for the disk: a crash of the process loses nothing, one of the machine the last events.
    """

    def __init__(
        self, path: str | Path, folder: Folder, *, busy_seconds: float = 10.0, state_days: float = 14.0, durable: bool = True
    ) -> None:  # fmt: skip
        self.folder = folder
        self._state_days = state_days
        self._queue: list[_Waiting] = []
        self._queue_lock = threading.Lock()
        self._file = SqliteFile(
            path, "the online store", sql.VERSION, sql.SCHEMA, {1: sql.from_version_1}, busy_seconds=busy_seconds, durable=durable
        )
        with self._file.write() as writer:
            writer.execute("INSERT OR IGNORE INTO salt VALUES (1, ?)", (secrets.token_hex(16),))
            self._salt = str(writer.execute("SELECT value FROM salt").fetchone()[0])

    @property
    def path(self) -> Path:
        return self._file.path

    # -- events --------------------------------------------------------------------------------------------------------

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See ``OnlineStore``."""
        work = _Waiting([event.check() for event in events])
        if not work.events:
            return []
        with self._queue_lock:
            self._queue.append(work)
        with self._file.turn:
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
        return read_states(self, user_ids, folder or self.folder)

    def history(self, user_id: str) -> list[Event]:
        """See ``OnlineStore``."""
        with self._file.read() as reader:
            ids = _members(reader, user_id)
            query = f"SELECT {sql.COLUMNS} FROM events WHERE user_id IN (SELECT value FROM json_each(?))"  # noqa: S608  # constants only
            rows = reader.execute(query, (json.dumps(ids),)).fetchall()
        return sorted(map(_event, rows), key=lambda event: (*event.order, event.user_id))

    def export(self, batch_rows: int = 50_000) -> Iterator[pa.Table]:
        """See ``OnlineStore``."""
        query = f"SELECT {sql.COLUMNS} FROM events WHERE (user_id, event_id) > (?, ?) ORDER BY user_id, event_id LIMIT ?"  # noqa: S608
        last = ("", "")
        while True:
            with self._file.read() as reader:
                found = reader.execute(query, (*last, batch_rows)).fetchall()
            if not found:
                return
            last = found[-1][:2]
            yield to_table([_event(row) for row in found])

    def backfill(self, events: pa.Table, progress: Progress | None = None) -> int:
        """See ``OnlineStore``. One transaction per 10,000 events, so that others may write in between; long pasts are folded at once."""
        added = done = 0
        for chunk in events_of(events):
            with self._file.write() as writer:
                added += self._insert(writer, chunk).count(Ack.STORED)
            self.get(heavy_users(chunk))
            done += len(chunk)
            if progress is not None:
                progress(done)
        return added

    def reconcile(self, events: pa.Table, gone: pa.Table, progress: Progress | None = None) -> Reconciled:
        """See ``OnlineStore``. Transactions as those of ``backfill``."""
        out, done = Reconciled(), 0
        for chunk in events_of(events):
            with self._file.write() as writer:
                acks = self._insert(writer, chunk)
                there = [event for event, ack in zip(chunk, acks, strict=True) if ack is Ack.DUPLICATE]
                other = [event for event in there if not folds_alike(writer.execute(sql.ONE, event.key).fetchone(), event.line)]
                writer.executemany(sql.AMEND, [(*event.line[1:], *event.key) for event in other])
                self._renew(writer, {event.user_id for event in other})
            self.get(heavy_users(chunk))
            out += Reconciled(acks.count(Ack.STORED), len(other), 0)
            done += len(chunk)
            if progress is not None:
                progress(done)
        for user, ids in ids_by_user(gone):
            with self._file.write() as writer:
                query = "DELETE FROM events WHERE user_id = ? AND event_id IN (SELECT value FROM json_each(?))"
                dropped = writer.execute(query, (user, json.dumps(ids))).rowcount
                if dropped:
                    self._renew(writer, [user])
            out += Reconciled(dropped=dropped)
        return out

    def delete(self, user_id: str, *, block: bool = False) -> int:
        """See ``OnlineStore``. The freed pages are overwritten (secure_delete) and the write-ahead log is emptied."""
        with self._file.write() as writer:
            ids = _members(writer, user_id)
            marks = json.dumps(ids)
            count = writer.execute("DELETE FROM events WHERE user_id IN (SELECT value FROM json_each(?))", (marks,)).rowcount
            writer.execute("DELETE FROM attributes WHERE user_id IN (SELECT value FROM json_each(?))", (marks,))
            self._regroup(writer, ids, {})
            if block:
                writer.executemany("INSERT OR IGNORE INTO blocked VALUES (?)", [(self._hash(each),) for each in ids])
        self._file.scrub()
        return count

    def expire(self, before: int) -> int:
        """See ``OnlineStore``. One transaction per 500 users."""
        with self._file.read() as reader:
            users = [row[0] for row in reader.execute("SELECT DISTINCT user_id FROM events WHERE timestamp < ?", (before,))]
        gone = 0
        for start in range(0, len(users), 500):
            some = users[start : start + 500]
            with self._file.write() as writer:
                for user in some:
                    gone += writer.execute("DELETE FROM events WHERE user_id = ? AND timestamp < ?", (user, before)).rowcount
                self._renew(writer, some)
        if users:
            self._file.scrub()
        return gone

    # -- people --------------------------------------------------------------------------------------------------------

    def describe(self, user_id: str, attributes: Mapping[str, Attribute]) -> Ack:
        """See ``OnlineStore``."""
        told = check_attributes(attributes, f"user {check_id(user_id, 'user_id')!r}")
        with self._file.write() as writer:
            if self._blocked(writer, [user_id]):
                return Ack.DELETED
            rows = [(user_id, name, json.dumps(value)) for name, value in told.items() if value is not None]
            writer.executemany("INSERT OR REPLACE INTO attributes VALUES (?, ?, ?)", rows)
            gone = [(user_id, name) for name, value in told.items() if value is None]
            # whichever id it was said of
            writer.executemany(
                "DELETE FROM attributes WHERE name = ?2 AND user_id IN (SELECT ?1 UNION SELECT o.user_id FROM members m "
                "JOIN members o ON o.person = m.person WHERE m.user_id = ?1)",
                gone,
            )
        return Ack.STORED

    def attributes(self, user_id: str) -> dict[str, Attribute]:
        """See ``OnlineStore``."""
        return dict(self.find([user_id], "")[0].attributes)

    def backfill_users(self, users: pa.Table, progress: Progress | None = None) -> int:
        """See ``OnlineStore``. One transaction per 10,000 users."""
        done = 0
        for batch in users.to_batches(10_000):
            told = dict(user_rows(pa.Table.from_batches([batch])))
            with self._file.write() as writer:
                blocked = self._blocked(writer, told)
                rows = [
                    (user, name, json.dumps(value))
                    for user, row in told.items() if user not in blocked
                    for name, value in row.items()
                ]  # fmt: skip
                writer.executemany("INSERT OR IGNORE INTO attributes VALUES (?, ?, ?)", rows)
            done += batch.num_rows
            if progress is not None:
                progress(done)
        return done

    def merge(self, user_ids: Sequence[str], into: str) -> int:
        """See ``OnlineStore``."""
        told = check_links(user_ids, into)
        with self._file.write() as writer:
            blocked = self._blocked(writer, [into, *(alias for alias, _ in told)])
            told = [link for link in told if not blocked.intersection(link)]
            ids = {each for link in told for member in link for each in _members(writer, member)}
            before = len(_members(writer, into))
            links = _links(writer, ids)
            if not ids or set(told) <= links:
                return 0
            links.update(told)
            found = groups(ids, links)
            for group in found.values():
                check_group(group, links)
            self._regroup(writer, ids, found, links)
            return len(ids) - before

    def unmerge(self, alias: str) -> int:
        """See ``OnlineStore``."""
        with self._file.write() as writer:
            ids = _members(writer, alias)
            links = _links(writer, ids)
            left = {link for link in links if link[0] != alias}
            if len(left) < len(links):
                self._regroup(writer, ids, groups(ids, left), left)
            return len(links) - len(left)

    def aliases(self, user_id: str) -> list[str]:
        """See ``OnlineStore``."""
        with self._file.read() as reader:
            return _members(reader, user_id)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def prune(self, keep: Sequence[Folder]) -> int:
        """See ``OnlineStore``."""
        oldest = time.time() - self._state_days * 86_400
        with self._file.write() as writer:
            query = "DELETE FROM states WHERE digest NOT IN (SELECT value FROM json_each(?)) OR written < ?"
            return writer.execute(query, (json.dumps([folder.digest for folder in keep]), oldest)).rowcount

    def adopt(self, folder: Folder) -> None:
        """See ``OnlineStore``."""
        self.folder = folder

    def close(self) -> None:
        """See ``OnlineStore``."""
        self._file.close()

    # -- what reading needs --------------------------------------------------------------------------------------------

    def find(self, user_ids: Sequence[str], digest: str) -> list[Found]:
        """See ``Backend``. Three statements, whatever the number of users."""
        with self._file.read() as reader:
            found = {row[0]: row for row in reader.execute(sql.FIND, (json.dumps(list(user_ids)), digest))}
            rows = [found[user] for user in user_ids]
            ids = {user: json.loads(members) if members and members != "[]" else [user] for user, *_, members in rows}
            told: dict[str, list[tuple[str, str, Attribute]]] = {}
            for user, name, value in reader.execute(sql.TOLD, (json.dumps(sorted({each for group in ids.values() for each in group})),)):
                told.setdefault(user, []).append((user, name, json.loads(value)))
            asked = [(person, each, seq) for user, person, _, seq, blob, _ in rows if blob is not None for each in ids[user]]
            since: dict[str, list[tuple[Any, ...]]] = {}
            if asked:
                for person, *row in reader.execute(sql.SINCE, (json.dumps(list(dict.fromkeys(asked))),)):
                    since.setdefault(person, []).append(tuple(row))
        out = []
        for user, person, epoch, seq, blob, _ in rows:
            new = since.get(person, [])
            place = max((row[0] for row in new), default=seq or 0)
            pending: list[Line] = [row[1:] for row in new]  # type: ignore[misc]  # the columns of sql.LINE
            attributes = one_of_all([each for member in ids[user] for each in told.get(member, ())], person)
            out.append(Found(person, "" if epoch is None else str(epoch), blob, seq or 0, place, pending, attributes))
        return out

    def pasts(self, people: Sequence[str]) -> list[Past]:
        """See ``Backend``."""
        out = []
        with self._file.read() as reader:
            for person in people:
                epoch = reader.execute("SELECT epoch FROM people WHERE person = ?", (person,)).fetchone()
                ids = _members(reader, person)
                rows = reader.execute(sql.PAST, (json.dumps(ids),)).fetchall()
                lines: list[Line] = [row[1:] for row in rows]
                place = max((row[0] for row in rows), default=0)
                out.append(Past(str(epoch[0]) if epoch else "", place, once(lines) if len(ids) > 1 else in_order(lines)))
        return out

    def keep(self, checkpoints: Sequence[Checkpoint], digest: str) -> None:
        """See ``Backend``."""
        now = int(time.time())
        rows = [(each.person, digest, int(each.epoch), each.place, now, each.blob) for each in checkpoints]

        def work(writer: sqlite3.Connection) -> None:
            writer.executemany(sql.KEEP, rows)

        self._file.write_if_idle(work)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        try:
            with self._file.transaction() as writer:
                acks = self._insert(writer, [event for work in batch for event in work.events])
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

    def _insert(self, writer: sqlite3.Connection, events: Sequence[Event]) -> list[Ack]:
        """Put events in the log; acks in order."""
        blocked = self._blocked(writer, {event.user_id for event in events})
        seq = _next(writer)
        acks: list[Ack] = []
        stored: dict[str, list[str]] = {}
        for e in events:
            if e.user_id in blocked:
                acks.append(Ack.DELETED)
                continue
            context = json.dumps(dict(e.context)) if e.context else None
            row = (e.user_id, e.event_id, seq, e.timestamp, e.item_id, e.event, e.value, e.price, e.session_id, e.request_id, context)
            new = writer.execute(sql.INSERT, row).rowcount == 1
            acks.append(Ack.STORED if new else Ack.DUPLICATE)
            if new:
                stored.setdefault(e.user_id, []).append(e.event_id)
        users = json.dumps(list(stored))
        merged = dict(writer.execute("SELECT user_id, person FROM members WHERE user_id IN (SELECT value FROM json_each(?))", (users,)))
        writer.executemany("INSERT OR IGNORE INTO people VALUES (?, ?)", [(user, seq) for user in stored if user not in merged])
        writer.executemany(sql.CLASH, [(seq, person, user, event) for user, person in merged.items() for event in stored[user]])
        return acks

    @staticmethod
    def _renew(writer: sqlite3.Connection, users: Collection[str]) -> None:
        """The logs of these users have changed in another way than by appending: new epochs for their people, no states."""
        epoch = _next(writer)
        for user in users:
            person = _person(writer, user)
            writer.execute("DELETE FROM states WHERE person = ?", (person,))
            writer.execute("DELETE FROM people WHERE person = ?", (person,))
            if person != user or not writer.execute(sql.EPOCH, (user, epoch)).rowcount:
                writer.execute("INSERT OR IGNORE INTO people SELECT person, ? FROM members WHERE user_id = ?", (epoch, user))

    @staticmethod
    def _regroup(
        writer: sqlite3.Connection, ids: Collection[str], found: Mapping[str, Sequence[str]], links: Collection[Link] = ()
    ) -> None:  # fmt: skip
        """Make people of ids: ``found`` as given by ``groups``; ids that are in none are people without anything. New epochs for all."""
        epoch = _next(writer)
        for table, column in (("states", "person"), ("people", "person"), ("members", "user_id"), ("links", "alias"), ("links", "target")):
            writer.executemany(f"DELETE FROM {table} WHERE {column} = ?", [(each,) for each in ids])  # noqa: S608  # constants only
        writer.executemany("INSERT INTO links VALUES (?, ?)", sorted(links))
        for person, group in found.items():
            if len(group) > 1:
                writer.execute("INSERT INTO people VALUES (?, ?)", (person, epoch))
                writer.executemany("INSERT INTO members VALUES (?, ?)", [(each, person) for each in group])
            else:
                writer.execute(sql.EPOCH, (person, epoch))

    def _hash(self, user: str) -> str:
        return f"{stable_hash(self._salt, user):016x}"

    def _blocked(self, connection: sqlite3.Connection, users: Collection[str]) -> set[str]:
        """Which of these users were deleted for good."""
        hashes = {self._hash(user): user for user in users}
        query = "SELECT hash FROM blocked WHERE hash IN (SELECT value FROM json_each(?))"
        return {hashes[row[0]] for row in connection.execute(query, (json.dumps(list(hashes)),))}


def _next(writer: sqlite3.Connection) -> int:
    """The number of this commit."""
    return int(writer.execute("UPDATE counter SET value = value + 1 RETURNING value").fetchall()[0][0])


def _event(row: tuple[Any, ...]) -> Event:
    user, event, _, at, item, kind, value, price, session, request, context = row
    return Event(event, user, item, kind, at, value, price, session, request, json.loads(context or "{}"))


def _person(connection: sqlite3.Connection, user: str) -> str:
    row = connection.execute("SELECT person FROM members WHERE user_id = ?", (user,)).fetchone()
    return str(row[0]) if row else user


def _members(connection: sqlite3.Connection, user: str) -> list[str]:
    """All ids of the person that an id belongs to, sorted."""
    query = "SELECT o.user_id FROM members m JOIN members o ON o.person = m.person WHERE m.user_id = ? ORDER BY 1"
    return [row[0] for row in connection.execute(query, (user,))] or [user]


def _links(connection: sqlite3.Connection, ids: Collection[str]) -> set[Link]:
    """The links between the ids of whole people."""
    return set(
        connection.execute("SELECT alias, target FROM links WHERE alias IN (SELECT value FROM json_each(?))", (json.dumps(list(ids)),))
    )
