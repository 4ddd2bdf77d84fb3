"""Candidates: several retrievers asked for the same queries and merged, every source's opinion kept as columns for the ranker.

Columns per source: ``source.<name>.score`` (NaN = no opinion), ``source.<name>.z`` (the score standardised inside the query,
0 = no opinion) and ``source.<name>.rank`` (log2(1 + place), place 1 = best; the place after the last candidate = no opinion).
``sources`` is a bit mask of who proposed the item and ``source`` the place of the one that proposed it highest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from maple.data.dataset import Float32, Int32, Int64
from maple.models.base import Array, Mask, QueryBatch
from maple.recommend.engine import Candidates, Query, StageError, batch, ranked
from maple.recommend.filters import Restrictions

log = logging.getLogger("maple.recommend")

FUSION = 60.0  # the constant of reciprocal rank fusion


class Proposer(Protocol):
    """What a source asks of a retriever; see ``models.base.Retriever`` for what each answers."""

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]: ...
    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32: ...
    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]: ...
    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32: ...


@dataclass(frozen=True, eq=False)
class RetrieverSource:
    """A fitted retriever that may propose up to ``quota`` items per query."""

    name: str
    model: Proposer
    quota: int


@dataclass(frozen=True, eq=False)
class Sources:
    """The stage that asks every source and merges: each item once per query, at most ``max_candidates``.

    The score is reciprocal rank fusion, the sum over sources of 1 / (60 + place) (Cormack, Clarke & Buettcher 2009), so the order
    is sensible without a ranker. A source that fails is left out and noted; ``StageError`` if all fail. With ``score_union``
    every source scores the candidates of all; otherwise only its own.
    """

    sources: tuple[RetrieverSource, ...]
    limits: Restrictions
    max_candidates: int
    score_union: bool = True
    name: str = "sources"
    adds: bool = True
    essential: bool = True

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        if len(candidates):
            raise StageError(f"stage {self.name!r} must be the first: it was given {len(candidates)} candidates")
        models = batch(queries)
        masks = self._masks(queries)
        notes: list[str] = []
        found: dict[int, tuple[Int64, Float32, Int64]] = {}  # source -> (row << 32 | item, score, place from 0)
        for place, source in enumerate(self.sources):
            try:
                found[place] = _ask(source, models, masks)
            except Exception as error:
                notes.append(_note(source, error))
        if not found:
            raise StageError(f"every source failed: {'; '.join(notes)}")
        merged = self._merge(len(queries), found)
        columns: dict[str, Array] = {}
        for place, source in enumerate(self.sources):
            score = np.full(len(merged), np.nan, np.float32)
            if place in found:
                try:
                    score = self._scores(source, models, merged, found[place])
                except Exception as error:
                    notes.append(_note(source, error))
            columns |= _opinion(source.name, score, merged, self.max_candidates)
        return replace(merged.with_columns(columns), degraded=(*candidates.degraded, *notes))

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns this stage gives."""
        return (*(f"source.{source.name}.{part}" for source in self.sources for part in ("score", "z", "rank")), "sources", "source")

    def _masks(self, queries: Sequence[Query]) -> list[tuple[Int64 | None, Mask]]:
        """(query rows or None for all, what these may not get): queries with the same filters share a mask."""
        groups: dict[str, list[int]] = {}
        for row, query in enumerate(queries):
            groups.setdefault(json.dumps(query.filters, sort_keys=True) if query.filters else "", []).append(row)
        out: list[tuple[Int64 | None, Mask]] = []
        for rows in groups.values():
            excluded = [self.limits.excluded(queries[row]) for row in rows]
            offsets = np.concatenate([[0], np.cumsum([len(items) for items in excluded])]).astype(np.int64)
            exclude = (offsets, np.concatenate(excluded)) if offsets[-1] else None
            mask = Mask(self.limits.allowed(queries[rows[0]].filters), exclude)
            out.append((None if len(groups) == 1 else np.array(rows, dtype=np.int64), mask))
        return out

    def _merge(self, num_queries: int, found: dict[int, tuple[Int64, Float32, Int64]]) -> Candidates:
        """Each proposed item once, best fused score first, the excess dropped."""
        keys = np.concatenate([part[0] for part in found.values()])
        place = np.concatenate([part[2] for part in found.values()])
        source = np.repeat(np.fromiter(found, np.int64), [len(part[0]) for part in found.values()])
        distinct, inverse = np.unique(keys, return_inverse=True)
        fused = np.bincount(inverse, 1.0 / (FUSION + 1.0 + place), minlength=len(distinct)).astype(np.float32)
        bits = np.bincount(inverse, 2.0**source, minlength=len(distinct)).astype(np.int32)
        # The main source is the one that proposed the item highest, among equals the one listed first.
        strength = place * len(self.sources) + source
        best = np.full(len(distinct), np.iinfo(np.int64).max)
        np.minimum.at(best, inverse, strength)
        rows = distinct >> 32
        offsets = np.searchsorted(rows, np.arange(num_queries + 1)).astype(np.int64)
        columns = {"sources": bits, "source": (best % len(self.sources)).astype(np.int32)}
        merged = Candidates(offsets, (distinct & 0xFFFFFFFF).astype(np.int32), fused, columns)
        if np.diff(offsets).max(initial=0) <= self.max_candidates:
            return merged
        merged = ranked(merged, None)
        return merged.keep(merged.places() < self.max_candidates, self.name, "more candidates than max_candidates")

    def _scores(self, source: RetrieverSource, models: QueryBatch, merged: Candidates, own: tuple[Int64, Float32, Int64]) -> Float32:
        """This source's score of every candidate, NaN where it has no opinion."""
        if self.score_union:
            score = np.asarray(source.model.score(models, merged.items, merged.offsets), dtype=np.float32)
            if score.shape != (len(merged),):
                raise StageError(f"source {source.name!r} gave {score.shape} scores for {len(merged)} candidates")
            if np.isnan(score).any() or np.isposinf(score).any():
                raise StageError(f"source {source.name!r} gave a score that is not a number")
            return np.where(np.isneginf(score), np.float32(np.nan), score)
        keys = (merged.rows() << 32) | merged.items
        order = np.argsort(own[0])
        at = np.minimum(np.searchsorted(own[0], keys, sorter=order), max(len(order) - 1, 0))
        if not len(order):
            return np.full(len(merged), np.nan, np.float32)
        return np.where(own[0][order[at]] == keys, own[1][order[at]], np.float32(np.nan))


def _note(source: RetrieverSource, error: Exception) -> str:
    log.warning("source %s failed: %s: %s", source.name, type(error).__name__, error)
    log.debug("source %s failed", source.name, exc_info=error)
    return f"{source.name}: error:{type(error).__name__}"


def _ask(source: RetrieverSource, models: QueryBatch, masks: list[tuple[Int64 | None, Mask]]) -> tuple[Int64, Float32, Int64]:
    """What a source proposes, flat: (row << 32 | item, score, place from 0). ``StageError`` where it breaks its contract."""
    keys, scores, places = [], [], []
    for rows, mask in masks:
        part = models if rows is None else models.take(rows)
        items, score = source.model.topk(part, source.quota, mask)
        if items.shape != score.shape or items.ndim != 2 or len(items) != len(part):
            raise StageError(f"source {source.name!r} gave {items.shape} items and {score.shape} scores for {len(part)} queries")
        good = (items >= 0) & (score > -np.inf)
        if not np.isfinite(score[good]).all() or np.isnan(score).any():
            raise StageError(f"source {source.name!r} gave a score that is not a number")
        at, place = np.nonzero(good)
        keys.append(((at if rows is None else rows[at]).astype(np.int64) << 32) | items[at, place])
        scores.append(score[at, place])
        places.append(place)
    flat = np.concatenate(keys)
    if len(np.unique(flat)) != len(flat):
        raise StageError(f"source {source.name!r} proposed an item twice")
    return flat, np.concatenate(scores).astype(np.float32), np.concatenate(places)


def _opinion(name: str, score: Float32, merged: Candidates, last: int) -> dict[str, Array]:
    """The three columns of a source's scores float32[N], NaN = no opinion."""
    known = np.isfinite(score)
    rows, places, queries = merged.rows(), merged.places(), len(merged.offsets) - 1
    below = np.where(known, -score, np.float32(np.inf))
    order = np.argsort(below) if queries == 1 else np.lexsort((below, rows))
    sorted_ = below[order]
    # Equal scores share the place of the first of them, so that a column never tells items apart that the source does not.
    starts = np.arange(len(score))
    starts[1:][(sorted_[1:] == sorted_[:-1]) & (places[1:] > 0)] = 0
    place = np.empty(len(score), np.int64)
    place[order] = places[np.maximum.accumulate(starts)]
    rank = np.log2(2.0 + np.where(known, place, last), dtype=np.float32, casting="same_kind")
    value = np.where(known, score, 0).astype(np.float64)
    count = np.maximum(np.bincount(rows, known, queries), 1.0)
    mean = np.bincount(rows, value, queries) / count
    centred = np.where(known, value - mean[rows], 0.0)
    spread = np.sqrt(np.bincount(rows, centred * centred, queries) / count)
    scale = np.where(spread > 1e-9, 1.0 / np.maximum(spread, 1e-9), 0.0)
    z = np.minimum(np.maximum(centred * scale[rows], -10), 10).astype(np.float32)
    return {f"source.{name}.score": score, f"source.{name}.z": z, f"source.{name}.rank": rank}
