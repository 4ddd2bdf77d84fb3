"""From the ranked list to the slate: business rules, freshness, diversity and caps over the best ``window`` items of each query.

Scores are scaled to 0..1 inside the window, so one weight means the same for every ranker. Order of effect: removed items go,
pinned items come first, boosts and freshness are added, then items are chosen one by one under the caps by maximal marginal
relevance; places that stay free are filled from below the window. The ranker's score is reported unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maple.data.dataset import Bool, Float32, Int32, Int64
from maple.errors import ConfigError, unknown_name
from maple.models.base import Array
from maple.recommend.engine import Candidates, Query, Ties
from maple.recommend.filters import ItemColumns
from maple.recommend.settings import RerankSettings

DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True, eq=False)
class Rerank:
    """The stage of all reranking rules. All arrays are by item code; ``Rerank.of`` makes them from settings."""

    window: int
    removed: Bool | None = None
    pinned: Bool | None = None
    bonus: Float32 | None = None  # boosts minus buries
    born: Int64 | None = None  # microseconds, the smallest int64 = unknown
    freshness: tuple[float, float] = (0.0, 1.0)  # weight, half-life in days
    caps: tuple[tuple[str, Int32, int], ...] = ()  # column, value code of each item (-1 = no value, never capped), limit
    relevance: float = 1.0  # of maximal marginal relevance; 1 = off
    vectors: Float32 | None = None  # unit length or zero, for similarity; else ``groups``
    new_vectors: Float32 | None = None  # the same of the items behind those
    groups: Int32 | None = None  # similarity 1 inside a group, 0 across; -1 = like nothing
    ties: Ties | None = None
    name: str = "rerank"
    adds: bool = False
    essential: bool = True  # removals are promises

    @staticmethod
    def of(
        settings: RerankSettings,
        window: int,
        columns: ItemColumns,
        vectors: Float32 | None,
        ties: Ties | None,
        new_vectors: Float32 | None = None,
    ) -> Rerank:
        """From settings and the item table; ``ConfigError`` names a column that the items do not have. Vectors: of unit length or zero."""

        def known(name: str, where: str) -> str:
            if name not in columns.names:
                raise ConfigError(f"rerank.{where}: {unknown_name('item column', name, columns.names)}")
            return name

        size = len(columns)
        removed, pinned, bonus = np.zeros(size, bool), np.zeros(size, bool), np.zeros(size, np.float32)
        for rule in settings.rules:
            hit = np.ones(size, dtype=bool)
            for name, values in rule.match.items():
                hit &= columns.matches(known(name, f"rules.{rule.name}.match"), values)
            removed |= hit & (rule.action == "remove")
            pinned |= hit & (rule.action == "pin")
            bonus += hit * np.float32({"boost": rule.weight, "bury": -rule.weight}.get(rule.action, 0.0))
        fresh, mmr = settings.freshness, settings.mmr
        by_vectors = mmr is not None and mmr.by == "vectors"
        if by_vectors and vectors is None:
            raise ConfigError("rerank.mmr.by: no source of this pipeline has item vectors; add one (als, two-tower) or use `by: category`")
        return Rerank(
            window,
            removed if removed.any() else None,
            pinned if pinned.any() else None,
            bonus if bonus.any() else None,
            columns.times(known(fresh.column, "freshness.column")) if fresh else None,
            (fresh.weight, fresh.half_life_days) if fresh else (0.0, 1.0),
            tuple((cap.column, columns.codes(known(cap.column, "caps"))[0], cap.limit) for cap in settings.caps),
            mmr.relevance if mmr else 1.0,
            vectors if by_vectors else None,
            new_vectors if by_vectors else None,
            columns.codes(known("category", "mmr.by"))[0] if mmr and not by_vectors else None,
            ties,
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        rules = (self.removed, self.pinned, self.bonus, self.born)
        return all(rule is None for rule in rules) and not self.caps and self.relevance == 1.0

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        if self.idle:
            return candidates
        if self.removed is not None:
            candidates = candidates.keep(~self.removed[candidates.items], self.name, "removed by a rule")
        order = np.arange(len(candidates))
        capped = np.zeros(len(candidates), dtype=bool)
        for row, query in enumerate(queries):
            start, stop = int(candidates.offsets[row]), int(candidates.offsets[row + 1])
            items, score = candidates.items[start:stop], candidates.score[start:stop]
            chosen = self._choose(items, score, query)
            left = np.ones(stop - start, dtype=bool)
            left[chosen] = False
            order[start:stop] = start + np.concatenate([chosen, np.flatnonzero(left)])
            if len(chosen) < query.k:  # nothing below may take the place of what a cap keeps out
                capped[start + len(chosen) : stop] = True
        out = candidates.reorder(order)
        return out.keep(~capped, self.name, "over a cap") if capped.any() else out

    def _choose(self, items: Int32, score: Float32, query: Query) -> Int64:
        """Places of the k chosen candidates of one query in order; fewer only where caps allow no more."""
        size = min(self.window, len(items))
        value = _scaled(score[:size])
        if self.bonus is not None:
            value = value + self.bonus[items[:size]]
        if self.born is not None:
            value = value + self._fresh(items[:size], query.now)
        pins = np.flatnonzero(self.pinned[items]) if self.pinned is not None else np.empty(0, np.int64)
        counts = [np.zeros(int(codes.max(initial=-1)) + 2, np.int64) for _, codes, _ in self.caps]  # the last place is for code -1
        chosen: list[int] = []
        open_ = np.ones(len(items), dtype=bool)

        def choose(place: int) -> None:
            chosen.append(place)
            open_[place] = False
            for (_, codes, limit), count in zip(self.caps, counts, strict=True):
                code = codes[items[place]]
                count[code] += 1
                if code >= 0 and count[code] == limit:
                    np.logical_and(open_, codes[items] != code, out=open_)

        for place in pins[: query.k].tolist():
            choose(place)
        closest = np.zeros(size, np.float32)  # similarity of each item of the window to the nearest chosen one
        if self.relevance < 1.0:
            for place in chosen:
                np.maximum(closest, self._similar(items[:size], int(items[place])), out=closest)
        # Equal values are settled once: the walk below goes by position in this order.
        walk = np.lexsort((items[:size] if self.ties is None else self.ties[items[:size]], -value))
        value, closest, inside = value[walk], closest[walk], items[:size][walk]
        while len(chosen) < query.k:
            free = open_[walk]
            if not free.any():
                break
            gain = self.relevance * value - (1.0 - self.relevance) * closest
            best = int(np.argmax(np.where(free, gain, -np.inf)))
            choose(int(walk[best]))
            if self.relevance < 1.0:
                np.maximum(closest, self._similar(inside, int(inside[best])), out=closest)
        place = size
        while len(chosen) < query.k and place < len(items):
            if open_[place]:
                choose(place)
            place += 1
        return np.array(chosen, dtype=np.int64)

    def _fresh(self, items: Int32, now: int) -> Float32:
        assert self.born is not None
        weight, half_life = self.freshness
        born = self.born[items]
        age = np.maximum(now - born, 0) / DAY
        bonus: Float32 = np.where(born == np.iinfo(np.int64).min, 0.0, weight * np.exp2(-age / half_life)).astype(np.float32)
        return bonus

    def _similar(self, items: Int32, item: int) -> Float32:
        """Similarity of items to one item, 0 (or less) to 1."""
        if self.vectors is not None:
            return np.asarray(self._directions(self.vectors, items) @ self._directions(self.vectors, np.array([item]))[0], dtype=np.float32)
        assert self.groups is not None
        same: Float32 = ((self.groups[items] == self.groups[item]) & (self.groups[item] >= 0)).astype(np.float32)
        return same

    def _directions(self, vectors: Float32, items: Array) -> Float32:
        if self.new_vectors is None:
            return vectors[items]
        new = items >= len(vectors)
        out = vectors[np.where(new, 0, items)]
        out[new] = self.new_vectors[items[new] - len(vectors)]
        return out


def unit(vectors: Array) -> Float32:
    """Rows at length 1, zero rows left as they are."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0), dtype=np.float32)


def _scaled(score: Float32) -> Float32:
    """To 0..1; all 1 where there is nothing to tell apart."""
    low, high = score.min(initial=np.inf), score.max(initial=-np.inf)
    scaled: Float32 = (score - low) / (high - low) if high > low else np.ones_like(score)
    return scaled
