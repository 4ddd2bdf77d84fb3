"""User features from a log at any past moment: segmented scans over the events of the users asked for.

The offline half of what ``states`` reads online; tests/property/test_parity.py holds the two equal.

Legend: B queries, N candidates (``offsets`` int64[B+1] says whose), W slots. Times are int64 microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from maple.data.dataset import Dataset, Float32, Int8, Int32, Int64
from maple.features.catalogue import Catalogue, EventColumns
from maple.features.fold import Float64, scan
from maple.features.marks import marked
from maple.features.spec import FeatureSpec
from maple.features.states import group_codes, group_total
from maple.features.view import Entity, Key, ReadContext, View


class LogReader:
    """User features from a data set's log at any moments: one segmented scan per view over the users asked for."""

    def __init__(self, data: Dataset, spec: FeatureSpec, catalogue: Catalogue | None = None) -> None:
        self.data = data
        self.spec = spec
        self.catalogue = catalogue or Catalogue.of(data)
        assert len(self.catalogue) == len(data.items), "the catalogue and the data set must have the same item codes"

    def user_columns(self, users: Int32, now: Int64) -> dict[str, Float32]:
        """Columns float32[B]; a user code of -1 has no events."""
        part = self._select(users)
        out: dict[str, Float32] = {}
        for view in self.spec.of(Entity.USER):
            state, last = part.scan(view, part.user, np.asarray(users, np.int64), now)
            out |= view.columns(ReadContext(view.layout[1], state, last, now))
        return out

    def user_item_columns(self, users: Int32, now: Int64, offsets: Int64, items: Int32) -> dict[str, Float32]:
        """Columns float32[N]; -1 is an item or user that nothing is known of."""
        part = self._select(users)
        user = np.asarray(users, np.int64)
        rows = np.repeat(np.arange(len(users)), np.diff(offsets))
        own = self.catalogue.take(items)
        moment = now[rows]
        out: dict[str, Float32] = {}
        groups: dict[Key, tuple[_Part, Int64, Int64, Int64]] = {}
        for view in self.spec.of(Entity.USER_ITEM):
            if view.key == Key.USER:
                state, last = part.scan(view, part.user, user, now)
                out |= view.columns(ReadContext(view.layout[1], state[rows], last[rows], moment, item=own))
                continue
            codes = part.codes[view.key]
            if view.key not in groups:
                groups[view.key] = self._group(part, codes, user[rows], group_codes(items, own)[view.key], rows)
            keyed, group, asked, back = groups[view.key]
            # only requests whose key has events are scanned, each once; the last row of the result stands for the others
            found, found_last = keyed.scan(view, group, asked[0], now[asked[1]])
            none, never = view.empty(1)
            state, last = np.concatenate([found, none])[back], np.concatenate([found_last, never])[back]
            total = total_last = None
            if view.uses_total:
                sums, sums_last = part.scan(view, part.user, user, now, codes)
                total, total_last = sums[rows], sums_last[rows]
            out |= view.columns(ReadContext(view.layout[1], state, last, moment, total, total_last, own))
        return out

    def _select(self, users: Int32) -> _Part:
        log = self.data.log
        flag = np.zeros(len(self.data.users) + 1, bool)
        flag[users] = True  # -1 sets the spare last one
        keep = np.flatnonzero(flag[log.user])
        whole = _Part(self.catalogue, log.user.astype(np.int64), log.item, log.event, log.time, log.value, log.price)
        return whole if len(keep) == len(log) else whole.take(keep)

    @staticmethod
    def _group(part: _Part, codes: Int32, user: Int64, asked: Int32, rows: Int64) -> tuple[_Part, Int64, Any, Int64]:
        """The events by (user, group), their group keys, the distinct requests that have events as (key, query), and where each candidate
        finds its request (the end where it has none)."""
        span = np.int64(max(codes.max(initial=0), asked.max(initial=0))) + 1
        keep = np.flatnonzero(codes >= 0)
        key = part.user[keep] * span + codes[keep]
        order = np.argsort(key, kind="stable")
        key = key[order]
        wanted = np.where((asked >= 0) & (user >= 0), user * span + asked, -1)
        at = np.searchsorted(key, wanted)
        hit = np.zeros(len(wanted), bool) if len(key) == 0 else (wanted >= 0) & (key[np.minimum(at, len(key) - 1)] == wanted)
        index = np.flatnonzero(hit)
        distinct, inverse = np.unique(rows[index] * span + asked[index], return_inverse=True)
        query = distinct // span
        first = np.empty(len(distinct), np.int64)
        first[inverse] = wanted[index]
        back = np.full(len(wanted), len(distinct), np.int64)
        back[index] = inverse
        return part.take(keep[order]), key, (first, query), back


@dataclass(frozen=True, eq=False)
class _Part:
    """Events of some users, sorted by (group, time, event order) for the group that a scan is given."""

    catalogue: Catalogue
    user: Int64
    item: Int32
    event: Int8
    time: Int64
    value: Float32
    price: Float32

    @cached_property
    def columns(self) -> EventColumns:
        return EventColumns.of(self.catalogue, self.item, self.event, self.time, self.value, self.price)

    @cached_property
    def codes(self) -> dict[Key, Int32]:
        """What keyed views group the events by."""
        return group_codes(self.item, self.catalogue.take(self.item))

    def take(self, rows: npt.NDArray[Any]) -> _Part:
        return _Part(
            self.catalogue, self.user[rows], self.item[rows], self.event[rows], self.time[rows], self.value[rows], self.price[rows]
        )  # fmt: skip

    def scan(self, view: View, group: Int64, asked: Int64, now: Int64, codes: Int32 | None = None) -> tuple[Float64, Int64]:
        """The view's state for each request (asked group, now); with ``codes`` the fold of a total."""
        events = marked(self.columns, view.marks, self.user, self.codes, view.long) if view.marks else self.columns
        x = view.contribute(events)
        if codes is not None:
            x = group_total(codes, x)
        order = np.lexsort((now, asked))
        state, last = scan(group, self.time, x, asked[order], now[order], *view.layout)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return state[back], last[back]
