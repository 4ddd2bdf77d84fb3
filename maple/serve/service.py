"""The service itself, without HTTP and without Ray: bundles held ready, the online store, the pipeline, the cache.

One object answers for one process. Up to two bundles are held and one of them answers; a request takes the bundle that
answers when it arrives and keeps it to its end, also in segments that run elsewhere, so no answer mixes two.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from maple import __version__
from maple.artifacts import Place
from maple.clock import SteadyClock
from maple.errors import ServeError
from maple.features.folder import Folder, Rows
from maple.features.live_items import LiveItems
from maple.features.spec import FeatureSpec
from maple.features.states import UserState
from maple.features.store import Ack, Event, OnlineStore
from maple.hashing import combine
from maple.recommend.bundle import Bundle, UnknownItem
from maple.recommend.engine import Deadline, Pipeline, Query, RemoteSegment, Segment, Slates
from maple.recommend.filters import FilterError
from maple.recommend.live import LiveBundle
from maple.schema import EVENT_CODES, EVENT_TYPES
from maple.serve.api import EventIn, HistoryEvent, Range, RecommendationRequest, RequestError, rounded
from maple.serve.batcher import Batcher
from maple.serve.cache import ResponseCache
from maple.serve.door import Door, Meter, NoMeter
from maple.serve.http import Call
from maple.serve.live import Items, LiveCatalogue, Poller
from maple.serve.people import People
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_live

log = logging.getLogger("maple.serve")

#: Events may be this far ahead of this machine's clock (the sender's runs fast); they count as happening now.
LEAD_US = 300 * 1_000_000

#: How much of the time that a request has left may go into reading the user's state.
STORE_SHARE = 0.7

Remote = Callable[[LiveBundle], Mapping[Segment, RemoteSegment] | None]
"""Where the segments of a bundle run; None = here."""


@dataclass(frozen=True, eq=False)
class Held:
    """A bundle over the live catalogue, ready to answer: its pipeline, what folds events into its features, and the queue of its runs.

    ``stamp`` identifies the state of the live catalogue; another state is another ``Held``.
    """

    digest: str
    bundle: LiveBundle
    stamp: int
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


@dataclass(frozen=True, eq=False)
class Stores:
    """What a service keeps open: the online store, the live items, and who reads these."""

    store: OnlineStore
    live: LiveCatalogue
    poller: Poller

    def close(self) -> None:
        self.poller.close()
        self.live.close()
        self.store.close()


class LocalService:
    """The API's ``Service`` in one process; see ``serve.http.Service`` for the methods' meaning.

    ``open_store`` opens the online store, ``open_items`` the live items, each once; ``remote`` says where the segments of a bundle run.
    """

    def __init__(
        self,
        settings: ServeSettings,
        open_store: Callable[[Folder], OnlineStore],
        *,
        open_items: Callable[[], LiveItems] | None = None,
        remote: Remote = lambda bundle: None,
        meter: Meter | None = None,
    ) -> None:
        self.settings, self.open_store, self.remote = settings, open_store, remote
        self.open_items = open_items or partial(open_live, settings)
        self.meter: Meter = meter or NoMeter()
        self.door = Door(settings.max_in_flight, self.meter)
        self.items = Items(
            self.door, lambda: self._opened().live.items, lambda: self._current().bundle, lambda: self._opened().poller.wake()
        )
        self.people = People(self.door, lambda: self._opened().store, Place.at(settings.home), self._forget_answers)
        self.generation = 0
        self.failed: Callable[[], Mapping[str, str]] = dict  # digests that could not be loaded, and why; set by who loads
        self._held: dict[str, Held] = {}
        self._serving: Held | None = None
        self._stores: Stores | None = None
        self._opening, self._turn = threading.Lock(), threading.Lock()
        self._clock = SteadyClock()
        self._compute = ThreadPoolExecutor(settings.threads, "maple-compute")
        self._cache: ResponseCache[Answer] = ResponseCache(settings.cache.size, settings.cache.lifetime_s)

    # -- bundles -------------------------------------------------------------------------------------------------------

    @property
    def held(self) -> list[str]:
        """Digests of the bundles that are ready, the one that answers first."""
        first = [self._serving.digest] if self._serving else []
        return first + [digest for digest in self._held if digest not in first]

    def prepare(self, bundle: Bundle) -> Held:
        """Make a bundle ready: open the stores, build its pipeline, ask one question to warm everything up. Takes seconds; any thread."""
        assert bundle.digest is not None, "only a published bundle is served"
        with self._opening:
            if self._stores is None:
                self._stores = self._open(folder_of(bundle))
        held = self._over(bundle)
        self._warm_up(held)
        return held

    def _open(self, folder: Folder) -> Stores:
        live = LiveCatalogue(self.open_items(), self.now)
        live.poll()
        return Stores(self.open_store(folder), live, Poller(self.refresh, self.settings.live_poll_s))

    def _over(self, bundle: Bundle, before: Held | None = None) -> Held:
        """A bundle over the live catalogue as it is now."""
        over, stamp = self._opened().live.over(bundle, None if before is None else before.bundle)
        pipeline = over.pipeline(observer=self.meter)
        answer = partial(self._run, pipeline, self.remote(over))
        batcher = Batcher(answer, max_batch=self.settings.max_batch, workers=self.settings.runs)
        return Held(str(bundle.digest), over, stamp, pipeline, folder_of(bundle) if before is None else before.folder, batcher)

    def _warm_up(self, held: Held) -> None:
        """Ask for a user with a history and one without: what compiles, maps or connects on first use does it now."""
        past = [dict(zip(("item_id", "event", "timestamp"), event, strict=True)) for event in _past(held.bundle)]
        known = RecommendationRequest(user_id="maple-warm-up", history=[HistoryEvent.model_validate(event) for event in past])
        unknown = RecommendationRequest(user_id="maple-warm-up")
        states = (_given(held.folder, known), self._opened().store.get([unknown.user_id], held.folder)[unknown.user_id])
        queries = [self._query(held.bundle, asked, state, "warm-up") for asked, state in zip((known, unknown), states, strict=True)]
        for batch in (queries[:1], queries):
            held.bundle.decode(held.pipeline.run(batch, explain=True, on_error="degrade"))

    def hold(self, ready: Mapping[str, Held], serve: str, generation: int) -> None:
        """From now on ``serve`` answers and exactly these bundles are held.

        The flip is one assignment: a request sees the one or the other.
        """
        with self._turn:
            self._place(ready, serve)
            self.generation = generation
        store, folders = self._opened().store, [held.folder for held in ready.values()]
        store.adopt(ready[serve].folder)
        self.door.later(lambda: store.prune(folders))

    def refresh(self) -> None:
        """Read the live items; if they have changed, the next request sees them. Any thread."""
        with self._turn:
            if self._opened().live.poll():
                self.meter.on_live("changed")
                if self._serving is not None:
                    self._place(self._held, self._serving.digest)

    def _place(self, ready: Mapping[str, Held], serve: str) -> None:
        stamp = self._opened().live.seen.stamp
        self._held = {digest: held if held.stamp == stamp else self._over(held.bundle.base, held) for digest, held in ready.items()}
        self._serving = self._held[serve]

    def _opened(self) -> Stores:
        if self._stores is None:
            raise _starting()
        return self._stores

    def _forget_answers(self) -> None:
        self._cache.clear()

    async def _run(
        self, pipeline: Pipeline, remote: Mapping[Segment, RemoteSegment] | None, queries: Sequence[Query], deadline: Deadline
    ) -> Slates:
        return await pipeline.arun(queries, executor=self._compute, deadline=deadline, remote=remote)

    def _current(self) -> Held:
        if self._serving is None:
            raise _starting()
        return self._serving

    # -- recommendations -----------------------------------------------------------------------------------------------

    async def recommend(self, request: RecommendationRequest, call: Call) -> dict[str, Any]:
        with self.door.admitted("recommendations"):
            held = self._current()
            deadline_ms = self.settings.deadline_ms or held.bundle.settings.deadline_ms
            deadline = Deadline(call.arrived + deadline_ms / 1000)
            started = time.monotonic()
            query, key, notes = await self._asked(held, request, call.request_id, deadline)
            user_seconds = time.monotonic() - started
            answer, outcome = await self._cache.get(key, partial(self._answer, held, query, deadline), lambda answer: not answer.degraded)
            self.meter.on_cache(outcome)
            seconds = time.monotonic() - call.arrived
            timings = {"user": user_seconds, **({} if outcome == "hit" else answer.timings), "total": seconds}
            path = ("cache", *answer.path) if outcome == "hit" else answer.path
            degraded = (*notes, *answer.degraded)
            self.meter.on_answer("recommendations", seconds, path, degraded)
            return {
                "request_id": call.request_id, "bundle": held.digest, "path": list(path), "degraded": list(degraded),
                "latency_ms": rounded(timings), "items": answer.items,
            }  # fmt: skip

    async def _asked(
        self, held: Held, request: RecommendationRequest, request_id: str, deadline: Deadline
    ) -> tuple[Query, str, tuple[str, ...]]:  # fmt: skip
        """The query, its cache key, and what was answered around: whom the store does not give in time is taken for a new user."""
        prepared = partial(self._prepared, held, request, request_id)
        try:
            return *await asyncio.wait_for(self.door.run(prepared), STORE_SHARE * deadline.left()), ()
        except (ServeError, TimeoutError) as error:
            log.warning("request %s: answered without the user's state: %s", request_id, str(error) or "the online store is late")
        without = partial(prepared, held.folder.empty(request.user_id))
        # Not by the threads that may all be waiting for the store.
        query, key = await asyncio.get_running_loop().run_in_executor(self._compute, without)
        return query, key, () if request.history is not None else ("user: store",)

    def _prepared(
        self, held: Held, request: RecommendationRequest, request_id: str, state: UserState | None = None
    ) -> tuple[Query, str]:  # fmt: skip
        """The query and its cache key, from the request and the user's state: a given one, or as it is now."""
        if request.history is not None:
            now = self.now()
            for place, event in enumerate(request.history):
                _not_ahead(event.timestamp, now, f"history.{place}.timestamp")
            state = _given(held.folder, request)
        elif state is None:
            state = self._opened().store.get([request.user_id], held.folder)[request.user_id]
        try:
            query = self._query(held.bundle, request, state, request_id)
        except FilterError as error:
            log.info("request %s: %s", request_id, error)
            hint = "filter by another column; /openapi.json says what a filter may be"
            raise RequestError(422, "invalid_filter", "these items cannot answer a filter", "filters", hint) from None
        return query, _key(f"{held.digest}:{held.stamp}", request, query, state)

    def _query(self, bundle: Bundle, request: RecommendationRequest, state: UserState, request_id: str) -> Query:
        times = state.times.tolist()
        history = [(item, EVENT_TYPES[event], at) for item, event, at in zip(state.items, state.events.tolist(), times, strict=True)]
        return bundle.query(
            request.user_id,
            now=max(self.now(), max(times, default=0) + 1),  # a row sees strictly earlier events; another node's clock may run ahead
            k=request.k, history=history, state=state, exclude=request.exclude, filters=_filters(bundle, request), context=request.context,
            attributes={**state.attributes, **request.attributes}, request_id=request_id,
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

    # -- the rest of the API -------------------------------------------------------------------------------------------

    async def similar(self, item_id: str, k: int, call: Call) -> dict[str, Any]:
        with self.door.admitted("similar"):
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
        self._current()
        rows = [_event(event, place, self.now()) for place, event in enumerate(events)]
        acks = await self.door.write("events", call, lambda: self._opened().store.append(rows), "events")
        duplicates, deleted = acks.count(Ack.DUPLICATE), acks.count(Ack.DELETED)
        self.meter.on_events(len(acks) - duplicates - deleted, duplicates, deleted)
        # Events of somebody who is forgotten are dropped without a word: an answer must not tell who that is.
        return {"request_id": call.request_id, "accepted": len(acks) - duplicates, "duplicates": duplicates}

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
            "held": self.held, "failed": dict(self.failed()), "store": self.settings.store.kind, "live": self._live_info(held),
        }  # fmt: skip

    def _live_info(self, held: Held) -> dict[str, Any]:
        live = self._opened().live
        view, age = live.seen.view, time.monotonic() - live.read_at
        return {"version": view.version, "items": len(view.items), "new": held.bundle.num_new, "read_s": round(age, 3)}

    def health(self) -> dict[str, Any]:
        return {"status": "ok" if self._serving else "starting", "bundle": self._serving.digest if self._serving else None}

    def now(self) -> int:
        """The service's time in microseconds; offset where it serves data of another time."""
        return self._clock.now() + int(self.settings.clock_offset_s * 1e6)

    def close(self) -> None:
        """Wait for running work and let go of threads and stores."""
        self._serving = None
        self.door.close()
        self._compute.shutdown()
        if self._stores is not None:
            self._stores.close()


def folder_of(bundle: Bundle) -> Folder:
    """What folds events into the features of a bundle; only the history where it has no features."""
    plain = {"views": [], "history_limit": bundle.settings.history_limit}
    spec = bundle.features.spec if bundle.features is not None else FeatureSpec.parse(plain, "feature spec")
    return Folder(spec, bundle.catalogue)


def _starting() -> RequestError:
    return RequestError(503, "starting", "no bundle is loaded yet", "", "try again in a moment", 1)


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


def _key(bundle: str, request: RecommendationRequest, query: Query, state: UserState) -> str:
    """Everything an answer depends on but the time: bundle and live catalogue, request, and the user's events up to the last one stored."""
    tail = f"{request.history is None}:{state.size}:{state.tail[0]}:{state.tail[1]}"
    rest = json.dumps([query.k, request.exclude, query.filters, request.context, dict(query.attributes)], sort_keys=True)
    history = (query.items.tobytes() + query.events.tobytes() + query.times.tobytes()).hex()
    return combine([bundle, request.user_id, tail, rest, history])
