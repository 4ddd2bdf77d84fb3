"""Training examples of models whose user is a history: what was known, and what came next (or what was hidden).

``NextExamples`` cuts a user's log at a random time: everything strictly before is the history, the next target items are the
positives. ``HiddenExamples`` is for data whose order says nothing: a random part of a user's items is hidden and to be found
from the rest. Both keep some positives of some users for validation, and never show them in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse as sp

from maple.data.dataset import Bool, Dataset, Float32, Histories, Int32, Int64
from maple.errors import DataError
from maple.models.families import history_matrix

#: At most so many users are validated on; where there would be fewer than the second, the figure would be noise and nobody is.
VALID_USERS = 2000
MIN_VALID_USERS = 20


@dataclass(frozen=True, eq=False)
class Examples:
    """B histories as pooling weights (one matrix per pool, see ``pool_weights``) and P positives: query row and item of each."""

    pools: tuple[sp.csr_matrix, ...]
    rows: Int64
    items: Int32


class ExampleSource(Protocol):
    """Gives examples of one dataset. ``frequency`` float32[I]: how often an item is a positive, summing to 1."""

    frequency: Float32

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Examples]: ...

    def valid(self) -> Examples | None:
        """The validation examples, or None where nobody has enough events."""


def pool_weights(histories: Histories, num_items: int, signals: Float32, recency: float) -> tuple[sp.csr_matrix, ...]:
    """How a history is pooled: float32[B, I] of unit rows, the square root of the summed signals, which decay by ``recency`` per
    distinct later time. With ``recency`` < 1 a second pool does not decay. A history without a known item is a zero row."""
    decays = (recency, 1.0) if recency < 1 else (1.0,)
    return tuple(unit(history_matrix(histories, num_items, signals, recency=decay)) for decay in decays)


def unit(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """A copy with the square root of its entries and rows of length 1 (zero rows stay)."""
    out = matrix.copy()
    rows = np.repeat(np.arange(out.shape[0]), np.diff(out.indptr))
    total = np.bincount(rows, weights=out.data, minlength=out.shape[0])
    out.data = np.sqrt(out.data / np.maximum(total, 1e-30)[rows]).astype(np.float32)
    return out


class NextExamples:
    """Cut points of users' logs; see the module's docstring."""

    def __init__(
        self, data: Dataset, *, horizon: int, history: int, cuts_per_user: int, recency: float, repeats: bool, holdout: float,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.data, self.horizon, self.history, self.recency, self.repeats = data, horizon, history, recency, repeats
        self.cuts_per_user = cuts_per_user
        log, num_users = data.log, len(data.users)
        keep = np.isin(log.event, data.targets) & (log.item >= 0)
        self.user, self.item, self.time = log.user[keep], log.item[keep], log.time[keep]
        signal = np.flatnonzero((data.signals[log.event] > 0) & (log.item >= 0))
        begin = np.full(num_users, np.iinfo(np.int64).max)
        begin[log.user[signal[::-1]]] = log.time[signal[::-1]]  # the last write is a user's first signal
        fresh = np.flatnonzero(np.diff(self.user, prepend=-1).astype(bool) | np.diff(self.time, prepend=-1).astype(bool))
        cuts = fresh[self.time[fresh] > begin[self.user[fresh]]]
        if len(cuts) == 0:
            raise DataError(
                "no user has a target event after another event, so there is no next item to learn. Use more history, "
                "other `targets`, or `examples: hidden` if the times say nothing."
            )
        ends = np.searchsorted(self.user, self.user[cuts], side="right")
        owner = self.user[cuts]
        first, count = np.searchsorted(owner, np.arange(num_users)), np.bincount(owner, minlength=num_users)
        held = _enough((rng.random(num_users) < holdout) & (count >= 2))
        place = first + np.clip((0.8 * count).astype(np.int64), 1, np.maximum(count - 1, 1))
        users = np.flatnonzero(held)
        self.valid_cuts, self.valid_ends = cuts[place[users]], ends[place[users]]
        bound = np.full(num_users, np.iinfo(np.int64).max)
        bound[users] = self.valid_cuts
        kept = cuts < bound[owner]
        self.cuts, self.ends = cuts[kept], np.minimum(ends, bound[owner])[kept]
        counts = np.bincount(self.item[np.arange(len(self.item)) < bound[self.user]], minlength=len(data.items)).astype(np.float64)
        self.frequency: Float32 = ((counts + 1e-3) / (counts + 1e-3).sum()).astype(np.float32)
        if len(users) > VALID_USERS:
            chosen = np.sort(rng.choice(len(users), VALID_USERS, replace=False))
            self.valid_cuts, self.valid_ends = self.valid_cuts[chosen], self.valid_ends[chosen]

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Examples]:
        """Up to ``cuts_per_user`` random cuts of every user, in random order."""
        owner = self.user[self.cuts]
        order = np.lexsort((rng.random(len(owner)), owner))
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        chosen = rng.permutation(order[rank < self.cuts_per_user])
        for start in range(0, len(chosen), batch_size):
            here = chosen[start : start + batch_size]
            yield self._examples(self.cuts[here], self.ends[here])

    def valid(self) -> Examples | None:
        return self._examples(self.valid_cuts, self.valid_ends) if len(self.valid_cuts) else None

    def _examples(self, cuts: Int64, ends: Int64) -> Examples:
        data, num_items = self.data, len(self.data.items)
        pools = pool_weights(data.histories(self.user[cuts], self.time[cuts], self.history), num_items, data.signals, self.recency)
        sizes = np.minimum(ends - cuts, self.horizon)
        index = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes - cuts, sizes)
        pairs = np.unique(np.repeat(np.arange(len(cuts)), sizes) * np.int64(num_items) + self.item[index])
        rows, items = pairs // num_items, (pairs % num_items).astype(np.int32)
        known = np.diff(pools[-1].indptr)[rows] > 0  # the last `history` events may hold no signal
        if not self.repeats:
            known &= ~_contains(pools[-1], rows, items)
        return Examples(pools, rows[known], items[known])


class HiddenExamples:
    """Users' items, a random half hidden each time; see the module's docstring."""

    def __init__(self, data: Dataset, *, hide: float, holdout: float, rng: np.random.Generator) -> None:
        self.hide = hide
        users, items = data.target_pairs()
        shape = (len(data.users), len(data.items))
        count = np.bincount(users, minlength=shape[0])
        held = _enough((rng.random(shape[0]) < holdout) & (count >= 3))
        if held.sum() > VALID_USERS:
            held[rng.choice(np.flatnonzero(held), held.sum() - VALID_USERS, replace=False)] = False
        kept = ~(held[users] & (rng.random(len(users)) < 0.2))
        interest = data.matrix()
        hidden = sp.csr_matrix((np.ones(int((~kept).sum()), np.float32), (users[~kept], items[~kept])), shape=shape)
        self.interest = _without(interest, hidden)
        self.targets = sp.csr_matrix((np.ones(int(kept.sum()), np.float32), (users[kept], items[kept])), shape=shape)
        self.valid_targets = hidden
        history = np.diff(self.interest.indptr)
        self.users = np.flatnonzero((np.diff(self.targets.indptr) > 0) & (history > 1))
        self.valid_users = np.flatnonzero((np.diff(hidden.indptr) > 0) & (history > 0))
        if len(self.users) == 0:
            raise DataError("no user has two different items, so nothing can be hidden and found. Use more history or other `targets`.")
        counts = np.bincount(self.targets.indices, minlength=shape[1]).astype(np.float64)
        self.frequency: Float32 = ((counts + 1e-3) / (counts + 1e-3).sum()).astype(np.float32)

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[Examples]:
        """Every user once, in random order."""
        order = rng.permutation(self.users)
        for start in range(0, len(order), batch_size):
            here = order[start : start + batch_size]
            targets, interest = self.targets[here], self.interest[here]
            rows = np.repeat(np.arange(len(here)), np.diff(targets.indptr))
            draw = rng.random(len(rows))
            lowest = np.minimum.reduceat(draw, targets.indptr[:-1])
            gone = (draw < self.hide) | (draw == lowest[rows])  # at least one
            hidden = sp.csr_matrix((np.ones(int(gone.sum()), np.float32), (rows[gone], targets.indices[gone])), shape=targets.shape)
            left = _without(interest, hidden)
            known = np.diff(left.indptr)[rows[gone]] > 0
            yield Examples((unit(left),), rows[gone][known], targets.indices[gone][known].astype(np.int32))

    def valid(self) -> Examples | None:
        if len(self.valid_users) == 0:
            return None
        targets = self.valid_targets[self.valid_users]
        rows = np.repeat(np.arange(len(self.valid_users)), np.diff(targets.indptr))
        return Examples((unit(self.interest[self.valid_users]),), rows, targets.indices.astype(np.int32))


def _enough(held: Bool) -> Bool:
    """The held-out users, or nobody if they are too few to say anything."""
    return held if held.sum() >= MIN_VALID_USERS else np.zeros_like(held)


def _contains(matrix: sp.csr_matrix, rows: Int64, items: Int32) -> Bool:
    """Whether each (row, item) is an entry of the matrix, bool[P]."""
    width = np.int64(matrix.shape[1])
    own = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)) * width + matrix.indices
    return np.asarray(np.isin(rows * width + items, own))


def _without(matrix: sp.csr_matrix, hidden: sp.csr_matrix) -> sp.csr_matrix:
    """The matrix without the entries that ``hidden`` has."""
    out = matrix.copy()
    rows = np.repeat(np.arange(out.shape[0]), np.diff(out.indptr))
    out.data[_contains(hidden, rows, out.indices)] = 0
    out.eliminate_zeros()
    return out
