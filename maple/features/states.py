"""User states and the two readers of user features: from the log at any past moment, and from folded states at request time.

Both hand the same states to the same ``read`` of every view; the property test in tests/property/test_parity.py holds them equal.

Legend: B queries, N candidates (``offsets`` int64[B+1] says whose), K keys, W slots. Times are int64 microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from maple.data.dataset import Dataset, Float32, Int8, Int32, Int64
from maple.features.catalogue import Catalogue, EventColumns, ItemColumns
from maple.features.fold import DAY, NEVER, Float64, Slot, initial, layout, scan
from maple.features.spec import CONTEXT_FEATURES, FeatureSpec
from maple.features.user_views import MONDAY, WEEK, angle
from maple.features.view import Entity, Key, ReadContext, View

#: The keys below a user that states are kept by, and that candidates are matched to.
KEYED: tuple[Key, ...] = (Key.USER_ITEM, Key.USER_CATEGORY, Key.USER_BRAND)


@dataclass(frozen=True, eq=False)
class Keyed:
    """States by string id: ``state`` float64[K, W] over the slots of all views with this key, ``last`` int64[K]."""

    ids: tuple[str, ...]
    state: Float64
    last: Int64

    @cached_property
    def index(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.ids)}


@dataclass(frozen=True, eq=False)
class UserState:
    """One user as the online store knows them: the last events, oldest first, and the folded states. String ids throughout."""

    user: str
    items: tuple[str, ...]
    events: Int8
    times: Int64
    values: Float32
    prices: Float32
    size: int  # events folded, which may be more than are kept above
    tail: tuple[int, str]  # (time, event id) of the last event folded
    keyed: Mapping[Key, Keyed]  # Key.USER has exactly one row; the rest one per item, category, brand met


class StateLayout:
    """Where each view's slots lie in the fused state of its key; totals of keyed views lie in the user's."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.parts: dict[Key, tuple[View, ...]] = {Key.USER: spec.keyed(Key.USER), **{key: spec.keyed(key) for key in KEYED}}
        self.totals = tuple(view for key in KEYED for view in spec.keyed(key) if view.uses_total)
        self.places: dict[View, slice] = {}
        self.total_places: dict[View, slice] = {}
        self.folds: dict[Key, tuple[Int8, Float64]] = {}
        for key, views in self.parts.items():
            slots: list[Slot] = []
            for view in views:
                self.places[view] = slice(len(slots), len(slots) + len(view.slots))
                slots += view.slots
            if key == Key.USER:
                for view in self.totals:
                    self.total_places[view] = slice(len(slots), len(slots) + len(view.slots))
                    slots += view.slots
            self.folds[key] = layout(slots)

    def empty(self, key: Key, rows: int) -> tuple[Float64, Int64]:
        """States of keys without events."""
        return initial(self.folds[key][0], rows)


def empty_state(user: str, layout_: StateLayout) -> UserState:
    """A user without events."""
    keyed = {key: Keyed(("",) if key == Key.USER else (), *layout_.empty(key, int(key == Key.USER))) for key in layout_.parts}
    none = np.empty(0, np.float32)
    return UserState(user, (), np.empty(0, np.int8), np.empty(0, np.int64), none, none, 0, (NEVER, ""), keyed)


def group_codes(key: Key, items: Int32, columns: ItemColumns) -> Int32:
    """The code that a keyed view of the user groups these items by; -1 = none."""
    return {Key.USER_ITEM: items, Key.USER_CATEGORY: columns.category, Key.USER_BRAND: columns.brand}[key]


def group_total(key: Key, codes: Int32, x: Float64) -> Float64:
    """Contributions to a keyed view's total: what has no key adds nothing. A copy."""
    return np.where((codes >= 0)[:, None], x, np.nan)


class Reader(Protocol):
    """Gives user and user-item features of B queries; ``users`` are codes or states, as the reader takes them."""

    spec: FeatureSpec
    catalogue: Catalogue

    def user_columns(self, users: Any, now: Int64) -> dict[str, Float32]:
        """Columns float32[B] of the users' own features, each strictly before its ``now``."""

    def user_item_columns(self, users: Any, now: Int64, offsets: Int64, items: Int32) -> dict[str, Float32]:
        """Columns float32[N] of each candidate with its query's user."""


class ItemColumnsReader(Protocol):
    """Gives item features: ``ticks.ItemReader`` offline, ``ticks.StoredItems`` in a bundle."""

    def item_columns(self, items: Int32, now: Int64) -> dict[str, Float32]:
        """Columns float32[N] of items int32[N] at times int64[N]."""


def context_columns(now: Int64) -> dict[str, Float32]:
    """Hour of day and weekday of requests as points on a circle, float32[B] (UTC)."""
    hour, weekday = angle(now, DAY), angle(now, WEEK, MONDAY)
    values = (np.cos(hour), np.sin(hour), np.cos(weekday), np.sin(weekday))
    return {name: np.asarray(value, np.float32) for name, value in zip(CONTEXT_FEATURES, values, strict=True)}


def hydrate(reader: Reader, item_reader: ItemColumnsReader, users: Any, now: Int64, offsets: Int64, items: Int32) -> dict[str, Float32]:
    """All feature columns of ragged candidates, float32[N] each, in the order of ``spec.columns``."""
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    out = {name: column[rows] for name, column in (context_columns(now) | reader.user_columns(users, now)).items()}
    return out | reader.user_item_columns(users, now, offsets, items) | item_reader.item_columns(items, now[rows])


# -- offline: any user at any moment, from the log ---------------------------------------------------------------------


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
        columns, own = self.catalogue.take(part.item), self.catalogue.take(items)
        moment = now[rows]
        out: dict[str, Float32] = {}
        groups: dict[Key, tuple[_Part, Int64, Int64, Int64]] = {}
        for view in self.spec.of(Entity.USER_ITEM):
            if view.key == Key.USER:
                state, last = part.scan(view, part.user, user, now)
                out |= view.columns(ReadContext(view.layout[1], state[rows], last[rows], moment, item=own))
                continue
            codes = group_codes(view.key, part.item, columns)
            if view.key not in groups:
                groups[view.key] = self._group(part, codes, user[rows], group_codes(view.key, items, own), rows)
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

    def take(self, rows: npt.NDArray[Any]) -> _Part:
        return _Part(
            self.catalogue, self.user[rows], self.item[rows], self.event[rows], self.time[rows], self.value[rows], self.price[rows]
        )  # fmt: skip

    def scan(self, view: View, group: Int64, asked: Int64, now: Int64, codes: Int32 | None = None) -> tuple[Float64, Int64]:
        """The view's state for each request (asked group, now); with ``codes`` the fold of a total."""
        x = view.contribute(self.columns)
        if codes is not None:
            x = group_total(view.key, codes, x)
        order = np.lexsort((now, asked))
        state, last = scan(group, self.time, x, asked[order], now[order], *view.layout)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return state[back], last[back]


# -- online: the users of a request, from their folded states ----------------------------------------------------------


class StateReader:
    """User features from folded states: of all events that a state holds. A ``now`` before its last event reads it as of that event."""

    def __init__(self, spec: FeatureSpec, catalogue: Catalogue) -> None:
        self.spec = spec
        self.catalogue = catalogue
        self.layout = StateLayout(spec)
        self._vocabs = {Key.USER_ITEM: catalogue.items, Key.USER_CATEGORY: catalogue.categories, Key.USER_BRAND: catalogue.brands}

    def user_columns(self, users: Sequence[UserState], now: Int64) -> dict[str, Float32]:
        """Columns float32[B]."""
        state, last = self._users(users)
        out: dict[str, Float32] = {}
        for view in self.spec.of(Entity.USER):
            out |= view.columns(ReadContext(view.layout[1], state[:, self.layout.places[view]], last, now))
        return out

    def user_item_columns(self, users: Sequence[UserState], now: Int64, offsets: Int64, items: Int32) -> dict[str, Float32]:
        """Columns float32[N]; -1 is an item that nothing is known of."""
        rows = np.repeat(np.arange(len(users)), np.diff(offsets))
        user_state, user_last = self._users(users)
        own = self.catalogue.take(items)
        moment, last_of_user = now[rows], user_last[rows]
        matched: dict[Key, tuple[Float64, Int64]] = {}
        out: dict[str, Float32] = {}
        for view in self.spec.of(Entity.USER_ITEM):
            place, half_lives = self.layout.places[view], view.layout[1]
            if view.key == Key.USER:
                out |= view.columns(ReadContext(half_lives, user_state[:, place][rows], last_of_user, moment, item=own))
                continue
            if view.key not in matched:
                matched[view.key] = self._match(view.key, users, rows, group_codes(view.key, items, own))
            state, last = matched[view.key]
            total = total_last = None
            if view.uses_total:
                total, total_last = user_state[:, self.layout.total_places[view]][rows], last_of_user
            out |= view.columns(ReadContext(half_lives, state[:, place], last, moment, total, total_last, own))
        return out

    def _users(self, users: Sequence[UserState]) -> tuple[Float64, Int64]:
        if not users:
            return self.layout.empty(Key.USER, 0)
        parts = [user.keyed[Key.USER] for user in users]
        return np.concatenate([part.state for part in parts]), np.concatenate([part.last for part in parts])

    def _match(self, key: Key, users: Sequence[UserState], rows: Int64, codes: Int32) -> tuple[Float64, Int64]:
        """The keyed state of each candidate, empty where the user has none."""
        parts = [user.keyed[key] for user in users]
        vocab = self._vocabs[key]
        span = np.int64(len(vocab) + 1)
        held = vocab.encode([text for part in parts for text in part.ids])
        holder = np.repeat(np.arange(len(parts)), [len(part.ids) for part in parts])
        known = np.where(held >= 0, holder * span + held, -1)
        empty, never = self.layout.empty(key, 1)
        state = np.concatenate([*(part.state for part in parts), empty])
        last = np.concatenate([*(part.last for part in parts), never])
        order = np.argsort(known, kind="stable")
        wanted = np.where(codes >= 0, rows * span + codes, -2)
        at = np.searchsorted(known, wanted, sorter=order)
        index = np.append(order, len(known))[at]
        index = np.where(np.append(known, -1)[index] == wanted, index, len(known))
        return state[index], last[index]
