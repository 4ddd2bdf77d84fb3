"""The service itself, without HTTP and without Ray: bundles held ready, the online store, the pipeline, the cache.

One object answers for one process. Up to two bundles are held and one of them answers; a request takes the bundle that
answers when it arrives and keeps it to its end, also in segments that run elsewhere, so no answer mixes two.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from maple import __version__
from maple.errors import DataError, MapleError
from maple.features.folder import Folder, Rows
from maple.features.spec import FeatureSpec
from maple.features.states import UserState
from maple.features.store import Ack, Event, OnlineStore
from maple.hashing import combine
from maple.recommend.bundle import Bundle, UnknownItem
from maple.recommend.engine import Deadline, Observer, Pipeline, Query, RemoteSegment, Segment, Slates
from maple.recommend.filters import FilterError
from maple.schema import EVENT_CODES, EVENT_TYPES
from maple.serve.api import EventIn, HistoryEvent, Range, RecommendationRequest, RequestError, rounded
from maple.serve.batcher import Batcher
from maple.serve.cache import ResponseCache
from maple.serve.http import Call
from maple.serve.settings import ServeSettings

log = logging.getLogger("maple.serve")

#: Events may be this far ahead of this machine's clock (the sender's runs fast); they count as happening now.
LEAD_US = 300 * 1_000_000

Remote = Callable[[str], Mapping[Segment, RemoteSegment] | None]
"""Where a bundle's segments run, by its digest; None = here."""


class Meter(Observer, Protocol):
    """Counts what the service does. Called from several threads; must be quick and never raise."""

    def on_answer(self, endpoint: str, seconds: float, path: Sequence[str], degraded: Sequence[str]) -> None: ...
    def on_refusal(self, endpoint: str, kind: str) -> None: ...
    def on_cache(self, outcome: str) -> None: ...
    def on_events(self, accepted: int, duplicates: int) -> None: ...


class NoMeter:
    """Counts nothing."""

    def on_stage(self, name: str, seconds: float, n_in: int, n_out: int, error: str | None) -> None: ...
    def on_answer(self, endpoint: str, seconds: float, path: Sequence[str], degraded: Sequence[str]) -> None: ...
    def on_refusal(self, endpoint: str, kind: str) -> None: ...
    def on_cache(self, outcome: str) -> None: ...
    def on_events(self, accepted: int, duplicates: int) -> None: ...


@dataclass(frozen=True, eq=False)
class Held:
    """A bundle ready to answer: its pipeline, what folds events into its features, and the queue of its runs."""

    digest: str
    bundle: Bundle
    pipeline: Pipeline
    folder: Folder
    batcher: Batcher


@dataclass(frozen=True, eq=False)
class Answer:
    """What the cache keeps: an answer without what belongs to one request."""

    items: list[dict[str, Any]]
    path: tuple[str, ...]
    degraded: tuple[str, ...]
    timings: Mapping[str, float]  # seconds


class LocalService:
    """The API's ``Service`` in one process; see ``serve.http.Service`` for the methods' meaning.

    ``open_store`` opens the online store, once; ``remote`` says where the segments of a bundle run.
    """

    def __init__(
        self,
        settings: ServeSettings,
        open_store: Callable[[Folder], OnlineStore],
        *,
        remote: Remote = lambda digest: None,
        meter: Meter | None = None,
    ) -> None:
        self.settings, self.open_store, self.remote = settings, open_store, remote
        self.meter: Meter = meter or NoMeter()
        self.store: OnlineStore | None = None
        self.generation = 0
        self.failed: Callable[[], Mapping[str, str]] = dict  # digests that could not be loaded, and why; set by who loads
        self._held: dict[str, Held] = {}
        self._serving: Held | None = None
        self._in_flight = 0
        self._compute = ThreadPoolExecutor(settings.threads, "maple-compute")
        self._io = ThreadPoolExecutor(8, "maple-io")
        self._cache: ResponseCache[Answer] = ResponseCache(settings.cache.size, settings.cache.lifetime_s)

    # -- bundles -------------------------------------------------------------------------------------------------------

    @property
    def held(self) -> list[str]:
        """Digests of the bundles that are ready, the one that answers first."""
        first = [self._serving.digest] if self._serving else []
        return first + [digest for digest in self._held if digest not in first]

    def prepare(self, bundle: Bundle) -> Held:
        """Make a bundle ready: build its pipeline, open the store, ask one question to warm everything up. Takes seconds; any thread."""
        assert bundle.digest is not None, "only a published bundle is served"
        pipeline = bundle.pipeline(observer=self.meter)
        folder = folder_of(bundle)
        if self.store is None:
            self.store = self.open_store(folder)
        self._warm_up(bundle, pipeline, folder)
        answer = partial(self._run, pipeline, self.remote(bundle.digest))
        return Held(bundle.digest, bundle, pipeline, folder, Batcher(answer, max_batch=self.settings.max_batch, workers=self.settings.runs))

    def _warm_up(self, bundle: Bundle, pipeline: Pipeline, folder: Folder) -> None:
        """Ask for a user with a history and one without: what compiles, maps or connects on first use does it now."""
        assert self.store is not None, "prepare has opened the store"
        history = [HistoryEvent.model_validate(dict(zip(("item_id", "event", "timestamp"), event, strict=True))) for event in _past(bundle)]
        known = RecommendationRequest(user_id="maple-warm-up", history=history)
        unknown = RecommendationRequest(user_id="maple-warm-up")
        states = (_given(folder, known), self.store.get([unknown.user_id], folder)[unknown.user_id])
        queries = [self._query(bundle, asked, state, "warm-up") for asked, state in zip((known, unknown), states, strict=True)]
        for batch in (queries[:1], queries):
            bundle.decode(pipeline.run(batch, explain=True, on_error="degrade"))

    def hold(self, ready: Mapping[str, Held], serve: str, generation: int) -> None:
        """From now on ``serve`` answers and exactly these bundles are held.

        The flip is one assignment: a request sees the one or the other.
        """
        self._held = dict(ready)
        self._serving = self._held[serve]
        self.generation = generation
        if self.store is not None:
            self.store.folder = self._serving.folder

    async def _run(
        self, pipeline: Pipeline, remote: Mapping[Segment, RemoteSegment] | None, queries: Sequence[Query], deadline: Deadline
    ) -> Slates:
        return await pipeline.arun(queries, executor=self._compute, deadline=deadline, remote=remote)

    def _current(self) -> Held:
        if self._serving is None:
            raise RequestError(503, "starting", "no bundle is loaded yet", "", "try again in a moment", 1)
        return self._serving

    # -- recommendations -----------------------------------------------------------------------------------------------

    async def recommend(self, request: RecommendationRequest, call: Call) -> dict[str, Any]:
        with self._admitted("recommendations"):
            held = self._current()
            deadline_ms = self.settings.deadline_ms or held.bundle.settings.deadline_ms
            deadline = Deadline(call.arrived + deadline_ms / 1000)
            started = time.monotonic()
            query, key = await asyncio.get_running_loop().run_in_executor(self._io, self._prepared, held, request, call.request_id)
            user_seconds = time.monotonic() - started
            answer, outcome = await self._cache.get(key, partial(self._answer, held, query, deadline), lambda answer: not answer.degraded)
            self.meter.on_cache(outcome)
            seconds = time.monotonic() - call.arrived
            timings = {"user": user_seconds, **({} if outcome == "hit" else answer.timings), "total": seconds}
            path = ("cache", *answer.path) if outcome == "hit" else answer.path
            self.meter.on_answer("recommendations", seconds, path, answer.degraded)
            return {
                "request_id": call.request_id, "bundle": held.digest, "path": list(path), "degraded": list(answer.degraded),
                "latency_ms": rounded(timings), "items": answer.items,
            }  # fmt: skip

    def _prepared(self, held: Held, request: RecommendationRequest, request_id: str) -> tuple[Query, str]:
        """The query and its cache key, from the request and the user's state as it is now."""
        if request.history is None:
            assert self.store is not None, "a held bundle has opened the store"
            state = self.store.get([request.user_id], held.folder)[request.user_id]
        else:
            now = self.now()
            for place, event in enumerate(request.history):
                _not_ahead(event.timestamp, now, f"history.{place}.timestamp")
            state = _given(held.folder, request)
        try:
            query = self._query(held.bundle, request, state, request_id)
        except FilterError as error:
            log.info("request %s: %s", request_id, error)
            hint = "filter by another column; /openapi.json says what a filter may be"
            raise RequestError(422, "invalid_filter", "these items cannot answer a filter", "filters", hint) from None
        return query, _key(held.digest, request, query, state)

    def _query(self, bundle: Bundle, request: RecommendationRequest, state: UserState, request_id: str) -> Query:
        times = state.times.tolist()
        history = [(item, EVENT_TYPES[event], at) for item, event, at in zip(state.items, state.events.tolist(), times, strict=True)]
        return bundle.query(
            request.user_id,
            now=max(self.now(), max(times, default=0) + 1),  # a row sees strictly earlier events; another node's clock may run ahead
            k=request.k, history=history, state=state, exclude=request.exclude, filters=_filters(bundle, request), context=request.context,
            request_id=request_id,
        )  # fmt: skip

    async def _answer(self, held: Held, query: Query, deadline: Deadline) -> Answer:
        share = await held.batcher.submit(query, deadline)
        slates = share.slates
        (recommended,) = held.bundle.decode(_row(slates, share.row))
        items = [
            {
                "item_id": one.item_id, "score": one.score, "source": one.source or "", "title": one.title,
                "reason": {"kind": one.reason.kind, "text": one.reason.text, "item_id": one.reason.item_id},
            }
            for one in recommended
        ]  # fmt: skip
        path = ("cold", *slates.path) if slates.cold[share.row] else slates.path
        return Answer(items, path, slates.degraded, {"queue": share.waited, **slates.timings})

    @contextmanager
    def _admitted(self, endpoint: str) -> Iterator[None]:
        """Inside, a request counts as in flight; one too many is refused at once."""
        if self._in_flight >= self.settings.max_in_flight:
            self.meter.on_refusal(endpoint, "overloaded")
            raise RequestError(503, "overloaded", "too many requests at once", "", "try again after the time in `Retry-After`", 1)
        self._in_flight += 1
        try:
            yield
        except RequestError as refusal:
            self.meter.on_refusal(endpoint, refusal.kind)
            raise
        finally:
            self._in_flight -= 1

    # -- the rest of the API -------------------------------------------------------------------------------------------

    async def similar(self, item_id: str, k: int, call: Call) -> dict[str, Any]:
        with self._admitted("similar"):
            held = self._current()
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._compute, held.bundle.similar, item_id, k)
            except UnknownItem as error:
                raise RequestError(404, "unknown_item", str(error), "item_id", "use an id of the catalogue") from None
            codes = held.bundle.space.items.encode([item for item, _ in found]).tolist()
            items = [
                {"item_id": item, "score": score, "title": held.bundle.title(code)}
                for (item, score), code in zip(found, codes, strict=True)
            ]  # fmt: skip
            self.meter.on_answer("similar", time.monotonic() - call.arrived, (), ())
            return {"request_id": call.request_id, "bundle": held.digest, "item_id": item_id, "items": items}

    async def events(self, events: list[EventIn], call: Call) -> dict[str, Any]:
        with self._admitted("events"):
            self._current()
            assert self.store is not None, "a held bundle has opened the store"
            rows = [_event(event, place, self.now()) for place, event in enumerate(events)]
            try:
                acks = await asyncio.get_running_loop().run_in_executor(self._io, self.store.append, rows)
            except DataError:
                hint = "a context may have 8 KiB; see /openapi.json for the other limits"
                raise RequestError(422, "invalid_request", "an event cannot be stored as it is", "events", hint) from None
            except (MapleError, OSError) as error:
                log.error("request %s: events were not stored: %s", call.request_id, error)
                hint = "send them again with the same event_id; nothing is counted twice"
                raise RequestError(503, "not_stored", "the events could not be made durable", "events", hint, 1) from None
            accepted = acks.count(Ack.STORED)
            self.meter.on_events(accepted, len(acks) - accepted)
            self.meter.on_answer("events", time.monotonic() - call.arrived, (), ())
            return {"request_id": call.request_id, "accepted": accepted, "duplicates": len(acks) - accepted}

    def info(self) -> dict[str, Any]:
        held = self._current()
        settings = held.bundle.settings
        models = {source.name: source.model for source in settings.sources}
        if settings.ranker is not None:
            models["ranker"] = settings.ranker.model
        return {
            "bundle": held.digest, "generation": self.generation, "placement": self.settings.placement,
            "data_fingerprint": held.bundle.about.data, "models": models, "num_items": len(held.bundle.space.items),
            "versions": {**held.bundle.about.versions, "serving": __version__, "serving_numpy": np.__version__},
            "held": self.held, "failed": dict(self.failed()), "store": self.settings.store.kind,
        }  # fmt: skip

    def health(self) -> dict[str, Any]:
        return {"status": "ok" if self._serving else "starting", "bundle": self._serving.digest if self._serving else None}

    def now(self) -> int:
        """The service's time in microseconds; offset where it serves data of another time."""
        return time.time_ns() // 1000 + int(self.settings.clock_offset_s * 1e6)

    def close(self) -> None:
        """Wait for running work and let go of threads and stores."""
        self._serving = None
        self._io.shutdown()
        self._compute.shutdown()
        if self.store is not None:
            self.store.close()


def folder_of(bundle: Bundle) -> Folder:
    """What folds events into the features of a bundle; only the history where it has no features."""
    plain = {"views": [], "history_limit": bundle.settings.history_limit}
    spec = bundle.features.spec if bundle.features is not None else FeatureSpec.parse(plain, "feature spec")
    return Folder(spec, bundle.catalogue)


def _past(bundle: Bundle) -> list[tuple[str, str, int]]:
    """A history to ask with: the longest of the bundle's canaries."""
    return max((list(canary.history) for canary in bundle.canaries), key=len, default=[])


def _filters(bundle: Bundle, request: RecommendationRequest) -> dict[str, Any]:
    """The filters as the pipeline takes them; refused where these items cannot answer them."""
    out: dict[str, Any] = {}
    columns = bundle.parts.item_columns
    for name, wanted in request.filters.items():
        if name not in columns.names:
            known = f"items have: {', '.join(columns.names)}"[:500]
            raise RequestError(422, "unknown_filter", "a filter names a column that items do not have", "filters", known)
        if isinstance(wanted, Range):
            bounds = wanted.model_dump(exclude_none=True)
            if not bounds or not columns.numeric(name):
                hint = "a range needs a numeric column or a time, and min, max or both; other columns take a list of accepted values"
                raise RequestError(422, "invalid_filter", "a filter is a range that cannot be", f"filters.{name}", hint)
            out[name] = bounds
        else:
            out[name] = wanted
    return out


def _given(folder: Folder, request: RecommendationRequest) -> UserState:
    """The state of a user who is the history in the request."""
    events = sorted(request.history or (), key=lambda event: event.timestamp)
    missing = np.full(len(events), np.nan, np.float32)
    rows = Rows(
        np.array([0, len(events)], np.int64), [f"{place:04d}" for place in range(len(events))], [event.item_id for event in events],
        np.array([EVENT_CODES[event.event] for event in events], np.int8), np.array([event.timestamp for event in events], np.int64),
        missing, missing,
    )  # fmt: skip
    return folder.advance([folder.empty(request.user_id)], rows)[0]


def _not_ahead(at: int, now: int, where: str) -> None:
    """Refuse a time that is further ahead than clocks differ."""
    if at > now + LEAD_US:
        hint = "check the sender's clock; an event cannot be later than now"
        raise RequestError(422, "invalid_request", "the event lies in the future", where, hint)


def _event(event: EventIn, place: int, now: int) -> Event:
    """The event as the store keeps it. Times ahead of our clock are now (a little) or refused (more)."""
    at = now if event.timestamp is None else event.timestamp
    _not_ahead(at, now, f"events.{place}.timestamp")
    event_id = event.event_id
    if event_id is None:
        # The same content gives the same id, so that a retry counts once; without a time there is nothing to know a retry by.
        told = event.model_dump_json(exclude={"event_id"})
        event_id = uuid.uuid4().hex if event.timestamp is None else combine(["event", told])[:32]
    return Event(
        event_id=event_id, user_id=event.user_id, item_id=event.item_id, event=event.event, timestamp=min(at, now),
        value=event.value, price=event.price, session_id=event.session_id, request_id=event.request_id, context=event.context,
    )  # fmt: skip


def _row(slates: Slates, row: int) -> Slates:
    """One query's part of a batch answer."""
    start, stop = int(slates.offsets[row]), int(slates.offsets[row + 1])
    return replace(
        slates,
        offsets=np.array([0, stop - start], np.int64), items=slates.items[start:stop], scores=slates.scores[start:stop],
        sources=slates.sources[start:stop], columns={name: column[start:stop] for name, column in slates.columns.items()},
        cold=slates.cold[row : row + 1], dropped=(),
    )  # fmt: skip


def _key(digest: str, request: RecommendationRequest, query: Query, state: UserState) -> str:
    """Everything an answer depends on but the time: bundle, request, and the user's events up to the last one stored."""
    tail = f"{request.history is None}:{state.size}:{state.tail[0]}:{state.tail[1]}"
    rest = json.dumps([query.k, request.exclude, query.filters, request.context], sort_keys=True)
    history = (query.items.tobytes() + query.events.tobytes() + query.times.tobytes()).hex()
    return combine([digest, request.user_id, tail, rest, history])
