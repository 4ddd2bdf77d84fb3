"""Item features on a clock of ticks: what users do to items, folded per (item, tick), a timeline, and what is read from it.

Every user bucket hands on its ``partials``: its events in compact form, by item. ``ItemTimeline.of`` folds those of some items, from
however many buckets, with the same step as everything else: first the events of a tick, then the ticks of an item. Tick k covers
[k, k+1) * tick and is closed from its end on, so a read at time t takes tick t // tick - 1: all it has seen is strictly earlier
than t. Only ticks with events are stored; between them the decay is exact.

Legend: I items, P (item, tick) pairs with events, W slots, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from maple.data.dataset import Bool, Dataset, Float32, Int32, Int64
from maple.errors import ArtifactError
from maple.features.catalogue import Catalogue, EventColumns
from maple.features.fold import NEVER, Float64, Op, decay, fold, initial, layout, trace
from maple.features.spec import FeatureSpec
from maple.features.view import Key, ReadContext
from maple.schema import EVENT_CODES

#: What users did to items: ``fresh`` marks a user's first purchase of the item in a tick.
PARTIALS = pa.schema(
    [
        ("item_id", pa.string()),
        ("time", pa.int64()),  # microseconds
        ("event", pa.int8()),
        ("value", pa.float32()),  # NaN where missing
        ("price", pa.float32()),  # NaN where missing
        ("fresh", pa.bool_()),
    ]
)
#: Events folded at once: their contributions stay in the processor's cache.
CHUNK = 1 << 14


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


def partials(data: Dataset, spec: FeatureSpec) -> pa.Table:
    """What the users of this log do to items, by item: ``PARTIALS``. Those of disjoint users add up by concatenation."""
    log = data.log
    rows = np.flatnonzero(log.item >= 0)
    rows = rows[np.argsort(log.item[rows], kind="stable")]
    columns = (log.time, log.event, log.value, log.price, first_purchases(data, spec.tick))
    ids = data.items.ids.take(pa.array(log.item[rows]))
    return pa.table([ids, *(pa.array(column[rows]) for column in columns)], schema=PARTIALS)


def _folded(table: pa.Table, spec: FeatureSpec, catalogue: Catalogue) -> tuple[Int32, Int64, Float64]:
    """Partials as what each (item, tick) adds up to at the tick's end, by item and tick: items [P], ticks [P], state [P, W]."""
    ops, half_lives = _slots(spec)
    assert set(ops.tolist()) <= {Op.SUM, Op.MAX, Op.MIN}, "slots of item views are SUM, MAX or MIN: what ticks and users add to merges"
    item = catalogue.items.encode(table["item_id"])
    time = np.asarray(table["time"])
    order = np.lexsort((time, item))
    order = order[np.searchsorted(item[order], 0) :]  # without the unknown
    item, time = item[order], time[order]
    ticks = time // spec.tick
    new = np.r_[True, (item[1:] != item[:-1]) | (ticks[1:] != ticks[:-1])][: len(item)]
    pair, first = np.cumsum(new) - 1, np.flatnonzero(new)
    event, value, price, fresh = (table[name].to_numpy() for name in ("event", "value", "price", "fresh"))
    state, last = initial(ops, len(first))
    for start in range(0, len(order), CHUNK) if len(ops) else ():
        rows, part = order[start : start + CHUNK], slice(start, start + CHUNK)
        events = EventColumns.of(catalogue, item[part], event[rows], time[part], value[rows], price[rows], fresh[rows])
        x = [view.contribute(events) for view in spec.keyed(Key.ITEM)]
        fold(pair[part], time[part], np.concatenate(x, axis=1), ops, half_lives, state, last)
    item, ticks = item[first], ticks[first]
    to_end = (ticks + 1) * spec.tick - last
    for half_life in set(half_lives[half_lives > 0].tolist()):
        state[:, half_lives == half_life] *= decay(to_end, half_life)[:, None]
    return item, ticks, state


@dataclass(frozen=True, eq=False)
class ItemTimeline:
    """The folded states of all items at the end of every tick in which something happened to them: 8 * (W + 1) bytes per pair."""

    spec: FeatureSpec
    catalogue: Catalogue
    offsets: Int64  # [I+1] into the rest
    ticks: Int64  # [P] ascending per item
    state: Float64  # [P, W] as of the end of the tick

    @staticmethod
    def of(tables: Sequence[pa.Table], spec: FeatureSpec, catalogue: Catalogue) -> ItemTimeline:
        """From partials of disjoint sets of users; items that the catalogue does not know are left out."""
        item, ticks, added = _folded(pa.concat_tables(tables), spec, catalogue)
        state = trace(item.astype(np.int64), (ticks + 1) * spec.tick, added, *_slots(spec))
        return ItemTimeline(spec, catalogue, np.searchsorted(item, np.arange(len(catalogue) + 1)).astype(np.int64), ticks, state)

    @staticmethod
    def from_data(data: Dataset, spec: FeatureSpec) -> ItemTimeline:
        """The timeline of a whole data set at once."""
        return ItemTimeline.of([partials(data, spec)], spec, Catalogue.of(data))

    def items(self) -> Int32:
        """The item code of every row, int32[P]."""
        return np.repeat(np.arange(len(self.catalogue), dtype=np.int32), np.diff(self.offsets))

    def table(self) -> pa.Table:
        """As rows to store: item_id (dictionary), tick int64, state double[W] where there are slots; ``joined`` is the inverse."""
        columns = {
            "item_id": pa.DictionaryArray.from_arrays(pa.array(self.items()), self.catalogue.items.ids),
            "tick": pa.array(self.ticks),
        }
        if width := self.state.shape[1]:
            columns["state"] = pa.FixedSizeListArray.from_arrays(pa.array(self.state.ravel()), width)
        return pa.table(columns)

    @staticmethod
    def joined(tables: Sequence[pa.Table], spec: FeatureSpec, catalogue: Catalogue) -> ItemTimeline:
        """The timeline of the items of all tables, each item in one of them; ``ArtifactError`` if they do not fit spec and catalogue."""
        width = len(_slots(spec)[0])
        for table in tables:
            found = table.schema.field("state").type.list_size if "state" in table.column_names else 0
            if found != width:
                raise ArtifactError(
                    f"an item timeline of {found} slots does not fit the feature spec ({width} slots); build the features again"
                )
        codes = [_codes(table, catalogue) for table in tables]
        sizes = np.bincount(np.concatenate([np.empty(0, np.int32), *codes]), minlength=len(catalogue))
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        ticks, state = np.empty(offsets[-1], np.int64), np.empty((offsets[-1], width))
        for table, code in zip(tables, codes, strict=True):
            runs = np.flatnonzero(np.diff(code, prepend=-1))  # an item's rows lie together
            place = np.arange(len(code)) + np.repeat(offsets[code[runs]] - runs, np.diff(runs, append=len(code)))
            ticks[place] = np.asarray(table["tick"])
            if width:
                state[place] = np.asarray(table["state"].combine_chunks().flatten()).reshape(-1, width)
        return ItemTimeline(spec, catalogue, offsets, ticks, state)

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


def _codes(table: pa.Table, catalogue: Catalogue) -> Int32:
    """The item code of each stored row; ``ArtifactError`` for an item that the catalogue does not know."""
    ids = table["item_id"].combine_chunks()
    known = catalogue.items.encode(ids.dictionary)
    codes = known[np.asarray(ids.indices)]
    if (codes < 0).any():
        raise ArtifactError("an item timeline has items that its catalogue does not know; build the features again")
    return np.asarray(codes)


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
