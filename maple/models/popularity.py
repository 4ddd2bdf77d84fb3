"""Popularity: what most people liked lately, the same list for everyone; the fallback of every pipeline."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numba
import numpy as np
import numpy.typing as npt
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Dataset, Float32, Int32, Int64
from maple.index import topk_scores
from maple.models.base import FitContext, Mask, Metrics, Need, QueryBatch, SearchSpace, Space, State
from maple.models.families import Model, no_similar, parts, take_array

DAY = 86_400_000_000  # microseconds


class PopularityConfig(Section):
    """What counts as popular."""

    window_days: float | None = Field(default=30.0, gt=0)
    """Only events of the last days before the end of the fit data count; older ones only order what has none. None = all."""
    half_life_days: float | None = Field(default=None, gt=0)
    """An event counts half as much for every so many days before the end of the fit data. None = no decay."""
    weighting: Literal["users", "signals"] = "users"
    """users: distinct users with a positive signal. signals: the sum of the signal weights of all events."""

    @classmethod
    def search_space(cls) -> SearchSpace:
        return {"window_days": ("choice", [7.0, 14.0, 30.0, 60.0, 120.0]), "weighting": ("choice", ["users", "signals"])}


def item_popularity(data: Dataset, config: PopularityConfig) -> npt.NDArray[np.float64]:
    """Popularity float64[I]; 0 only where an item has no event with a positive signal.

    With a window, items seen only before it follow those seen in it, by their count over all time.
    """
    log = data.log
    weight = data.signals[log.event].astype(np.float64)
    keep = (weight > 0) & (log.item >= 0)
    user, item, time, weight = log.user[keep], log.item[keep], log.time[keep], weight[keep]
    end = data.span[1] if len(log) else 0
    decay = np.exp2(-(end - time) / (config.half_life_days * DAY)) if config.half_life_days is not None else np.ones(len(time))
    everything = _count(user, item, weight, decay, len(data.items), config.weighting)
    if config.window_days is None:
        return everything
    recent = time > end - config.window_days * DAY
    counts = _count(user[recent], item[recent], weight[recent], decay[recent], len(data.items), config.weighting)
    least = counts[counts > 0].min(initial=1.0)
    older = 0.99 * least * everything / max(float(everything.max(initial=0.0)), 1e-300)
    return np.where(counts > 0, counts, older)


def _count(
    user: Int32, item: Int32, weight: npt.NDArray[np.float64], decay: npt.NDArray[np.float64], num_items: int, weighting: str
) -> npt.NDArray[np.float64]:
    if weighting == "signals":
        return np.bincount(item, weights=weight * decay, minlength=num_items).astype(np.float64)
    pair = user.astype(np.int64) * num_items + item
    order = np.lexsort((-decay, pair))
    latest = order[np.flatnonzero(np.diff(pair[order], prepend=-1))]  # of each (user, item) the event that decayed least
    return np.bincount(item[latest], weights=decay[latest], minlength=num_items).astype(np.float64)


class Popularity(Model):
    """Items by popularity, whatever the history. It scores every item, so it always answers."""

    Config: ClassVar[type[Section]] = PopularityConfig
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TIME})
    config: PopularityConfig
    scores: Float32

    def fit(self, data: Dataset, ctx: FitContext) -> Metrics:
        self._enter(Space.of(data))
        self.scores = item_popularity(data, self.config).astype(np.float32)
        return {"items": float((self.scores > 0).sum())}

    @cached_property
    def _ranked(self) -> Int32:
        """All items, best first."""
        return topk_scores(self.scores[None], self.num_items, tie=self.tie)[0].ravel()

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        self.check_fitted()
        allowed, exclude = parts(mask)
        ranked = self._ranked if allowed is None else self._ranked[allowed[self._ranked]]
        offsets, barred = exclude if exclude is not None else (np.zeros(len(queries) + 1, np.int64), np.empty(0, np.int32))
        found = _first(ranked, offsets, barred, k, self.num_items)
        return found, np.where(found >= 0, self.scores[found], np.float32(-np.inf))

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        self.check_fitted()
        return np.where(items >= 0, self.scores[items], np.float32(-np.inf))

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        """Popularity knows no similarity: nothing."""
        return no_similar(items, k)

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        """No history item is a reason: -1 throughout."""
        return np.full(len(items), -1, np.int32)

    def state(self) -> State:
        self.check_fitted()
        return {"scores": self.scores}

    @classmethod
    def from_state(cls, config: Section, space: Space, state: State) -> Self:
        model = cls._load(config, space)
        model.scores = take_array(state, "scores", np.float32, (len(space.items),))
        return model


@numba.njit(cache=True, nogil=True)
def _first(ranked: Any, offsets: Any, barred: Any, k: int, num_items: int) -> Any:
    """For each row the first k ranked items that are not barred, int32[B, k], padded with -1."""
    out = np.full((len(offsets) - 1, k), -1, np.int32)
    stamp = np.zeros(num_items, np.int32)
    for row in range(len(offsets) - 1):
        for place in range(offsets[row], offsets[row + 1]):
            if 0 <= barred[place] < num_items:
                stamp[barred[place]] = row + 1
        filled = 0
        for item in ranked:
            if filled == k:
                break
            if stamp[item] != row + 1:
                out[row, filled] = item
                filled += 1
    return out
