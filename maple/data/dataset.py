"""The in-memory training view of a snapshot: int32 codes for ids, a time-sorted log per user, sparse matrices, histories.

Codes belong to one dataset (and the bundle made from it); stores and files hold string ids. -1 is an unknown item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from maple.errors import DataError
from maple.schema import EVENT_CODES, EVENT_TYPES, EVENTS

Int8: TypeAlias = npt.NDArray[np.int8]
Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]
Bool: TypeAlias = npt.NDArray[np.bool_]

#: How much one event of each kind says about interest, by default; 0 leaves the kind out of interaction matrices.
DEFAULT_SIGNALS: dict[str, float] = {"view": 0.1, "click": 0.2, "add_to_cart": 0.5, "purchase": 1.0, "rating": 1.0, "like": 1.0}


#: A column of EVENTS with more values is no context.
MAX_CONTEXT_VALUES = 1000


def signal_vector(signals: dict[str, float]) -> Float32:
    """Weights by event name as float32[len(EVENT_TYPES)], 0 where not named."""
    out = np.zeros(len(EVENT_TYPES), dtype=np.float32)
    for name, weight in signals.items():
        out[EVENT_CODES[name]] = weight
    return out


@dataclass(frozen=True, eq=False)
class Vocab:
    """String ids in code order; the code of an id is its place. Ids are distinct."""

    ids: pa.StringArray
    base: Vocab | None = None  # of ``extended``: the ids without the new ones

    @staticmethod
    def of(ids: Iterable[str] | pa.Array | pa.ChunkedArray) -> Vocab:
        """The vocabulary of the distinct ids, in byte order, so that the same ids always get the same codes."""
        array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(list(ids), pa.string())
        distinct = pc.unique(array.cast(pa.string())).drop_null()
        return Vocab(distinct.take(pc.sort_indices(distinct)))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _codes(self) -> dict[str, int]:
        """Of the ids that are not the base's."""
        start = 0 if self.base is None else len(self.base)
        return {text: code for code, text in enumerate(self.ids[start:].to_pylist(), start=start)}

    def encode(self, ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> Int32:
        """int32 codes of ids, -1 where unknown."""
        if isinstance(ids, pa.Array | pa.ChunkedArray):
            found = pc.index_in(ids.cast(pa.string()), value_set=self.ids)
            return np.asarray(pc.fill_null(found, -1)).astype(np.int32)
        codes = self._codes
        if self.base is None:
            return np.fromiter((codes.get(text, -1) for text in ids), dtype=np.int32, count=len(ids))
        out = self.base.encode(ids)
        for place in np.flatnonzero(out < 0).tolist():
            out[place] = codes.get(ids[place], -1)
        return out

    def extended(self, new: pa.StringArray) -> Vocab:
        """With further ids after these, distinct from them; what finds these is shared, not built again."""
        return Vocab(pa.concat_arrays([self.ids, new]), self)

    def decode(self, codes: npt.NDArray[Any]) -> list[str]:
        """The ids of known codes."""
        return [str(text) for text in self.ids.take(pa.array(codes)).to_pylist()]


@dataclass(frozen=True, eq=False)
class Histories:
    """B ragged histories, each oldest first. ``offsets`` int64[B+1]; the rest is aligned with the flat events.

    ``items`` may hold -1 (an item this dataset does not know); models ignore those.
    """

    offsets: Int64
    items: Int32
    events: Int8
    times: Int64  # microseconds since 1970, UTC

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def of(histories: Sequence[tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]]) -> Histories:
        """From a list of (items, events, times)."""
        sizes = [len(np.atleast_1d(np.asarray(items))) for items, _, _ in histories]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

        def flat(part: int, dtype: type) -> npt.NDArray[Any]:
            pieces: list[npt.NDArray[Any]] = [np.atleast_1d(np.asarray(history[part], dtype=dtype)) for history in histories]
            return np.concatenate(pieces) if pieces else np.empty(0, dtype)

        return Histories(offsets, flat(0, np.int32), flat(1, np.int8), flat(2, np.int64))

    def rows(self) -> Int64:
        """The query row of every flat event, int64[N]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take(self, rows: npt.NDArray[Any]) -> Histories:
        """The histories of some rows, in that order."""
        index, offsets = ragged_take(self.offsets, rows)
        return Histories(offsets, self.items[index], self.events[index], self.times[index])

    def matrix(self, num_items: int, signals: Float32, binary: bool = False) -> sp.csr_matrix:
        """Interaction weights float32[B, num_items]: signals summed over a user's events with the item, or 1 where any is positive."""
        weight = signals[self.events]
        keep = (self.items >= 0) & (weight > 0)
        out = sp.csr_matrix((weight[keep], (self.rows()[keep], self.items[keep])), shape=(len(self), num_items), dtype=np.float32)
        out.sum_duplicates()
        if binary:
            out.data[:] = 1.0
        return out


def ragged_take(offsets: Int64, rows: npt.NDArray[Any]) -> tuple[Int64, Int64]:
    """Flat indices of some rows of a ragged array, and the new offsets."""
    starts, sizes = offsets[rows], offsets[np.asarray(rows) + 1] - offsets[rows]
    out = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    index = np.arange(out[-1]) - np.repeat(out[:-1] - starts, sizes)
    return index, out


@dataclass(frozen=True, eq=False)
class Log:
    """Events as columns, sorted by (user, time, event id). N rows."""

    user: Int32
    item: Int32
    event: Int8
    time: Int64  # microseconds since 1970, UTC
    value: Float32  # NaN where missing
    price: Float32  # NaN where missing
    context: Mapping[str, Int32] = field(default_factory=dict)  # codes of ``Dataset.contexts``, -1 where missing

    def __len__(self) -> int:
        return len(self.user)

    def where(self, keep: Bool | Int64) -> Log:
        """Some rows: a mask, or their numbers."""
        context = {name: codes[keep] for name, codes in self.context.items()}
        return Log(self.user[keep], self.item[keep], self.event[keep], self.time[keep], self.value[keep], self.price[keep], context)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A log with its vocabularies and tables. ``item_table`` and ``user_table`` are aligned with the codes.

    ``signals`` float32[len(EVENT_TYPES)]: interest per event kind. ``targets``: event codes that count as relevant. ``contexts``: the
    values of what events say of their circumstances (device, location, ...): further columns of EVENTS that are no ids or fractions.
    """

    users: Vocab
    items: Vocab
    log: Log
    item_table: pa.Table
    user_table: pa.Table
    signals: Float32 = field(default_factory=lambda: signal_vector(DEFAULT_SIGNALS))
    targets: tuple[int, ...] = (EVENT_CODES["purchase"],)
    contexts: Mapping[str, Vocab] = field(default_factory=dict)

    @staticmethod
    def from_tables(
        events: pa.Table,
        items: pa.Table | None = None,
        users: pa.Table | None = None,
        *,
        signals: dict[str, float] | None = None,
        targets: Sequence[str] = ("purchase",),
    ) -> Dataset:
        """The dataset of EVENTS / ITEMS / USERS tables. Items and users are the union of the catalogue and the log.

        Events without an ``event_id`` keep their order where a user has several at one time.
        """
        if events.num_rows == 0:
            raise DataError("there are no events to train on; look at the validation report of the ingest for what was dropped and why")
        item_vocab = Vocab.of(_all_ids(events["item_id"], items, "item_id"))
        user_vocab = Vocab.of(_all_ids(events["user_id"], users, "user_id"))
        user = user_vocab.encode(events["user_id"])
        time = np.asarray(events["timestamp"].cast(pa.int64()))
        ranks = [np.asarray(pc.rank(events["event_id"].combine_chunks()))] if "event_id" in events.column_names else []
        order = np.lexsort((*ranks, time, user))
        contexts = _contexts(events)
        log = Log(
            user[order],
            item_vocab.encode(events["item_id"])[order],
            np.asarray(pc.index_in(events["event"].cast(pa.string()), value_set=pa.array(EVENT_TYPES))).astype(np.int8)[order],
            time[order],
            _floats(events["value"])[order],
            _floats(events["price"])[order],
            {name: codes[order] for name, (_, codes) in contexts.items()},
        )
        return Dataset(
            user_vocab, item_vocab, log, align(items, "item_id", item_vocab), align(users, "user_id", user_vocab),
            signal_vector(signals or DEFAULT_SIGNALS), tuple(EVENT_CODES[name] for name in targets),
            {name: vocab for name, (vocab, _) in contexts.items()},
        )  # fmt: skip

    @cached_property
    def offsets(self) -> Int64:
        """Where each user's events lie in the log, int64[users+1]."""
        return np.searchsorted(self.log.user, np.arange(len(self.users) + 1)).astype(np.int64)

    @property
    def span(self) -> tuple[int, int]:
        """First and last event time, microseconds."""
        return int(self.log.time.min()), int(self.log.time.max())

    def where(self, keep: Bool) -> Dataset:
        """The same codes and tables with part of the log."""
        return replace(self, log=self.log.where(keep))

    def before(self, time: int) -> Dataset:
        """Events strictly before a time."""
        return self.where(self.log.time < time)

    def between(self, start: int, end: int) -> Dataset:
        """Events in [start, end)."""
        return self.where((self.log.time >= start) & (self.log.time < end))

    def matrix(self, binary: bool = False) -> sp.csr_matrix:
        """Interaction weights float32[users, items]; see ``Histories.matrix``."""
        log = self.log
        return Histories(self.offsets, log.item, log.event, log.time).matrix(len(self.items), self.signals, binary)

    def histories(self, users: Int32, before: Int64, limit: int) -> Histories:
        """The last ``limit`` events of each user strictly before its time; a user code of -1 has none."""
        known = np.maximum(users, 0)
        starts, stops = self.offsets[known], self.offsets[known + 1]
        ends = _bisect(self.log.time, starts, stops, before)
        ends = np.where(users < 0, starts, ends)
        starts = np.maximum(starts, ends - limit)
        sizes = ends - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        index = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, sizes)
        return Histories(offsets, self.log.item[index], self.log.event[index], self.log.time[index])

    def target_pairs(self) -> tuple[Int32, Int32]:
        """Distinct (user, item) pairs with a target event, sorted by user then item."""
        keep = np.isin(self.log.event, self.targets)
        pairs = np.unique(self.log.user[keep].astype(np.int64) * len(self.items) + self.log.item[keep])
        return (pairs // len(self.items)).astype(np.int32), (pairs % len(self.items)).astype(np.int32)


def _all_ids(column: pa.ChunkedArray, table: pa.Table | None, key: str) -> pa.ChunkedArray:
    chunks = column.cast(pa.string()).chunks
    return pa.chunked_array(chunks + (table[key].cast(pa.string()).chunks if table is not None else []), pa.string())


def _contexts(events: pa.Table) -> dict[str, tuple[Vocab, Int32]]:
    """The columns beyond EVENTS that have few values, coded."""
    out = {}
    for name in events.column_names:
        column = events[name]
        few = pa.types.is_string(column.type) or pa.types.is_dictionary(column.type) or pa.types.is_boolean(column.type)
        if name in EVENTS.names or name.endswith("_id") or not (few or pa.types.is_integer(column.type)):
            continue
        vocab = Vocab.of(column)
        if 0 < len(vocab) <= MAX_CONTEXT_VALUES:
            out[name] = vocab, vocab.encode(column)
    return out


def _floats(column: pa.ChunkedArray) -> Float32:
    return np.asarray(column.cast(pa.float32()).fill_null(float("nan")), dtype=np.float32)


def align(table: pa.Table | None, key: str, vocab: Vocab) -> pa.Table:
    """The table with one row per code of the vocabulary, null where it has no row; the first of repeated keys counts."""
    if table is None:
        return pa.table({key: vocab.ids})
    rows = pc.index_in(vocab.ids, value_set=table[key].cast(pa.string()).combine_chunks())
    return table.take(rows).set_column(table.column_names.index(key), key, vocab.ids)


def _bisect(values: Int64, starts: Int64, stops: Int64, bounds: Int64) -> Int64:
    """For each segment [start, stop) of sorted values the first index whose value is >= its bound; all segments at once."""
    low, high = starts.copy(), stops.copy()
    while True:
        open_ = low < high
        if not open_.any():
            return low
        middle = (low + high) // 2
        less = open_ & (values[np.minimum(middle, len(values) - 1)] < bounds)
        low = np.where(less, middle + 1, low)
        high = np.where(open_ & ~less, middle, high)
