"""What users take together: for every item the items that the same users took within a day of it, counted over all users on a clock.

A pair is two target events of one user on different items, at most ``window_hours`` and ``partners`` events apart; it counts in the
tick of the later one. Counts of disjoint users add up, their cost is linear in events, and a request reads those of the ticks that
are closed, as it reads item features: offline at any moment from ``Pairs``, in a bundle from the lists of its last closed tick.

Legend: B queries, N candidates, P pairs, I items, M neighbours. Times are int64 microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from maple.data.dataset import Dataset, Float32, Histories, Int32, Int64, signal_vector
from maple.errors import ArtifactError
from maple.features.spec import TogetherSettings
from maple.features.view import Feature

#: Short names and meanings, in the order of ``read``.
FEATURES: dict[str, Feature] = {
    "count": Feature("times the item was taken together with one of the user's last items, for the one with the most", "log(1 + times)"),
    "likeness": Feature("the same over the geometric mean of all times of both, for the likeliest", "share, 0 to 1"),
    "share": Feature("times over (all times of the last item + 20), mean over the last items", "share, 0 to 1"),
    "known": Feature("share of the last items among whose most frequent neighbours the item is", "share, 0 to 1"),
}
NAMES: tuple[str, ...] = tuple(f"user_item.together.{name}" for name in FEATURES)
KEPT_TICKS = 4  # lists of so many ticks are kept by ``Pairs``: requests come in order of time, a training asks for two moments
LAST_EVENTS = 50  # of a history in which the last distinct items are looked for
#: Events that say that a user has to do with an item.
MET: npt.NDArray[np.bool_] = signal_vector(dict.fromkeys(("view", "click", "add_to_cart", "purchase", "rating", "like"), 1.0)) > 0


@dataclass(frozen=True, eq=False)
class Lists:
    """The most frequent neighbours of every item at the end of a tick; a row is sorted by neighbour."""

    offsets: Int64  # [I+1]
    items: Int32  # [at most I*M]
    counts: Float32
    totals: Float32  # [I] pairs that an item is in, its further neighbours included

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays to store; ``from_tensors`` is the inverse."""
        return {"offsets": self.offsets, "items": self.items, "counts": self.counts, "totals": self.totals}

    @staticmethod
    def from_tensors(tensors: Mapping[str, npt.NDArray[Any]], num_items: int) -> Lists:
        """The lists again; ``ArtifactError`` if they are not those of so many items."""
        try:
            out = Lists(*(tensors[name] for name in ("offsets", "items", "counts", "totals")))
        except KeyError as error:
            raise ArtifactError(f"the lists of items taken together lack the array {error}; publish the bundle again") from None
        fits = len(out.offsets) == num_items + 1 == len(out.totals) + 1 and out.offsets[-1] == len(out.items) == len(out.counts)
        if not fits or (np.diff(out.offsets) < 0).any() or (out.items >= num_items).any():
            raise ArtifactError(f"the lists of items taken together are not those of {num_items} items; publish the bundle again")
        return out

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.totals)

    def closed(self, now: Int64) -> Int64:
        """A bundle knows one tick, whatever the time."""
        return np.zeros(len(now), np.int64)

    def at(self, tick: int) -> Lists:
        """Themselves."""
        return self


class Source(Protocol):
    """Where lists come from: ``Pairs`` offline, ``Lists`` in a bundle."""

    @property
    def num_items(self) -> int:
        """Items that are counted."""

    def closed(self, now: Int64) -> Int64:
        """The last tick that is closed at each time."""

    def at(self, tick: int) -> Lists:
        """The lists at the end of a tick."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """How often two items were taken together in each tick: sorted by (tick, first, second), first < second."""

    settings: TogetherSettings
    num_items: int
    ticks: Int64  # [P]
    keys: Int64  # [P] first * num_items + second
    counts: Int64  # [P]
    _lists: dict[int, Lists] = field(default_factory=dict)

    @staticmethod
    def of(data: Dataset, settings: TogetherSettings) -> Pairs:
        """The pairs of a log: its target events, in order."""
        log = data.log
        rows = np.flatnonzero(np.isin(log.event, data.targets) & (log.item >= 0))
        window = int(settings.window_hours * 3_600_000_000)
        keys, times = _pairs(log.user[rows], log.item[rows], log.time[rows], len(data.items), window, settings.partners)
        ticks = times // settings.tick
        order = np.lexsort((keys, ticks))
        return _summed(settings, len(data.items), ticks[order], keys[order], np.ones(len(order), np.int64))

    @staticmethod
    def merged(parts: Sequence[Pairs]) -> Pairs:
        """The pairs of disjoint sets of users over the same item codes, added up."""
        ticks, keys, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ticks", "keys", "counts"))
        order = np.lexsort((keys, ticks))
        return _summed(parts[0].settings, parts[0].num_items, ticks[order], keys[order], counts[order])

    def closed(self, now: Int64) -> Int64:
        """The last tick that is closed at each time."""
        return np.asarray(now // self.settings.tick - 1)

    def at(self, tick: int) -> Lists:
        """The lists at the end of a tick."""
        end = int(np.searchsorted(self.ticks, tick, side="right"))
        if end not in self._lists:
            while len(self._lists) >= KEPT_TICKS:
                self._lists.pop(next(iter(self._lists)))
            self._lists[end] = self._until(end)
        return self._lists[end]

    def _until(self, end: int) -> Lists:
        order = np.argsort(self.keys[:end], kind="stable")
        whole = _summed(self.settings, self.num_items, np.zeros(end, np.int64), self.keys[:end][order], self.counts[:end][order])
        first, second = whole.keys // max(self.num_items, 1), whole.keys % max(self.num_items, 1)
        item, other = np.concatenate([first, second]), np.concatenate([second, first])
        count = np.concatenate([whole.counts, whole.counts])
        totals = np.bincount(item, weights=count, minlength=self.num_items).astype(np.float32)
        order = np.lexsort((other, -count, item))
        item, other, count = item[order], other[order], count[order]
        starts = np.searchsorted(item, np.arange(self.num_items + 1))
        keep = np.flatnonzero(np.arange(len(item)) - starts[item] < self.settings.neighbours)
        keep = keep[np.lexsort((other[keep], item[keep]))]
        offsets = np.searchsorted(item[keep], np.arange(self.num_items + 1)).astype(np.int64)
        return Lists(offsets, other[keep].astype(np.int32), count[keep].astype(np.float32), totals)


def _summed(settings: TogetherSettings, num_items: int, ticks: Int64, keys: Int64, counts: Int64) -> Pairs:
    """Sorted rows with equal (tick, key) added up."""
    if len(keys) == 0:
        return Pairs(settings, num_items, ticks, keys, counts)
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]) | (ticks[1:] != ticks[:-1])])
    return Pairs(settings, num_items, ticks[starts], keys[starts], np.add.reduceat(counts, starts))


@numba.njit(cache=True, nogil=True)
def _pairs(user, item, time, num_items, window, partners):  # type: ignore[no-untyped-def]  # numba types it
    keys, times = np.empty(0, np.int64), np.empty(0, np.int64)
    for filling in range(2):  # count, then fill
        count = 0
        for n in range(len(user)):
            m = n - 1
            while m >= 0 and n - m <= partners and user[m] == user[n] and time[n] - time[m] <= window:
                if item[m] != item[n]:
                    if filling:
                        keys[count] = min(item[m], item[n]) * np.int64(num_items) + max(item[m], item[n])
                        times[count] = time[n]
                    count += 1
                m -= 1
        if not filling:
            keys, times = np.empty(count, np.int64), np.empty(count, np.int64)
    return keys, times


# -- the last items of a user, and what is read of them ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LastItems:
    """The last distinct items of B users, latest first, each with the time of its last event."""

    offsets: Int64
    items: Int32
    times: Int64

    @staticmethod
    def of(histories: Histories, num_items: int, most: int) -> LastItems:
        """Of the last events of histories, those that meet a known item."""
        offsets, items, times = _last(histories.offsets, histories.items, histories.events, histories.times, MET, num_items, most)
        return LastItems(offsets, items, times)


@numba.njit(cache=True, nogil=True)
def _last(offsets, items, events, times, met, num_items, most):  # type: ignore[no-untyped-def]
    rows = len(offsets) - 1
    out, out_items, out_times = np.zeros(rows + 1, np.int64), np.empty(rows * most, np.int32), np.empty(rows * most, np.int64)
    count = 0
    for row in range(rows):
        start, n = count, offsets[row + 1] - 1
        stop = max(offsets[row], offsets[row + 1] - LAST_EVENTS)
        while n >= stop and count - start < most:
            item = items[n]
            fresh = 0 <= item < num_items and met[events[n]]
            for k in range(start, count):
                fresh = fresh and out_items[k] != item
            if fresh:
                out_items[count], out_times[count] = item, times[n]
                count += 1
            n -= 1
        out[row + 1] = count
    return out, out_items[:count], out_times[:count]


def read(source: Source, last: LastItems, now: Int64, offsets: Int64, items: Int32) -> dict[str, Float32]:
    """The features of ragged candidates, float32[N] each; NaN for a user without last items and for an unknown candidate."""
    out = np.full((len(FEATURES), len(items)), np.nan, np.float32)
    ticks = source.closed(now)
    for tick in ticks[:1] if len(ticks) == 1 else np.unique(ticks):
        rows, lists = np.flatnonzero(ticks == tick), source.at(int(tick))
        _read(lists.offsets, lists.items, lists.counts, lists.totals, rows, last.offsets, last.items, offsets, items, out)
    return dict(zip(NAMES, out, strict=True))


@numba.njit(cache=True, nogil=True)
def _read(starts, others, counts, totals, rows, last_offsets, last_items, offsets, items, out):  # type: ignore[no-untyped-def]
    for row in rows:
        held = last_offsets[row + 1] - last_offsets[row]
        if held == 0:
            continue
        for n in range(offsets[row], offsets[row + 1]):
            item = items[n]
            if item < 0 or item >= len(totals):
                continue
            most, likeness, share, known = 0.0, 0.0, 0.0, 0
            for k in range(last_offsets[row], last_offsets[row + 1]):
                own = last_items[k]
                low, high = starts[own], starts[own + 1]
                stop = high
                while low < high:
                    middle = (low + high) // 2
                    if others[middle] < item:
                        low = middle + 1
                    else:
                        high = middle
                if low < stop and others[low] == item:
                    count = np.float64(counts[low])
                    known += 1
                    most = max(most, count)
                    likeness = max(likeness, count / np.sqrt(np.float64(totals[own]) * np.float64(totals[item])))
                    share += count / (totals[own] + 20.0)
            out[0, n] = np.log1p(most)
            out[1, n] = likeness
            out[2, n] = share / held
            out[3, n] = known / held
