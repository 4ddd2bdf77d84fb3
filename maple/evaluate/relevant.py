"""What an evaluation asks: which users, which items count as relevant for them, what was left out and why, and what the catalogue was.

Everything is a function of a dataset and time boundaries. An event tells of *interest* if its kind has a positive signal
or is a target; a return, a dislike or an impression makes neither a user nor an item known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.dataset import Bool, Dataset, Float32, Int32, Int64, ragged_take
from maple.errors import DataError
from maple.hashing import combine, sha256


@dataclass(frozen=True, eq=False)
class Relevant:
    """U test users and their relevant items: ``items[offsets[u]:offsets[u + 1]]`` are distinct and belong to ``users[u]``.

    Times are microseconds since 1970; None where a data set brings its own split. ``counts`` says what the window held and
    what was left out of it (see ``relevant_of``).
    """

    users: Int32
    offsets: Int64
    items: Int32
    start: int | None = None
    end: int | None = None
    known_before: int | None = None
    new_only: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def digest(self) -> str:
        """SHA-256 of users, offsets and items: two evaluations with the same digest asked the same."""
        return combine([sha256(np.ascontiguousarray(part.astype("<i8")).tobytes()) for part in (self.users, self.offsets, self.items)])

    def take(self, rows: npt.NDArray[Any]) -> Relevant:
        """Some of the users, in that order; the counts stay those of the whole."""
        index, offsets = ragged_take(self.offsets, rows)
        return replace(self, users=self.users[rows], offsets=offsets, items=self.items[index])


def relevant_of(data: Dataset, start: int, end: int, *, new_only: bool, known_before: int, cold_users: bool = False) -> Relevant:
    """The distinct target items of each user in [start, end), of users and items that showed interest before ``known_before``.

    ``new_only`` leaves out items that the user has a target event with before ``start``. ``cold_users`` keeps users who were
    not known (a test of the fallback). ``counts`` of the result conserves:

        pairs_in_window = pairs + pairs_unknown_user + pairs_unknown_item + pairs_bought_before
        users_in_window = users + users_unknown + users_left_empty

    and ``cold_items`` is the number of distinct unknown items in the window. ``DataError`` for boundaries that would leak or
    cannot hold anything, and where nobody is left.
    """
    if not start < end:
        raise DataError(f"the test window is empty: it starts at {start} and ends before {end} (microseconds)")
    if known_before > start:
        raise DataError(f"users and items would be known from events up to {known_before}, after the test window starts ({start}): a leak")
    user_known, item_known = known(data, known_before)
    user, item = data.between(start, end).target_pairs()
    bought = np.zeros(len(user), bool)
    if new_only:
        bought = among((user, item), data.before(start).target_pairs(), len(data.items))
    found = judged(user, item, np.ones(len(user), bool) if cold_users else user_known[user], item_known[item], bought)
    if len(found) == 0:
        why = ", ".join(f"{name} {count}" for name, count in found.counts.items())
        raise DataError(f"no test user is left between {start} and {end} ({why}); choose an earlier cut or check which events are targets")
    return replace(found, start=start, end=end, known_before=known_before, new_only=new_only)


def among(pairs: tuple[Int32, Int32], others: tuple[Int32, Int32], num_items: int) -> Bool:
    """Which (user, item) pairs are among others, bool[N]."""
    width = np.int64(num_items)
    own, other = (user.astype(np.int64) * width + item for user, item in (pairs, others))
    return np.isin(own, other)


def judged(user: Int32, item: Int32, keep_user: Bool, keep_item: Bool, bought: Bool) -> Relevant:
    """The relevant items of distinct pairs sorted by user: those whose user and item are kept and that are not bought; with counts."""
    keep = keep_user & keep_item & ~bought
    users, sizes = np.unique(user[keep], return_counts=True)
    in_window = np.unique(user)
    unknown = len(np.unique(user[~keep_user]))
    counts = {
        "pairs_in_window": len(user),
        "pairs": int(keep.sum()),
        "pairs_unknown_user": int((~keep_user).sum()),
        "pairs_unknown_item": int((keep_user & ~keep_item).sum()),
        "pairs_bought_before": int((keep_user & keep_item & bought).sum()),
        "users_in_window": len(in_window),
        "users": len(users),
        "users_unknown": unknown,
        "users_left_empty": len(in_window) - unknown - len(users),
        "cold_items": len(np.unique(item[~keep_item])),
    }
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Relevant(users.astype(np.int32), offsets, item[keep].astype(np.int32), counts=counts)


def known(data: Dataset, before: int) -> tuple[Bool, Bool]:
    """Which users and which items have an event of interest strictly before a time: (bool[users], bool[items])."""
    log = data.log
    early = interest(data) & (log.time < before)
    users, items = np.zeros(len(data.users), bool), np.zeros(len(data.items), bool)
    users[log.user[early]] = True
    items[log.item[early]] = True
    return users, items


def interest(data: Dataset) -> Bool:
    """Which events of the log tell of interest: a positive signal or a target kind, bool[N]."""
    return np.asarray((data.signals[data.log.event] > 0) | np.isin(data.log.event, data.targets))


@dataclass(frozen=True, eq=False)
class CatalogueStats:
    """What list-level metrics need to know of the I items, all of it from before the test window.

    ``users_per_item`` int64[I]: distinct users with a target event; ``num_users``: how many users had one at all;
    ``categories`` int32[I], -1 unknown; ``vectors`` float32[I, D].
    """

    users_per_item: Int64
    num_users: int
    categories: Int32 | None = None
    vectors: Float32 | None = None

    def __len__(self) -> int:
        return len(self.users_per_item)

    @staticmethod
    def of(data: Dataset, before: int, *, category: str = "category", vectors: Float32 | None = None) -> CatalogueStats:
        """The catalogue is every item of the dataset; popularity is counted strictly before ``before``."""
        user, item = data.before(before).target_pairs()
        codes = None
        if category in data.item_table.column_names:
            encoded = data.item_table[category].cast(pa.string()).combine_chunks().dictionary_encode()
            if len(encoded.dictionary):
                codes = np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int32)
        return CatalogueStats(np.bincount(item, minlength=len(data.items)).astype(np.int64), max(len(np.unique(user)), 1), codes, vectors)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A label per test user: ``labels[codes[u]]``. The order of the labels is the order of the report."""

    labels: tuple[str, ...]
    codes: Int32

    @staticmethod
    def of(values: Sequence[str] | npt.NDArray[np.str_] | Segmentation) -> Segmentation:
        """From one label per user; labels in sorted order."""
        if isinstance(values, Segmentation):
            return values
        labels, codes = np.unique(np.asarray(values, dtype=np.str_), return_inverse=True)
        return Segmentation(tuple(str(label) for label in labels), codes.reshape(-1).astype(np.int32))


def user_segments(data: Dataset, users: Int32, before: int, *, cold_below: int = 3) -> dict[str, Segmentation]:
    """The two standard segmentations by events of interest strictly before a time.

    ``activity``: light, medium, heavy, by the terciles over these users. ``history``: cold (fewer than ``cold_below``
    events), warm.
    """
    early = interest(data) & (data.log.time < before)
    size = np.bincount(data.log.user[early], minlength=len(data.users))[users]
    light, medium = np.quantile(size, [1 / 3, 2 / 3]) if len(size) else (0.0, 0.0)
    return {
        "activity": Segmentation(("light", "medium", "heavy"), ((size > light).astype(np.int32) + (size > medium)).astype(np.int32)),
        "history": Segmentation(("cold", "warm"), (size >= cold_below).astype(np.int32)),
    }


def item_strata(data: Dataset, before: int, *, cold_below: int = 10) -> dict[str, Segmentation]:
    """The standard stratification of the catalogue by distinct users who showed interest strictly before a time: cold (fewer than
    ``cold_below``), warm. Items that nobody knew are counted (``cold_items``) and not asked for."""
    early = interest(data) & (data.log.time < before)
    pairs = np.unique(data.log.user[early].astype(np.int64) * len(data.items) + data.log.item[early])
    count = np.bincount(pairs % len(data.items), minlength=len(data.items))
    return {"items": Segmentation(("cold", "warm"), (count >= cold_below).astype(np.int32))}
