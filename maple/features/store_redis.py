"""The online store of a cluster, on Redis: one script per user and call, so one round trip for reading and one for appending.

See ``redis_scripts`` for the keys. What changes who is whom (merging, deleting) is computed here and applied by a script that refuses if
an epoch has changed meanwhile. States expire when they are not refreshed; they can always be folded again from the log. An
acknowledged event is durable only if Redis says so, hence the check of its append-only file.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgpack
import pyarrow as pa

from maple.errors import ServeError
from maple.features import redis_scripts as scripts
from maple.features.folder import Folder
from maple.features.people import Link, check_attributes, check_group, check_links, groups, one_of_all, user_rows
from maple.features.redis_link import RedisLink
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

MAX_ATTEMPTS = 50
_CALL_EVENTS = 500  # of one user in one script


class RedisStore:
    """See ``OnlineStore``; ``url``, ``durable`` and ``timeout`` as ``RedisLink`` takes them; ``read_timeout`` in seconds, of states.

    States that are not refreshed for ``state_days`` expire. All keys start with ``prefix`` and must be on one server.
    """

    def __init__(
        self, url: str, folder: Folder, *, prefix: str = "maple", durable: bool = True, timeout: float = 5.0,
        read_timeout: float | None = None, state_days: float = 14.0,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._prefix = f"{prefix}:v2"
        self._blocked = f"{self._prefix}:blocked"
        self._state_seconds = max(1, int(state_days * 86_400))
        self._link = RedisLink(url, durable=durable, timeout=timeout, quick_timeout=read_timeout)
        with self._link.errors():
            self._link.client.set(f"{self._prefix}:salt", secrets.token_hex(16), nx=True)
            self._salt = self._link.client.get(f"{self._prefix}:salt").decode()

    # -- events --------------------------------------------------------------------------------------------------------

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See ``OnlineStore``. One step per user, all in one round trip."""
        by_user: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            by_user.setdefault(event.check().user_id, []).append(place)
        parts = [
            (user, places[start : start + _CALL_EVENTS])
            for user, places in by_user.items() for start in range(0, len(places), _CALL_EVENTS)
        ]  # fmt: skip
        if not parts:
            return []
        epoch = secrets.token_hex(8)
        calls = []
        for user, places in parts:
            packed = [part for place in places for part in (events[place].event_id, _pack(events[place]))]
            calls.append((self._stem(user), self._blocked, self._hash(user), epoch, *packed))
        acks: list[Ack] = [Ack.DELETED] * len(events)
        for (_, places), answer in zip(parts, self._link.run_all(scripts.APPEND, calls), strict=True):
            if answer != -1:
                for place, stored in zip(places, answer, strict=True):
                    acks[place] = Ack.STORED if stored else Ack.DUPLICATE
        return acks

    def get(self, user_ids: Sequence[str], folder: Folder | None = None) -> dict[str, UserState]:
        """See ``OnlineStore``."""
        return read_states(self, user_ids, folder or self.folder)

    def history(self, user_id: str) -> list[Event]:
        """See ``OnlineStore``."""
        logs = self._link.run(scripts.LOGS, self._stem(user_id))[2]
        events = [_event(event, member.decode() or user_id, data) for member, log in logs for event, data in _pairs(log)]
        return sorted(events, key=lambda event: (*event.order, event.user_id))

    def export(self, batch_rows: int = 50_000) -> Iterator[pa.Table]:
        """See ``OnlineStore``."""
        events: list[Event] = []
        seen: set[int] = set()  # scanning may give a key twice
        for key in self._scan("log"):
            mark = stable_hash("export", key)
            if mark in seen:
                continue
            seen.add(mark)
            user = key.removeprefix(f"{self._prefix}:").removesuffix(":log")[17:]
            with self._link.errors():
                events += [_event(event, user, data) for event, data in self._link.client.hgetall(key).items()]
            if len(events) >= batch_rows:
                yield to_table(events)
                events = []
        if events:
            yield to_table(events)

    def backfill(self, events: pa.Table, progress: Progress | None = None) -> int:
        """See ``OnlineStore``."""
        added = done = 0
        for chunk in events_of(events, rows=5_000):
            added += self.append(chunk).count(Ack.STORED)
            self.get(heavy_users(chunk))
            done += len(chunk)
            if progress is not None:
                progress(done)
        return added

    def reconcile(self, events: pa.Table, gone: pa.Table, progress: Progress | None = None) -> Reconciled:
        """See ``OnlineStore``."""
        out, done = Reconciled(), 0
        for chunk in events_of(events, rows=5_000):
            acks = self.append(chunk)
            there = [event for event, ack in zip(chunk, acks, strict=True) if ack is Ack.DUPLICATE]
            out += Reconciled(acks.count(Ack.STORED), self._amend(there), 0)
            self.get(heavy_users(chunk))
            done += len(chunk)
            if progress is not None:
                progress(done)
        calls = [(self._stem(user), secrets.token_hex(8), *ids) for user, ids in ids_by_user(gone)]
        return out + Reconciled(dropped=sum(self._link.run_all(scripts.DROP, calls)) if calls else 0)

    def delete(self, user_id: str, *, block: bool = False) -> int:
        """See ``OnlineStore``."""
        for _ in range(MAX_ATTEMPTS):
            ids, _, expected = self._people([user_id])
            gone = self._regroup(ids, expected, {}, (), forget=True, block=block)
            if gone >= 0:
                return gone
        raise self._busy()

    def expire(self, before: int) -> int:
        """See ``OnlineStore``. User by user."""
        gone = 0
        for key in self._scan("log"):
            late = []
            with self._link.errors():
                for event, data in self._link.client.hscan_iter(key, count=1000):
                    if msgpack.unpackb(data)[2] < before:
                        late.append(event)
            for start in range(0, len(late), 1000):
                gone += self._link.run(scripts.DROP, key.removesuffix(":log"), secrets.token_hex(8), *late[start : start + 1000])
        return gone

    # -- people --------------------------------------------------------------------------------------------------------

    def describe(self, user_id: str, attributes: Mapping[str, Attribute]) -> Ack:
        """See ``OnlineStore``."""
        told = check_attributes(attributes, f"user {check_id(user_id, 'user_id')!r}")
        return Ack.DELETED if self._tell([(user_id, told)], only_new=False)[0] == -1 else Ack.STORED

    def attributes(self, user_id: str) -> dict[str, Attribute]:
        """See ``OnlineStore``."""
        return dict(self.find([user_id], "")[0].attributes)

    def backfill_users(self, users: pa.Table, progress: Progress | None = None) -> int:
        """See ``OnlineStore``."""
        done = 0
        for batch in users.to_batches(2_000):
            self._tell(list(user_rows(pa.Table.from_batches([batch]))), only_new=True)
            done += batch.num_rows
            if progress is not None:
                progress(done)
        return done

    def merge(self, user_ids: Sequence[str], into: str) -> int:
        """See ``OnlineStore``. One step for all of them; both histories are one from then on, or nothing is changed."""
        asked = check_links(user_ids, into)
        for _ in range(MAX_ATTEMPTS):
            blocked = self._are_blocked([into, *(alias for alias, _ in asked)])
            told = [link for link in asked if not blocked.intersection(link)]
            if not told:
                return 0
            ids, links, expected = self._people([each for link in told for each in link])
            if set(told) <= links:
                return 0
            before = len(self._people([into])[0])
            links.update(told)
            found = groups(ids, links)
            for group in found.values():
                check_group(group, links)
            if self._regroup(ids, expected, found, links) >= 0:
                return len(ids) - before
        raise self._busy()

    def unmerge(self, alias: str) -> int:
        """See ``OnlineStore``."""
        for _ in range(MAX_ATTEMPTS):
            ids, links, expected = self._people([alias])
            left = {link for link in links if link[0] != alias}
            if len(left) == len(links) or self._regroup(ids, expected, groups(ids, left), left) >= 0:
                return len(links) - len(left)
        raise self._busy()

    def aliases(self, user_id: str) -> list[str]:
        """See ``OnlineStore``."""
        return sorted(self._people([user_id])[0])

    # -- the rest ------------------------------------------------------------------------------------------------------

    def prune(self, keep: Sequence[Folder]) -> int:
        """See ``OnlineStore``. What was not refreshed for long is gone by itself."""
        kept = {folder.digest for folder in keep}
        calls = [pair for pair in (key.rsplit(":state:", 1) for key in self._scan("state:*")) if pair[1] not in kept]
        return sum(sum(self._link.run_all(scripts.UNKEEP, calls[start : start + 1000])) for start in range(0, len(calls), 1000))

    def adopt(self, folder: Folder) -> None:
        """See ``OnlineStore``."""
        self.folder = folder

    def close(self) -> None:
        """See ``OnlineStore``."""
        self._link.close()

    # -- what reading needs --------------------------------------------------------------------------------------------

    def find(self, user_ids: Sequence[str], digest: str) -> list[Found]:
        """See ``Backend``."""
        out = []
        answers = self._link.run_all(scripts.FIND, [(self._stem(user), digest) for user in user_ids], quickly=True)
        for user, (person, epoch, count, covered, blob, pending, about) in zip(user_ids, answers, strict=True):
            goes_by = user if person is None else person.decode()
            told = [(member.decode(), name.decode(), json.loads(value)) for member, pairs in about for name, value in _pairs(pairs)]
            lines = [_line(event, data) for event, data in _pairs(pending)]
            out.append(Found(goes_by, (epoch or b"").decode(), blob, covered, count, lines, one_of_all(told, goes_by)))
        return out

    def pasts(self, people: Sequence[str]) -> list[Past]:
        """See ``Backend``."""
        out = []
        for epoch, count, logs in self._link.run_all(scripts.LOGS, [(self._stem(person),) for person in people], quickly=True):
            lines = [_line(event, data) for _, log in logs for event, data in _pairs(log)]
            lines = once(lines) if len(logs) > 1 else in_order(lines)
            out.append(Past((epoch or b"").decode(), count, lines))
        return out

    def keep(self, checkpoints: Sequence[Checkpoint], digest: str) -> None:
        """See ``Backend``."""
        life = self._state_seconds
        calls = [(self._stem(each.person), digest, each.epoch, each.place, each.blob, life) for each in checkpoints]
        self._link.run_all(scripts.KEEP, calls, quickly=True)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _stem(self, user: str) -> str:
        return f"{self._prefix}:{stable_hash('redis', user):016x}:{user}"

    def _hash(self, user: str) -> str:
        return f"{stable_hash(self._salt, user):016x}"

    def _amend(self, events: Sequence[Event]) -> int:
        """Make what is stored of these events what they say, as far as a fold reads it; returns how many said something else."""
        with self._link.errors():
            pipe = self._link.client.pipeline(transaction=False)
            for event in events:
                pipe.hget(f"{self._stem(event.user_id)}:log", event.event_id)
            found = pipe.execute()
        other: dict[str, list[str | bytes]] = {}
        for event, data in zip(events, found, strict=True):
            if data is not None and not folds_alike(_line(event.event_id.encode(), data), event.line):
                other.setdefault(event.user_id, []).extend((event.event_id, msgpack.packb([*event.line[1:], *msgpack.unpackb(data)[5:]])))
        calls = [
            (self._stem(user), secrets.token_hex(8), *pairs[start : start + 2 * _CALL_EVENTS])
            for user, pairs in other.items() for start in range(0, len(pairs), 2 * _CALL_EVENTS)
        ]  # fmt: skip
        return sum(self._link.run_all(scripts.AMEND, calls)) if calls else 0

    def _are_blocked(self, users: Sequence[str]) -> set[str]:
        with self._link.errors():
            found = self._link.client.smismember(self._blocked, [self._hash(user) for user in users])
        return {user for user, yes in zip(users, found, strict=True) if yes}

    def _scan(self, part: str) -> Iterator[str]:
        """The keys of all users for one part."""
        literal = "".join("\\" + letter if letter in "*?[]\\" else letter for letter in self._prefix)
        with self._link.errors():
            for key in self._link.client.scan_iter(f"{literal}:*:{part}", count=1000):
                yield key.decode()

    def _tell(self, told: Sequence[tuple[str, Mapping[str, Attribute]]], *, only_new: bool) -> list[int]:
        calls = []
        for user, row in told:
            pairs = [part for name, value in row.items() for part in (name, "" if value is None else json.dumps(value))]
            calls.append((self._stem(user), self._blocked, self._hash(user), int(only_new), *pairs))
        return self._link.run_all(scripts.DESCRIBE, calls) if calls else []

    def _people(self, user_ids: Sequence[str]) -> tuple[dict[str, str], set[Link], list[tuple[str, str]]]:
        """All ids of the people that these belong to with their stems, the links between them, and the epochs of these people."""
        ids: dict[str, str] = {}
        links: set[Link] = set()
        expected = {}
        answers = self._link.run_all(scripts.PERSON, [(self._stem(user),) for user in user_ids])
        for user, (epoch, members, told, _, stem) in zip(user_ids, answers, strict=True):
            ids |= dict(msgpack.unpackb(members)) if members else {user: self._stem(user)}
            links |= {(alias, into) for alias, into in msgpack.unpackb(told)} if told else set()
            expected[stem.decode()] = (epoch or b"").decode()
        return ids, links, list(expected.items())

    def _regroup(
        self, ids: Mapping[str, str], expected: Sequence[tuple[str, str]], found: Mapping[str, Sequence[str]], links: Collection[Link],
        *, forget: bool = False, block: bool = False,
    ) -> int:  # fmt: skip
        """Make people of ids, if their epochs are as expected and none that is linked was deleted for good; -1 if not."""
        made = []
        for person, group in found.items():
            inside = [link for link in sorted(links) if link[0] in group]
            made.append((person, ids[person], [(each, ids[each]) for each in group], inside))
        order = {
            "expected": expected, "ids": list(ids.items()), "groups": made, "epoch": secrets.token_hex(8), "forget": forget,
            "blocked": self._blocked, "block": [self._hash(each) for each in ids if block],
            "refuse": [self._hash(each) for each in ids if links],
        }  # fmt: skip
        return int(self._link.run(scripts.REGROUP, msgpack.packb(order)))

    @staticmethod
    def _busy() -> ServeError:
        return ServeError(f"the ids of one person are changed by too many at once ({MAX_ATTEMPTS} attempts failed); try again")


def _pairs(flat: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _pack(event: Event) -> bytes:
    packed: bytes = msgpack.packb(
        [event.item_id, event.event, event.timestamp, event.value, event.price, event.session_id, event.request_id, dict(event.context)]
    )
    return packed


def _line(event: bytes, data: bytes) -> Line:
    item, kind, time, value, price, *_ = msgpack.unpackb(data)
    return event.decode(), item, kind, time, value, price


def _event(event: bytes, user: str, data: bytes) -> Event:
    item, kind, time, value, price, session, request, context = msgpack.unpackb(data)
    return Event(event.decode(), user, item, kind, time, value, price, session, request, context)
