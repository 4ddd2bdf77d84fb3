"""Personal frequency: what this user comes back to. The strongest single source where repeat purchases count."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Dataset, Float32, Int32, Int64
from maple.index import topk_ragged
from maple.models.base import FitContext, Mask, Metrics, Need, QueryBatch, SearchSpace, Space, State
from maple.models.families import Model, candidate_rows, no_similar, parts, take_array
from maple.models.popularity import DAY, PopularityConfig, item_popularity


class FrequencyConfig(Section):
    """How a user's own past counts."""

    half_life_days: float | None = Field(default=None, gt=0)
    """An occurrence counts half as much for every so many days before the query's time. None = no decay."""
    popularity_days: float | None = Field(default=30.0, gt=0)
    """Window of the popularity that breaks ties between items of equal frequency. None = all time."""

    @classmethod
    def search_space(cls) -> SearchSpace:
        return {"half_life_days": ("log", 15.0, 730.0)}


class Frequency(Model):
    """Score = over the distinct times (baskets) at which the history has the item, the sum of its strongest signal there.

    Ties go to what is popular lately. Items outside the history get no opinion; it works from the history alone, so the
    trained part is only the order of popularity that breaks ties.
    """

    Config: ClassVar[type[Section]] = FrequencyConfig
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TIME})
    config: FrequencyConfig
    tiebreak: Float32

    def fit(self, data: Dataset, ctx: FitContext) -> Metrics:
        self._enter(Space.of(data))
        popularity = item_popularity(data, PopularityConfig(window_days=self.config.popularity_days))
        positive = data.signals[data.signals > 0]
        room = 0.1 * float(positive.min(initial=1.0))  # below any difference of two sums of signals, to float32's precision
        self.tiebreak = (room * popularity / max(float(popularity.max(initial=0.0)), 1e-300)).astype(np.float32)
        return {}

    def counts(self, queries: QueryBatch) -> sp.csr_matrix:
        """Scores float32[B, I], sparse: frequency plus tie-break."""
        histories, num_items = queries.histories, self.num_items
        signal = self.space.signals[histories.events]
        keep = (histories.items >= 0) & (signal > 0)
        rows, items, times, signal = histories.rows()[keep], histories.items[keep], histories.times[keep], signal[keep]
        order = np.lexsort((-signal, times, items, rows))
        rows, items, times, signal = rows[order], items[order], times[order], signal[order]
        first = np.ones(len(rows), bool)
        first[1:] = (np.diff(rows) != 0) | (np.diff(items) != 0) | (np.diff(times) != 0)
        rows, items, times, weight = rows[first], items[first], times[first], signal[first].astype(np.float64)
        if self.config.half_life_days is not None:
            weight *= np.exp2(-(queries.now[rows] - times) / (self.config.half_life_days * DAY))
        key, inverse = np.unique(rows * np.int64(num_items) + items, return_inverse=True)
        column = (key % num_items).astype(np.int32)
        data = np.bincount(inverse, weights=weight, minlength=len(key)) + self.tiebreak[column]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(key // num_items, minlength=len(queries)))])
        return sp.csr_matrix((data.astype(np.float32), column, indptr), shape=(len(queries), num_items))

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        counts = self.counts(queries)
        allowed, exclude = parts(mask)
        return topk_ragged(counts.indptr.astype(np.int64), counts.indices, counts.data, k, tie=self.tie, allowed=allowed, exclude=exclude)

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        counts = self.counts(queries)
        keys = np.repeat(np.arange(len(queries)), np.diff(counts.indptr)) * np.int64(self.num_items) + counts.indices
        return lookup(keys, counts.data, candidate_rows(offsets) * np.int64(self.num_items) + items, items >= 0)

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        """Frequency knows no similarity: nothing."""
        return no_similar(items, k)

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        """The item itself, where the history has it."""
        return np.where(np.isfinite(self.score(queries, items, offsets)), items, -1).astype(np.int32)

    def state(self) -> State:
        self.check_fitted()
        return {"tiebreak": self.tiebreak}

    @classmethod
    def from_state(cls, config: Section, space: Space, state: State) -> Self:
        model = cls._load(config, space)
        model.tiebreak = take_array(state, "tiebreak", np.float32, (len(space.items),))
        return model


def lookup(keys: Int64, values: Float32, wanted: Int64, valid: Int32 | np.ndarray) -> Float32:
    """Values of sorted keys at wanted keys; -inf where a key is absent or not valid."""
    if len(keys) == 0:
        return np.full(len(wanted), -np.inf, np.float32)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((keys[place] == wanted) & valid, values[place], np.float32(-np.inf))
