"""Brand-new items: items of a live catalogue that a bundle was not trained on, with codes behind the bundle's own.

No model has seen them and no ranker can judge them. So one source proposes them by the user's taste for their category, brand and
price, every fitted model treats their codes as unknown, and one stage gives them a bounded share of the places of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from maple.data.dataset import Float32, Int32, Int64
from maple.index import topk_scores
from maple.models.base import Array, Mask, QueryBatch
from maple.models.families import candidate_rows, no_similar
from maple.recommend.engine import Candidates, Query
from maple.recommend.sources import Proposer

#: What column ``source`` says of items that are there because they are new.
NEW = "new items"  # no source of a settings page can be called that
HALF_LIFE_US = 30 * 86_400_000_000
LEAST = 1e-3  # the score of a new item that nothing speaks against


@dataclass(frozen=True, eq=False)
class Known:
    """A fitted model among more items than it was fitted on: codes from ``size`` on are unknown to it."""

    model: Proposer
    size: int

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        if mask is not None:
            allowed = None if mask.allowed is None else mask.allowed[: self.size]
            mask = Mask(allowed, None if mask.exclude is None else (mask.exclude[0], self._codes(mask.exclude[1])))
        return self.model.topk(self._queries(queries), k, mask)

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        return self.model.score(self._queries(queries), self._codes(items), offsets)

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        return self.model.similar(self._codes(items), k)

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        return self.model.explain(self._queries(queries), self._codes(items), offsets)

    def _codes(self, items: Int32) -> Int32:
        return np.where(items < self.size, items, -1).astype(np.int32)

    def _queries(self, queries: QueryBatch) -> QueryBatch:
        return replace(queries, histories=replace(queries.histories, items=self._codes(queries.histories.items)))


@dataclass(frozen=True, eq=False)
class NewItems:
    """The source of new items: those with codes from ``start`` on. All arrays are by item code, of known and new items alike.

    The score is (the share of the history in the item's category + the share in its brand) x (1 + closeness of its price to the
    history's) / 2, where an event counts its signal, half as much for every 30 days. A user with no known history, and an item
    without category and brand, meet with the least score: nothing speaks against it. Equal scores: the newest first.
    """

    start: int
    category: Int32  # -1 = unknown
    brand: Int32
    price: Float32  # NaN = unknown
    newest: Int32  # of the new items only, int32[M]: the place of each in order of age, 0 = the newest
    popular: Int32  # known items, most popular first
    signals: Float32

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        """The best k new items per query."""
        if not len(self.newest):
            return np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
        allowed = exclude = None
        if mask is not None:
            allowed = None if mask.allowed is None else mask.allowed[self.start :]
            exclude = None if mask.exclude is None else (mask.exclude[0], np.maximum(mask.exclude[1] - self.start, -1).astype(np.int32))
        items, scores = topk_scores(self._scores(queries), k, tie=self.newest, allowed=allowed, exclude=exclude)
        return np.where(items >= 0, items + np.int32(self.start), np.int32(-1)), scores

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        """Of new items; -inf for all others."""
        out = np.full(len(items), -np.inf, np.float32)
        new = items >= self.start
        if new.any():
            out[new] = self._scores(queries)[candidate_rows(offsets)[new], items[new] - self.start]
        return out

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        """To a new item: known items of its category or brand (1 for both, 0.5 for one), popular ones first; to others nothing."""
        found, scores = no_similar(items, k)
        for row, item in enumerate(items.tolist()):
            if item < self.start:
                continue
            like = np.zeros(len(self.popular), np.float32)
            for codes in (self.category, self.brand):
                if codes[item] >= 0:
                    like += 0.5 * (codes[self.popular] == codes[item])
            best = np.argsort(-like, kind="stable")[:k]
            best = best[like[best] > 0]
            found[row, : len(best)], scores[row, : len(best)] = self.popular[best], like[best]
        return found, scores

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        """No single history item is the reason: -1 throughout."""
        return np.full(len(items), -1, np.int32)

    def _scores(self, queries: QueryBatch) -> Float32:
        """float32[B, M]; -inf where the user's history lies elsewhere."""
        rows, items = queries.histories.rows(), queries.histories.items
        age = np.maximum(queries.now[rows] - queries.histories.times, 0)
        weight = np.where(items >= 0, self.signals[queries.histories.events], 0) * np.exp2(-age / HALF_LIFE_US)
        total = np.bincount(rows, weight, len(queries))
        own = slice(self.start, None)
        taste = sum(self._share(codes, rows, items, weight, total)[:, codes[own]] for codes in (self.category, self.brand))
        log_price = np.log1p(np.maximum(self.price, 0))
        priced = weight * ~np.isnan(log_price[items])
        spent = np.bincount(rows, np.where(priced > 0, log_price[items], 0) * priced, len(queries))
        level = spent / np.where((count := np.bincount(rows, priced, len(queries))) > 0, count, np.nan)
        near = np.nan_to_num(np.exp(-np.abs(level[:, None] - log_price[None, own])), nan=0.5)
        blank = (self.category[own] < 0) & (self.brand[own] < 0)
        open_ = blank[None, :] | (total <= 0)[:, None]
        score = np.where(taste > 0, LEAST + taste * (1 + near) / 2, np.where(open_, LEAST, -np.inf))
        return score.astype(np.float32)

    @staticmethod
    def _share(codes: Int32, rows: Int64, items: Int32, weight: Array, total: Array) -> Array:
        """The share of each value in each history, float64[B, V + 1]; the last column, of value -1, is 0."""
        width, queries = int(codes.max(initial=-1)) + 2, len(total)
        value = codes[items]
        sums = np.bincount(rows * width + np.where(value < 0, width - 1, value), weight, queries * width).reshape(queries, width)
        sums[:, -1] = 0
        return sums / np.where(total > 0, total, 1)[:, None]


@dataclass(frozen=True, eq=False)
class Introduce:
    """The stage that keeps new items to their places: the best one to place ``first``, the next ones ``every`` places further.

    What more there is comes last. No ranker has learned to judge items without any past, so its score of them is set aside; a new
    item's score is put between its neighbours', which is where reranking and the answer take it.
    """

    start: int
    first: int
    every: int
    name: str = "new items"
    adds: bool = False
    essential: bool = False

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        new = candidates.items >= self.start
        if not new.any():
            return candidates
        order, score = np.arange(len(candidates)), candidates.score.copy()
        liking = candidates.columns.get(f"source.{NEW}.score", candidates.score)
        for start, stop in zip(candidates.offsets[:-1].tolist(), candidates.offsets[1:].tolist(), strict=True):
            fresh = start + np.flatnonzero(new[start:stop])
            if len(fresh):
                known = (start + np.flatnonzero(~new[start:stop])).tolist()
                fresh = fresh[np.argsort(-np.nan_to_num(liking[fresh], nan=-np.inf), kind="stable")]
                order[start:stop] = self._placed(known, fresh.tolist(), score)
        return candidates.with_score(score).reorder(order)

    def _placed(self, known: list[int], fresh: list[int], score: Float32) -> list[int]:
        """The positions of one query in their new order; the scores of ``fresh`` are set."""
        out: list[int] = []
        waiting = list(reversed(fresh))
        for position in known:
            if waiting and len(out) + 1 >= self.first and (len(out) + 1 - self.first) % self.every == 0:
                above = score[out[-1]] if out else score[position] + np.float32(1)
                out.append(waiting.pop())
                score[out[-1]] = (above + score[position]) / 2
            out.append(position)
        lowest = float(score[known].min()) if known else 1.0
        for place, position in enumerate(reversed(waiting), start=1):
            score[position] = lowest - max(abs(lowest), 1e-3) * 1e-3 * place
            out.append(position)
        return out
