"""The online store of a cluster, on Redis. No scripts; optimistic transactions per user; one round trip to read.

Per user: ``log`` (hash of event id -> event), ``head`` (hash with the revision of the log and the digests that have states) and one
``state`` string per digest, which expires when it is no longer used: it can always be folded again from the log. Keys of a user
share a hash slot. An acknowledged event is durable only if Redis says so, hence the check of its append-only file.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgpack
import pyarrow as pa

from maple.errors import ConfigError, ServeError
from maple.features.folder import Folder
from maple.features.states import UserState
from maple.features.store import Ack, Event, events_of, fold_new, rows_of
from maple.hashing import stable_hash

T = TypeVar("T")
MAX_ATTEMPTS = 50
STATE_SECONDS = 14 * 86_400


class RedisStore:
    """User events and states in Redis. ``url`` as ``redis://[user:password@]host:port/db`` or ``rediss://`` or ``unix://``.

    ``durable=False`` accepts a Redis that can lose acknowledged events (no append-only file, or not written on every command).
    """

    def __init__(self, url: str, folder: Folder, *, prefix: str = "maple", durable: bool = True, timeout: float = 5.0) -> None:
        try:
            import redis
        except ImportError:
            raise ConfigError("the Redis store needs the package redis: pip install 'maple-rec[redis]'") from None
        self.folder = folder
        self._prefix = prefix
        self._redis = redis
        try:
            self._client: Any = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
        except ValueError as error:
            raise ConfigError(f"the Redis URL is not usable: {error}. It looks like redis://host:6379/0") from None
        with self._errors():
            self._client.ping()
            if durable:
                self._check_durable()

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See ``OnlineStore``. One transaction per user."""
        by_user: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            by_user.setdefault(event.check().user_id, []).append(place)
        acks: list[Ack] = [Ack.DUPLICATE] * len(events)
        for user, places in by_user.items():
            stored = self._append(user, [events[place] for place in places])
            for place, ack in zip(places, stored, strict=True):
                acks[place] = ack
        return acks

    def get(self, user_ids: Sequence[str], folder: Folder | None = None) -> dict[str, UserState]:
        """See ``OnlineStore``."""
        folder = folder or self.folder
        with self._errors():
            pipe = self._client.pipeline(transaction=False)
            for user in user_ids:
                pipe.hget(self._key(user, "head"), "revision")
                pipe.get(self._key(user, folder.digest))
            answers = pipe.execute()
        out: dict[str, UserState] = {}
        for user, revision, blob in zip(user_ids, answers[::2], answers[1::2], strict=True):
            state = folder.empty(user) if revision is None else folder.unpack(blob, user, revision.decode())
            out[user] = self._refold(user, folder) if state is None else state
        return out

    def history(self, user_id: str) -> list[Event]:
        """See ``OnlineStore``."""
        with self._errors():
            return _events(user_id, self._client.hgetall(self._key(user_id, "log")))

    def delete(self, user_id: str) -> int:
        """See ``OnlineStore``."""

        def forget(pipe: Any) -> int:
            count = int(pipe.hlen(self._key(user_id, "log")))
            digests = [field.decode() for field in pipe.hkeys(self._key(user_id, "head")) if field != b"revision"]
            pipe.multi()
            pipe.delete(*(self._key(user_id, part) for part in ["log", "head", *digests]))
            pipe.execute()
            return count

        return self._transact(user_id, forget)

    def backfill(self, events: pa.Table) -> int:
        """See ``OnlineStore``."""
        return sum(ack == Ack.STORED for chunk in events_of(events) for ack in self.append(chunk))

    def adopt(self, folder: Folder) -> None:
        """See ``OnlineStore``."""
        self.folder = folder

    def close(self) -> None:
        """See ``OnlineStore``."""
        self._client.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _key(self, user: str, part: str) -> str:
        return f"{self._prefix}:{{{stable_hash('redis', user):016x}}}:{part}:{user}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._redis.RedisError as error:
            raise ServeError(f"Redis failed ({type(error).__name__}: {error}). Check that it runs and is not out of memory.") from error

    def _check_durable(self) -> None:
        """``ConfigError`` where an acknowledged event could be lost with the machine."""
        fix = "or set `durable: false` for the online store if losing events is acceptable."
        if not self._client.info("persistence").get("aof_enabled"):
            raise ConfigError(
                "this Redis has no append-only file, so acknowledged events could be lost. Start it with "
                f"`--appendonly yes --appendfsync always`, {fix}"
            )
        try:
            policy = self._client.config_get("appendfsync").get("appendfsync")
        except self._redis.ResponseError:
            policy = None
        if policy != "always":
            raise ConfigError(
                f"this Redis writes its append-only file by policy {policy or 'unknown'}, so acknowledged events could be lost. "
                f"Set `appendfsync always`, {fix}"
            )

    def _transact(self, user: str, work: Callable[[Any], T]) -> T:
        """Run ``work`` on a pipeline that watches the user's head, again while others change it."""
        with self._errors():
            for _ in range(MAX_ATTEMPTS):
                with self._client.pipeline() as pipe:
                    try:
                        pipe.watch(self._key(user, "head"))
                        return work(pipe)
                    except self._redis.WatchError:
                        continue
        raise ServeError(f"one user's events are written by too many at once ({MAX_ATTEMPTS} attempts failed); send them again")

    def _append(self, user: str, events: Sequence[Event]) -> list[Ack]:
        folder = self.folder
        log, head, place = self._key(user, "log"), self._key(user, "head"), self._key(user, folder.digest)

        def store(pipe: Any) -> list[Ack]:
            known = pipe.hmget(log, [event.event_id for event in events])
            acks, new = [], {}
            for event, held in zip(events, known, strict=True):
                fresh = held is None and event.event_id not in new
                acks.append(Ack.STORED if fresh else Ack.DUPLICATE)
                if fresh:
                    new[event.event_id] = event
            if not new:
                return acks
            revision = pipe.hget(head, "revision")
            old = folder.empty(user) if revision is None else folder.unpack(pipe.get(place), user, revision.decode())

            def whole(_: str) -> list[Event]:
                stored = _events(user, pipe.hgetall(log))
                return sorted([*stored, *new.values()], key=lambda event: event.order)

            state = fold_new(folder, {user: list(new.values())}, {user: old}, whole)[0]
            # a revision is never used twice, so a state of a log that was deleted meanwhile cannot come back
            mark = secrets.token_hex(8)
            pipe.multi()
            pipe.hset(log, mapping={event.event_id: _pack(event) for event in new.values()})
            pipe.hset(head, mapping={"revision": mark, folder.digest: ""})
            pipe.set(place, folder.pack(state, mark), ex=STATE_SECONDS)
            pipe.execute()
            return acks

        return self._transact(user, store)

    def _refold(self, user: str, folder: Folder) -> UserState:
        """Fold a user from the log and keep the result."""
        log, head = self._key(user, "log"), self._key(user, "head")

        def fold(pipe: Any) -> UserState:
            revision = pipe.hget(head, "revision")
            state = folder.advance([folder.empty(user)], rows_of([_events(user, pipe.hgetall(log))]))[0]
            if revision is not None:
                pipe.multi()
                pipe.hset(head, folder.digest, "")
                pipe.set(self._key(user, folder.digest), folder.pack(state, revision.decode()), ex=STATE_SECONDS)
                pipe.execute()
            return state

        return self._transact(user, fold)


def _pack(event: Event) -> bytes:
    packed: bytes = msgpack.packb(
        [event.item_id, event.event, event.timestamp, event.value, event.price, event.session_id, event.request_id, dict(event.context)]
    )
    return packed


def _events(user: str, log: dict[bytes, bytes]) -> list[Event]:
    """A user's log in order."""
    events = []
    for key, data in log.items():
        item, kind, time, value, price, session, request, context = msgpack.unpackb(data)
        events.append(Event(key.decode(), user, item, kind, time, value, price, session, request, context))
    return sorted(events, key=lambda event: event.order)
