"""User features from a log at any past moment: one segmented scan per key over the events of the users asked for.

The offline half of what ``states`` reads online, with the same fused states; tests/property/test_parity.py holds the two equal. It
works through the users in chunks whose contributions stay in the processor's cache, so its memory does not grow with the log.

Legend: B queries, N candidates (``offsets`` int64[B+1] says whose), W slots. Times are int64 microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from maple.data.dataset import Dataset, Int32, Int64, ragged_take
from maple.features.catalogue import Catalogue, EventColumns
from maple.features.fold import Float64, scan
from maple.features.marks import marked
from maple.features.spec import FeatureSpec
from maple.features.states import Columns, StateLayout, group_codes, user_features, user_item_features
from maple.features.view import Entity, Key

#: Events and candidates of the users that are read at once.
CHUNK = 1 << 14


class LogReader:
    """User features from a data set's log at any moments. A user code of -1 has no events, an item code of -1 is unknown."""

    def __init__(self, data: Dataset, spec: FeatureSpec, catalogue: Catalogue | None = None) -> None:
        self.data = data
        self.spec = spec
        self.catalogue = catalogue or Catalogue.of(data)
        self.layout = StateLayout(spec)
        assert len(self.catalogue) == len(data.items), "the catalogue and the data set must have the same item codes"

    def columns(self, users: Int32, now: Int64, offsets: Int64, items: Int32) -> tuple[Columns, Columns]:
        """Columns float32[B] of the queries' users and float32[N] of their candidates, from one pass over the events."""
        own: Columns = {name: np.empty(len(users), np.float32) for name in self.spec.feature_names(Entity.USER)}
        paired: Columns = {name: np.empty(len(items), np.float32) for name in self.spec.feature_names(Entity.USER_ITEM)}
        for queries in self._chunks(users, offsets):
            candidates, bounds = ragged_take(offsets, queries)
            found = self._read(users[queries].astype(np.int64), now[queries], bounds, items[candidates])
            for out, rows, columns in zip((own, paired), (queries, candidates), found, strict=True):
                for name, column in columns.items():
                    out[name][rows] = column
        return own, paired

    def _chunks(self, users: Int32, offsets: Int64) -> Iterator[Int64]:
        """The queries by user, in pieces of whole users."""
        order = np.argsort(users, kind="stable")
        heads = np.flatnonzero(np.diff(users[order], prepend=-2))
        if len(heads) == 0:
            return
        known = np.maximum(users[order][heads], 0)
        events = np.where(users[order][heads] < 0, 0, self.data.offsets[known + 1] - self.data.offsets[known])
        load = np.cumsum(events + np.add.reduceat(np.diff(offsets)[order] + 1, heads))
        yield from np.split(order, heads[1:][np.diff(load // CHUNK) > 0])

    def _read(self, users: Int64, now: Int64, offsets: Int64, items: Int32) -> tuple[Columns, Columns]:
        part = _Part.of(self, users)
        state, last = part.scan(Key.USER, users, now)
        rows = np.repeat(np.arange(len(users)), np.diff(offsets))
        listed = self.catalogue.take(items)
        codes, user, moment = group_codes(items, listed), users[rows], now[rows]
        own = user_features(self.layout, state, last, now)
        return own, user_item_features(self.layout, state, last, now, rows, listed, lambda key: part.match(key, user, moment, codes[key]))


@dataclass(frozen=True, eq=False)
class _Part:
    """The events of some users, sorted by (user, time, event order), and what keyed views group them by."""

    layout: StateLayout
    user: Int64
    events: EventColumns
    codes: dict[Key, Int32]

    @staticmethod
    def of(reader: LogReader, users: Int64) -> _Part:
        """The part of a reader's log that belongs to some users."""
        log, layout = reader.data.log, reader.layout
        rows, _ = ragged_take(reader.data.offsets, np.unique(users[users >= 0]))
        item, user = log.item[rows], log.user[rows].astype(np.int64)
        codes = group_codes(item, reader.catalogue.take(item))
        events = EventColumns.of(reader.catalogue, item, log.event[rows], log.time[rows], log.value[rows], log.price[rows])
        wanted = [mark for marks in layout.marks.values() for mark in marks]
        return _Part(layout, user, marked(events, wanted, user, codes, layout.half_life), codes)

    def scan(self, key: Key, asked: Int64, now: Int64, rows: Int64 | None = None, group: Int64 | None = None) -> tuple[Float64, Int64]:
        """The fused state of a key for each request (asked group, now). ``rows``: the events by (``group``, time); default: by user."""
        x = self.layout.contributions(key, self.events, self.codes)
        time = self.events.time
        if rows is not None:
            x, time = np.take(x.T, rows, axis=1).T, time[rows]  # slot by slot, as contributions lie
        order = np.lexsort((now, asked))
        state, last = scan(self.user if group is None else group, time, x, asked[order], now[order], *self.layout.folds[key])
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return state[back], last[back]

    def match(self, key: Key, user: Int64, now: Int64, asked: Int32) -> tuple[Float64, Int64]:
        """The keyed state of each candidate's user and code at its time, float64[N, W]; empty where the user has none."""
        codes = self.codes[key]
        span = np.int64(max(codes.max(initial=0), asked.max(initial=0))) + 1
        keep = np.flatnonzero(codes >= 0)
        group = self.user[keep] * span + codes[keep]
        order = np.argsort(group, kind="stable")
        wanted = np.where((asked >= 0) & (user >= 0), user * span + asked, -1)
        # only candidates whose key has events are scanned; the last row of the result stands for the others
        index = np.flatnonzero(np.isin(wanted, group))
        found, found_last = self.scan(key, wanted[index], now[index], keep[order], group[order])
        none, never = self.layout.empty(key, 1)
        back = np.full(len(wanted), len(index), np.int64)
        back[index] = np.arange(len(index))
        return np.concatenate([found, none])[back], np.concatenate([found_last, never])[back]
