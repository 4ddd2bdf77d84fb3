"""Item features on a clock of ticks: partial sums per (item, tick) that merge, a timeline, and what is read from it.

Every user bucket emits ``partials``; ``ItemTimeline.of`` adds them up and folds them in time order with the same step as
everything else. Tick k covers [k, k+1) * tick and is closed from its end on, so a read at time t takes tick t // tick - 1: all it
has seen is strictly earlier than t. Only ticks with events are stored; between them the decay is exact.

Legend: I items, P (item, tick) pairs with events, W slots, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from maple.data.dataset import Bool, Dataset, Float32, Int32, Int64
from maple.errors import ArtifactError
from maple.features.catalogue import Catalogue, EventColumns
from maple.features.fold import NEVER, Float64, Op, initial, layout, trace
from maple.features.spec import FeatureSpec
from maple.features.view import Key, ReadContext
from maple.schema import EVENT_CODES


def _slots(spec: FeatureSpec) -> tuple[npt.NDArray[np.int8], Float64]:
    return layout([slot for view in spec.keyed(Key.ITEM) for slot in view.slots])


def first_purchases(data: Dataset, tick: int) -> Bool:
    """For each event of the log whether it is a user's first purchase of its item within its tick."""
    log = data.log
    bought = np.flatnonzero((log.event == EVENT_CODES["purchase"]) & (log.item >= 0))
    out = np.zeros(len(log), bool)
    if len(bought):
        _, pair = np.unique(log.user[bought].astype(np.int64) * len(data.items) + log.item[bought], return_inverse=True)
        ticks = log.time[bought] // tick
        key = pair.astype(np.int64) * (int(ticks.max() - ticks.min()) + 1) + (ticks - ticks.min())
        out[bought[np.unique(key, return_index=True)[1]]] = True
    return out


def partials(data: Dataset, spec: FeatureSpec, catalogue: Catalogue | None = None) -> pa.Table:
    """What the users of this log add to every (item, tick), as of the tick's end: columns item_id, tick int64, state double[W]."""
    catalogue = catalogue or Catalogue.of(data)
    log = data.log
    keep = np.flatnonzero(log.item >= 0)
    item, time = log.item[keep], log.time[keep]
    ticks = time // spec.tick
    order = np.lexsort((ticks, item))
    item, ticks, time = item[order], ticks[order], time[order]
    at = keep[order]
    fresh = first_purchases(data, spec.tick)[at]
    events = EventColumns.of(catalogue, item, log.event[at], time, log.value[at], log.price[at], fresh)
    starts = np.flatnonzero(_changes(item, ticks))
    state = np.empty((len(starts), len(_slots(spec)[0])))
    column = 0
    to_end = (ticks + 1) * spec.tick - time
    for view in spec.keyed(Key.ITEM):
        ops, half_lives = view.layout
        x = view.contribute(events)
        for slot, h in enumerate(half_lives):
            if h > 0:
                x[:, slot] *= np.exp2(-to_end / h)
        state[:, column : column + len(ops)] = _merge(x, starts, ops)
        column += len(ops)
    return _table(data.items.ids.take(pa.array(item[starts])), ticks[starts], state)


def _table(ids: pa.Array, ticks: Int64, state: Float64) -> pa.Table:
    return pa.table({"item_id": ids, "tick": ticks, "state": pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), state.shape[1])})


def _changes(item: npt.NDArray[Any], ticks: Int64) -> Bool:
    """Where a new (item, tick) begins in sorted rows."""
    if len(item) == 0:
        return np.zeros(0, bool)
    return np.asarray(np.r_[True, (item[1:] != item[:-1]) | (ticks[1:] != ticks[:-1])])


def _merge(x: Float64, starts: Int64, ops: npt.NDArray[np.int8]) -> Float64:
    """Rows of each run added up (SUM), or their extremes; a NaN adds nothing."""
    out = np.empty((len(starts), len(ops)))
    if len(starts) == 0:
        return out
    for slot, op in enumerate(ops):
        if op == Op.SUM:
            out[:, slot] = np.add.reduceat(np.nan_to_num(x[:, slot]), starts)
        else:
            assert op in (Op.MAX, Op.MIN), f"{Op(op).name} slots do not merge; item views use SUM, MAX and MIN"
            out[:, slot] = (np.fmax if op == Op.MAX else np.fmin).reduceat(x[:, slot], starts)
    return out


@dataclass(frozen=True, eq=False)
class ItemTimeline:
    """The folded states of all items at the end of every tick in which something happened to them."""

    spec: FeatureSpec
    catalogue: Catalogue
    offsets: Int64  # [I+1] into the rest
    ticks: Int64  # [P] ascending per item
    state: Float64  # [P, W] as of the end of the tick

    @staticmethod
    def of(tables: Sequence[pa.Table], spec: FeatureSpec, catalogue: Catalogue) -> ItemTimeline:
        """From partials of disjoint sets of users; items that the catalogue does not know are left out."""
        table = pa.concat_tables(tables)
        ops, half_lives = _slots(spec)
        width = len(ops)
        item = catalogue.items.encode(table["item_id"])
        ticks = np.asarray(table["tick"], dtype=np.int64)
        flat = table["state"].combine_chunks()
        part = np.asarray(flat.flatten(), dtype=np.float64).reshape(-1, width) if width else np.empty((len(item), 0))
        keep = np.flatnonzero(item >= 0)
        order = keep[np.lexsort((ticks[keep], item[keep]))]
        item, ticks, part = item[order], ticks[order], part[order]
        starts = np.flatnonzero(_changes(item, ticks))
        merged = _merge(part, starts, ops)
        item, ticks = item[starts], ticks[starts]
        state = trace(item.astype(np.int64), (ticks + 1) * spec.tick, merged, ops, half_lives)
        return ItemTimeline(spec, catalogue, np.searchsorted(item, np.arange(len(catalogue) + 1)).astype(np.int64), ticks, state)

    @staticmethod
    def from_data(data: Dataset, spec: FeatureSpec) -> ItemTimeline:
        """The timeline of a whole data set at once."""
        catalogue = Catalogue.of(data)
        return ItemTimeline.of([partials(data, spec, catalogue)], spec, catalogue)

    def closed(self, now: Int64) -> Int64:
        """The last tick that is closed at each time."""
        return np.asarray(now) // self.spec.tick - 1

    def at(self, items: Int32, ticks: Int64) -> dict[str, Float32]:
        """Item features at the end of given ticks, columns float32[N]; all NaN for an unknown item (-1)."""
        items, ticks = np.asarray(items, np.int32), np.asarray(ticks, np.int64)
        row = self._row(items, ticks)
        ops, _ = _slots(self.spec)
        empty, _ = initial(ops, 1)
        state = np.repeat(empty, len(items), axis=0)
        found = row >= 0
        state[found] = self.state[row[found]]
        last = np.full(len(items), NEVER, np.int64)
        last[found] = (self.ticks[row[found]] + 1) * self.spec.tick
        now, columns = (ticks + 1) * self.spec.tick, self.catalogue.take(items)
        out: dict[str, Float32] = {}
        start = 0
        for view in self.spec.keyed(Key.ITEM):
            width = len(view.layout[0])
            out |= view.columns(ReadContext(view.layout[1], state[:, start : start + width], last, now, item=columns))
            start += width
        for column in out.values():
            column[items < 0] = np.nan
        return out

    def read(self, tick: int) -> dict[str, Float32]:
        """The features of all items at the end of one tick, columns float32[I]: what a bundle stores."""
        return self.at(np.arange(len(self.catalogue), dtype=np.int32), np.full(len(self.catalogue), tick))

    def _row(self, items: Int32, ticks: Int64) -> Int64:
        """The last row of each item at or before a tick, -1 where there is none."""
        known = items >= 0
        low = np.where(known, self.offsets[np.maximum(items, 0)], 0)
        high = np.where(known, self.offsets[np.maximum(items, 0) + 1], 0)
        start = low.copy()
        while True:
            open_ = low < high
            if not open_.any():
                return np.where(low > start, low - 1, -1)
            middle = (low + high) // 2
            before = open_ & (self.ticks[np.minimum(middle, len(self.ticks) - 1)] <= ticks)
            low = np.where(before, middle + 1, low)
            high = np.where(open_ & ~before, middle, high)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays to store; ``from_tensors`` is the inverse."""
        return {"offsets": self.offsets, "ticks": self.ticks, "state": self.state}

    @staticmethod
    def from_tensors(tensors: Mapping[str, npt.NDArray[Any]], spec: FeatureSpec, catalogue: Catalogue) -> ItemTimeline:
        """The timeline again; ``ArtifactError`` if the arrays do not fit the spec or the catalogue."""
        try:
            out = ItemTimeline(spec, catalogue, tensors["offsets"], tensors["ticks"], tensors["state"])
        except KeyError as error:
            raise ArtifactError(f"an item timeline lacks the array {error}; build the features again") from None
        width, rows = len(_slots(spec)[0]), len(out.ticks)
        if out.state.shape != (rows, width) or out.offsets.shape != (len(catalogue) + 1,) or (rows and out.offsets[-1] != rows):
            raise ArtifactError(
                f"an item timeline of shape {out.state.shape} over {len(out.offsets) - 1} items does not fit the feature spec "
                f"({width} slots) and catalogue ({len(catalogue)} items); build the features again"
            )
        return out


class ItemReader:
    """Item features at many times, from a timeline."""

    def __init__(self, timeline: ItemTimeline) -> None:
        self.timeline = timeline

    def item_columns(self, items: Int32, now: Int64) -> dict[str, Float32]:
        """Features float32[N] of items int32[N], each at the last tick that is closed at its time (int64[N] microseconds)."""
        ticks = self.timeline.closed(now)
        if len(items) == 0:
            return self.timeline.at(np.empty(0, np.int32), np.empty(0, np.int64))
        first = int(ticks.min())
        span = int(ticks.max()) - first + 1
        pairs, back = np.unique((np.asarray(items, np.int64) + 1) * span + (ticks - first), return_inverse=True)
        columns = self.timeline.at((pairs // span - 1).astype(np.int32), pairs % span + first)
        return {name: column[back] for name, column in columns.items()}


class StoredItems:
    """Item features of one tick, as a bundle carries them: a gather, whatever the time."""

    def __init__(self, columns: Mapping[str, Float32]) -> None:
        self._padded = {name: np.append(column, np.float32("nan")) for name, column in columns.items()}
        self._last = max((len(column) for column in columns.values()), default=0)

    def item_columns(self, items: Int32, now: Int64) -> dict[str, Float32]:
        """Features float32[N]; all NaN for -1 and for items that are newer than the columns."""
        rows = np.minimum(items, self._last)
        return {name: column[rows] for name, column in self._padded.items()}
