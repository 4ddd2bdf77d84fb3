"""Recommending is a list of stages over a ragged batch: what a query is, what candidates are, and the pipeline that runs them.

The same pipeline object runs in offline evaluation (many queries), in batch jobs and behind HTTP (one query). A stage
conserves: what it keeps and what it drops (with a reason) is what came in, plus what it added if it says it adds; no
duplicates, no unfinite score. The engine checks this after every stage; a stage that breaks it has failed.

Three segments are the placement boundaries of serving: ``retrieve`` and ``rank`` may run elsewhere, ``finish`` is cheap and
stays with the answer. After ``retrieve`` and after ``rank`` candidates are sorted by score; in ``finish`` their order counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from maple.data.dataset import Bool, Float32, Histories, Int8, Int32, Int64, ragged_take
from maple.errors import ServeError
from maple.models.base import Array, QueryBatch

log = logging.getLogger("maple.recommend")

Segment: TypeAlias = Literal["retrieve", "rank", "finish"]
Ties: TypeAlias = Int32  # one fixed pseudo-random rank per item code: ``index.tie_ranks(ids)``; of equal scores the lower comes first


class StageError(ServeError):
    """A stage broke the contract of candidates, or one that the answer cannot do without failed."""


class Late(StageError):
    """The deadline passed before a stage could start."""


# -- values ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Query:
    """One request: a user is their history. Item codes are those of the bundle that answers; -1 = unknown to it."""

    user: str
    items: Int32  # the history, oldest first
    events: Int8
    times: Int64  # microseconds
    now: int  # microseconds
    k: int = 10
    state: Any = None  # features.states.UserState: the folded views of this user, None = no features yet
    attributes: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Any] = field(default_factory=dict)
    exclude: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    filters: Mapping[str, Any] = field(default_factory=dict)  # column -> accepted values
    request_id: str = ""

    @property
    def cold(self) -> bool:
        """Whether nothing in the history is known to the bundle."""
        return not (self.items >= 0).any()


def batch(queries: Sequence[Query]) -> QueryBatch:
    """The queries as models see them."""
    histories = Histories.of([(query.items, query.events, query.times) for query in queries])
    return QueryBatch(histories, np.array([query.now for query in queries], dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Dropped:
    """Items that a stage dropped: query row, item code, stage and reason, aligned; one (stage, reason) per chunk."""

    rows: Int64
    items: Int32
    stage: str
    reason: str


@dataclass(frozen=True, eq=False)
class Candidates:
    """Ragged candidates of B queries. ``score`` orders them; ``columns`` are aligned arrays [N]."""

    offsets: Int64
    items: Int32
    score: Float32
    columns: Mapping[str, Array] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    degraded: tuple[str, ...] = ()  # what went wrong and was answered around, e.g. "rank: deadline"

    @staticmethod
    def empty(num_queries: int) -> Candidates:
        return Candidates(np.zeros(num_queries + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.items)

    def rows(self) -> Int64:
        """The query of every candidate, int64[N]; not to be written to."""
        return self._rows

    def places(self) -> Int64:
        """The place of every candidate in its query, from 0, int64[N]; not to be written to."""
        return self._places

    @cached_property
    def _rows(self) -> Int64:
        return np.repeat(np.arange(len(self.offsets) - 1), self.offsets[1:] - self.offsets[:-1])

    @cached_property
    def _places(self) -> Int64:
        return np.arange(len(self)) - self.offsets[self._rows]

    def with_columns(self, columns: Mapping[str, Array]) -> Candidates:
        """With more (or replaced) columns."""
        return replace(self, columns={**self.columns, **columns})

    def with_score(self, score: Array) -> Candidates:
        return replace(self, score=np.asarray(score, dtype=np.float32))

    def degrade(self, *notes: str) -> Candidates:
        return replace(self, degraded=(*self.degraded, *notes))

    def keep(self, keep: Bool, stage: str, reason: str) -> Candidates:
        """Those where ``keep`` bool[N]; the rest is dropped for ``reason``."""
        if keep.all():
            return self
        rows = self.rows()
        out = self._at(np.flatnonzero(keep), np.concatenate([[0], np.cumsum(np.bincount(rows[keep], minlength=len(self.offsets) - 1))]))
        return replace(out, dropped=(*self.dropped, Dropped(rows[~keep], self.items[~keep], stage, reason)))

    def reorder(self, order: Int64) -> Candidates:
        """The candidates at flat positions ``order`` int64[N], a permutation that stays inside each query."""
        return self._at(order, self.offsets)

    def take(self, rows: Array) -> Candidates:
        """The candidates of some queries; dropped items and notes are left behind."""
        index, offsets = ragged_take(self.offsets, rows)
        return replace(self._at(index, offsets), dropped=(), degraded=())

    def _at(self, index: Array, offsets: Array) -> Candidates:
        columns = {name: column[index] for name, column in self.columns.items()}
        return replace(self, offsets=offsets.astype(np.int64), items=self.items[index], score=self.score[index], columns=columns)


@dataclass(frozen=True, eq=False)
class Slates:
    """Answers of B queries, best first. ``sources`` int[N] are places in ``source_names`` (-1 = none); ``columns`` hold the rest,
    among them ``reason.kind`` and ``reason.item`` where the pipeline explains. ``timings`` are seconds per segment and stage."""

    offsets: Int64
    items: Int32
    scores: Float32
    sources: Array
    source_names: tuple[str, ...]
    columns: Mapping[str, Array]
    path: tuple[str, ...]  # the segments that gave the answer, e.g. ("retrieve", "rank", "finish") or ("fallback", "finish")
    degraded: tuple[str, ...]
    timings: Mapping[str, float]
    dropped: tuple[Dropped, ...]
    cold: Bool  # [B], queries without any known history

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lists(self, width: int) -> tuple[Int32, Float32]:
        """As rectangles (int32[B, width], float32[B, width]), padded with -1 and -inf."""
        items = np.full((len(self), width), -1, dtype=np.int32)
        scores = np.full((len(self), width), -np.inf, dtype=np.float32)
        sizes = np.diff(self.offsets)
        rows, places = np.repeat(np.arange(len(self)), sizes), np.arange(len(self.items)) - np.repeat(self.offsets[:-1], sizes)
        fits = places < width
        items[rows[fits], places[fits]] = self.items[fits]
        scores[rows[fits], places[fits]] = self.scores[fits]
        return items, scores

    def trace(self, row: int) -> list[tuple[int, str, str]]:
        """Everything dropped for one query: (item code, stage, reason), in the order it happened."""
        return [(int(item), part.stage, part.reason) for part in self.dropped for item in part.items[part.rows == row]]


# -- stages ------------------------------------------------------------------------------------------------------------


class Stage(Protocol):
    """One step. ``adds``: it may add items (sources, backfill). ``essential``: an answer without it is wrong (filters)."""

    @property
    def name(self) -> str: ...
    @property
    def adds(self) -> bool: ...
    @property
    def essential(self) -> bool: ...
    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates: ...


StageFunction: TypeAlias = Callable[[Sequence[Query], Candidates], Candidates]


@dataclass(frozen=True)
class FunctionStage:
    """A plain function as a stage."""

    name: str
    function: StageFunction
    adds: bool = False
    essential: bool = False

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        return self.function(queries, candidates)


def per_query(function: Callable[[Query, Candidates], Candidates]) -> StageFunction:
    """Lift a function of one query and its candidates to a batch. All results need the same columns."""

    def lifted(queries: Sequence[Query], candidates: Candidates) -> Candidates:
        parts = [function(query, candidates.take(np.array([row]))) for row, query in enumerate(queries)]
        if not parts:
            return candidates
        names = parts[0].columns.keys()
        if any(part.columns.keys() != names for part in parts):
            raise StageError("a per-query stage gave different columns for different queries of one batch")
        dropped = tuple(
            Dropped(np.full(len(chunk.items), row, np.int64), chunk.items, chunk.stage, chunk.reason)
            for row, part in enumerate(parts) for chunk in part.dropped
        )  # fmt: skip
        return Candidates(
            np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
            np.concatenate([part.items for part in parts]),
            np.concatenate([part.score for part in parts]),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in names},
            (*candidates.dropped, *dropped),
            (*candidates.degraded, *(note for part in parts for note in part.degraded)),
        )

    return lifted


class Observer(Protocol):
    """Counts what happens. Called from worker threads as well; must be thread-safe, quick and never raise."""

    def on_stage(self, name: str, seconds: float, n_in: int, n_out: int, error: str | None) -> None: ...


@dataclass(frozen=True)
class Deadline:
    """A point on ``time.monotonic()`` by which the answer must leave."""

    at: float

    @staticmethod
    def after(seconds: float) -> Deadline:
        return Deadline(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds that are left, negative when it has passed."""
        return self.at - time.monotonic()


@dataclass(frozen=True, eq=False)
class SegmentResult:
    """What a segment gives: its candidates and the seconds of each of its stages."""

    candidates: Candidates
    timings: Mapping[str, float]


RemoteSegment: TypeAlias = Callable[[Sequence[Query], Candidates, Deadline | None], Awaitable[SegmentResult]]


def check(stage: Stage, before: Candidates, after: Candidates, num_queries: int, num_items: int | None = None) -> None:
    """``StageError`` if ``after`` is not a legal answer of ``stage`` to ``before``: aligned, finite, no duplicates, conserved."""
    if after is before:
        return
    size = len(after.items)
    offsets = after.offsets
    if len(offsets) != num_queries + 1 or offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
        raise StageError(f"stage {stage.name!r} returned offsets that do not fit {num_queries} queries and {size} candidates")
    for name, column in {"score": after.score, **after.columns}.items():
        if len(column) != size:
            raise StageError(f"stage {stage.name!r} returned {len(column)} values of {name!r} for {size} candidates")
    if not np.isfinite(after.score).all():
        raise StageError(f"stage {stage.name!r} returned a score that is not a finite number")
    if size and (after.items.min() < 0 or (num_items is not None and after.items.max() >= num_items)):
        raise StageError(f"stage {stage.name!r} returned an item code outside the catalogue")
    known = len(before.dropped)
    if after.dropped[:known] != before.dropped:
        raise StageError(f"stage {stage.name!r} changed what earlier stages had dropped")
    kept = np.sort(_keys(after.rows(), after.items))
    if (kept[1:] == kept[:-1]).any():
        raise StageError(f"stage {stage.name!r} returned an item twice for one query")
    came = np.sort(_keys(before.rows(), before.items))
    new = after.dropped[known:]
    went = np.sort(np.concatenate([kept, *(_keys(part.rows, part.items) for part in new)])) if new else kept
    if stage.adds:
        lost, extra = not np.isin(came, went).all(), (went[1:] == went[:-1]).any()
    else:
        lost, extra = not np.array_equal(came, went), False
    if lost or extra:
        raise StageError(f"stage {stage.name!r} does not conserve: kept and dropped items are not those that came in")


def _keys(rows: Array, items: Array) -> Int64:
    return (rows.astype(np.int64) << 32) | items.astype(np.int64)


def ranked(candidates: Candidates, ties: Ties | None) -> Candidates:
    """Sorted by score in each query, best first; ties by the items' fixed ranks (their codes without any)."""
    tie = candidates.items if ties is None else ties[candidates.items]
    if len(candidates.offsets) == 2:
        return candidates.reorder(np.lexsort((tie, -candidates.score)))
    return candidates.reorder(np.lexsort((tie, -candidates.score, candidates.rows())))


# -- the pipeline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """The stages of an answer in three segments, with a way out for each.

    ``fallback`` answers when ``retrieve`` fails or is late (then nothing is ranked); when ``rank`` fails or is late the
    candidates stay in source order; ``finish`` always runs, for which ``reserve`` seconds of every deadline are kept. A
    failing stage of ``finish`` is skipped unless it is essential. ``explain`` runs on the final slates only. ``ties``
    int32[items] break equal scores. ``source_names`` gives the meaning of column ``source``.
    """

    retrieve: tuple[Stage, ...]
    rank: tuple[Stage, ...] = ()
    finish: tuple[Stage, ...] = ()
    explain: Stage | None = None
    fallback: Stage | None = None
    ties: Ties | None = None
    source_names: tuple[str, ...] = ()
    reserve: float = 0.005
    observer: Observer | None = None

    def run(self, queries: Sequence[Query], *, explain: bool = False, on_error: Literal["raise", "degrade"] = "raise") -> Slates:
        """Answer a batch in this thread. Offline a failure must be seen, so by default it raises; ``degrade`` answers as serving does."""
        state = _Run(self, queries, explain)
        for name in ("retrieve", "rank"):
            if not state.wants(name):
                continue
            start = time.monotonic()
            try:
                result = self.run_segment(name, queries, state.candidates)
                if on_error == "raise" and result.candidates.degraded:
                    raise StageError(f"{name} degraded: {'; '.join(result.candidates.degraded)}")
                state.succeed(name, result, time.monotonic() - start)
            except Exception as error:
                if on_error == "raise":
                    raise
                state.fail(name, error, time.monotonic() - start)
        return state.slates(strict=on_error == "raise")

    async def arun(
        self,
        queries: Sequence[Query],
        *,
        executor: Executor,
        deadline: Deadline | None = None,
        remote: Mapping[Segment, RemoteSegment] | None = None,
        explain: bool = True,
    ) -> Slates:
        """Answer under a deadline: ``retrieve`` and ``rank`` run in ``executor``, or where ``remote`` says, for as long as there is time.

        Never raises for a failed or late segment (see the class); raises ``StageError`` if an essential stage of ``finish`` fails.
        """
        state = _Run(self, queries, explain)
        loop = asyncio.get_running_loop()
        for name in ("retrieve", "rank"):
            if not state.wants(name):
                continue
            start = time.monotonic()
            try:
                limit = None if deadline is None else Deadline(deadline.at - self.reserve)
                if limit is not None and limit.left() <= 0:
                    raise Late(f"no time left for {name}")
                if remote is not None and name in remote:
                    call = self._remote(name, remote[name], queries, state.candidates, limit)
                    work: asyncio.Future[SegmentResult] = asyncio.ensure_future(call)
                else:
                    work = loop.run_in_executor(executor, self.run_segment, name, queries, state.candidates, limit)
                result = await _within(work, limit)
                state.succeed(name, result, time.monotonic() - start)
            except Exception as error:
                state.fail(name, error, time.monotonic() - start)
        return state.slates(strict=False)

    def run_segment(
        self, name: Literal["retrieve", "rank"], queries: Sequence[Query], candidates: Candidates, deadline: Deadline | None = None
    ) -> SegmentResult:
        """One segment in this thread, every stage checked, the result sorted by score. A failure is raised, ``Late`` between stages."""
        timings: dict[str, float] = {}
        for stage in self.retrieve if name == "retrieve" else self.rank:
            if deadline is not None and deadline.left() <= 0:
                raise Late(f"the deadline passed before stage {stage.name!r}")
            candidates = self._call(stage, queries, candidates, timings)
        return SegmentResult(ranked(candidates, self.ties), timings)

    async def _remote(
        self, name: Segment, remote: RemoteSegment, queries: Sequence[Query], candidates: Candidates, deadline: Deadline | None
    ) -> SegmentResult:
        """A segment elsewhere: what was dropped so far stays here, and what comes back is checked."""
        sent = replace(candidates, dropped=(), degraded=())
        result = await remote(queries, sent, deadline)
        got = result.candidates
        check(FunctionStage(name, _same, adds=name == "retrieve"), sent, got, len(queries), self._size)
        whole = replace(got, dropped=(*candidates.dropped, *got.dropped), degraded=(*candidates.degraded, *got.degraded))
        return SegmentResult(whole, result.timings)

    @property
    def _size(self) -> int | None:
        return None if self.ties is None else len(self.ties)

    def _call(self, stage: Stage, queries: Sequence[Query], candidates: Candidates, timings: dict[str, float]) -> Candidates:
        start = time.monotonic()
        error: str | None = None
        after = candidates
        try:
            after = stage(queries, candidates)
            check(stage, candidates, after, len(queries), self._size)
            return after
        except Exception as caught:
            error = type(caught).__name__
            raise
        finally:
            timings[stage.name] = timings.get(stage.name, 0.0) + time.monotonic() - start
            if self.observer is not None:
                self.observer.on_stage(stage.name, timings[stage.name], len(candidates), len(after), error)


class _Run:
    """One answer in the making: what the two ways to run share."""

    def __init__(self, pipeline: Pipeline, queries: Sequence[Query], explain: bool) -> None:
        self.pipeline, self.queries, self.explain = pipeline, queries, explain
        self.candidates = Candidates.empty(len(queries))
        self.path: list[str] = []
        self.timings: dict[str, float] = {}
        self.start = time.monotonic()

    def wants(self, name: str) -> bool:
        return name == "retrieve" or (bool(self.pipeline.rank) and "retrieve" in self.path)

    def succeed(self, name: str, result: SegmentResult, seconds: float) -> None:
        self.candidates = result.candidates
        self.timings.update(result.timings)
        self.timings[name] = seconds
        self.path.append(name)

    def fail(self, name: str, error: Exception, seconds: float) -> None:
        """Note it and go on: from ``retrieve`` to the fallback, from ``rank`` with the order there is."""
        kind = "deadline" if isinstance(error, Late | TimeoutError) else f"error:{type(error).__name__}"
        log.warning("%s: %s (%s)", name, kind, error)
        log.debug("%s failed", name, exc_info=error)
        self.timings[name] = seconds
        self.candidates = self.candidates.degrade(f"{name}: {kind}")
        if self.pipeline.observer is not None:
            self.pipeline.observer.on_stage(name, seconds, len(self.candidates), len(self.candidates), kind)
        if name == "retrieve" and self.pipeline.fallback is not None:
            self._finish(self.pipeline.fallback, raises=False)
            self.candidates = ranked(self.candidates, self.pipeline.ties)
            self.path.append("fallback")

    def slates(self, *, strict: bool) -> Slates:
        """Run ``finish``, cut to k, explain, and put the answer together."""
        start = time.monotonic()
        for stage in self.pipeline.finish:
            self._finish(stage, strict or stage.essential)
        limits = np.array([query.k for query in self.queries], dtype=np.int64)
        final = self.candidates
        self.candidates = final.keep(final.places() < np.repeat(limits, np.diff(final.offsets)), "cut", "below the cut")
        if self.explain and self.pipeline.explain is not None:
            self._finish(self.pipeline.explain, strict)
        end = time.monotonic()
        self.timings |= {"finish": end - start, "total": end - self.start}
        final = self.candidates
        sources = final.columns.get("source")
        return Slates(
            final.offsets, final.items, final.score, np.full(len(final), -1, np.int8) if sources is None else sources,
            self.pipeline.source_names, final.columns, (*self.path, "finish"), final.degraded, self.timings, final.dropped,
            np.array([query.cold for query in self.queries], dtype=bool),
        )  # fmt: skip

    def _finish(self, stage: Stage, raises: bool) -> None:
        try:
            self.candidates = self.pipeline._call(stage, self.queries, self.candidates, self.timings)
        except Exception as error:
            if raises:
                if isinstance(error, StageError):
                    raise
                raise StageError(f"stage {stage.name!r} failed with {type(error).__name__}: {error}") from error
            log.warning("%s: error:%s (%s)", stage.name, type(error).__name__, error)
            self.candidates = self.candidates.degrade(f"{stage.name}: error:{type(error).__name__}")


def _same(queries: Sequence[Query], candidates: Candidates) -> Candidates:
    return candidates


async def _within(work: asyncio.Future[SegmentResult], deadline: Deadline | None) -> SegmentResult:
    """The result, or ``TimeoutError`` on time even if the work ignores its cancellation; then nobody waits for it any more."""
    try:
        await asyncio.wait({work}, timeout=None if deadline is None else max(deadline.left(), 0.0))
    finally:
        if not work.done():
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            work.cancel()
    if not work.done() or work.cancelled():
        raise TimeoutError("the deadline passed")
    return work.result()
