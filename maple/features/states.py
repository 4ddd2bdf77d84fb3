"""User states, and the reader of user features from folded states at request time.

``log_reader`` reads the same from the log; both hand the same states to the same ``read`` of every view, and
tests/property/test_parity.py holds them equal.

Legend: B queries, N candidates (``offsets`` int64[B+1] says whose), K keys, W slots. Times are int64 microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np

from maple.data.dataset import Float32, Int8, Int32, Int64
from maple.features.catalogue import Catalogue, EventColumns, ItemColumns, Mark
from maple.features.fold import DAY, NEVER, Float64, Slot, initial, layout
from maple.features.marks import MARK_KEYS, mark_contribution, mark_slot
from maple.features.spec import CONTEXT_FEATURES, FeatureSpec
from maple.features.user_views import MONDAY, WEEK, angle
from maple.features.view import Entity, Key, ReadContext, View

#: A value of a user's attribute; a list holds tags.
Attribute: TypeAlias = str | float | bool | Sequence[str] | None

Columns: TypeAlias = dict[str, Float32]
#: Fused states of a key for all candidates, float64[N, W], and their times.
KeyedStates: TypeAlias = Callable[[Key], tuple[Float64, Int64]]

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
    attributes: Mapping[str, Attribute] = field(default_factory=dict)  # columns of USERS, or what the user was described by since


class StateLayout:
    """Where each view's slots lie in the fused state of its key; totals of keyed views lie in the user's, marks behind the keyed views."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.half_life = spec.half_lives[-1]
        self.views: dict[Entity, tuple[View, ...]] = {entity: spec.of(entity) for entity in (Entity.USER, Entity.USER_ITEM)}
        self.parts: dict[Key, tuple[View, ...]] = {Key.USER: spec.keyed(Key.USER), **{key: spec.keyed(key) for key in KEYED}}
        self.totals = tuple(view for key in KEYED for view in spec.keyed(key) if view.uses_total)
        wanted = {mark for view in self.parts[Key.USER] for mark in view.marks}
        self.marks: dict[Key, tuple[Mark, ...]] = {key: tuple(m for m in Mark if m in wanted and MARK_KEYS[m] == key) for key in self.parts}
        self.mark_places: dict[Key, tuple[int, ...]] = {}
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
            self.mark_places[key] = tuple(range(len(slots), len(slots) + len(self.marks[key])))
            slots += [mark_slot(mark, self.half_life) for mark in self.marks[key]]
            self.folds[key] = layout(slots)

    def contributions(self, key: Key, events: EventColumns, codes: Mapping[Key, Int32]) -> Float64:
        """What N events put into the fused state of a key, float64[N, W]. ``codes``: their item, category and brand, -1 = none."""
        parts = [view.contribute(events) for view in self.parts[key]]
        if key == Key.USER:
            parts += [group_total(codes[view.key], view.contribute(events)) for view in self.totals]
        parts += [mark_contribution(mark, events)[:, None] for mark in self.marks[key]]
        return np.concatenate(parts, axis=1) if parts else np.empty((len(events), 0))

    def empty(self, key: Key, rows: int) -> tuple[Float64, Int64]:
        """States of keys without events."""
        return initial(self.folds[key][0], rows)


def empty_state(user: str, layout_: StateLayout) -> UserState:
    """A user without events."""
    keyed = {key: Keyed(("",) if key == Key.USER else (), *layout_.empty(key, int(key == Key.USER))) for key in layout_.parts}
    none = np.empty(0, np.float32)
    return UserState(user, (), np.empty(0, np.int8), np.empty(0, np.int64), none, none, 0, (NEVER, ""), keyed)


def group_codes(items: Int32, columns: ItemColumns) -> dict[Key, Int32]:
    """The codes that keyed views of the user group these items by; -1 = none."""
    return {Key.USER_ITEM: items, Key.USER_CATEGORY: columns.category, Key.USER_BRAND: columns.brand}


def group_total(codes: Int32, x: Float64) -> Float64:
    """Contributions to a keyed view's total: what has no key adds nothing. A copy."""
    return np.where((codes >= 0)[:, None], x, np.nan)


class Reader(Protocol):
    """Gives user and user-item features of B queries; ``users`` are codes or states, as the reader takes them."""

    spec: FeatureSpec
    catalogue: Catalogue

    def columns(self, users: Any, now: Int64, offsets: Int64, items: Int32) -> tuple[Columns, Columns]:
        """Columns float32[B] of the users' own features and float32[N] of each candidate with its query's user, strictly before ``now``.

        -1 is an item that nothing is known of.
        """


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
    own, paired = reader.columns(users, now, offsets, items)
    out = {name: column[rows] for name, column in (context_columns(now) | own).items()}
    return out | paired | item_reader.item_columns(items, now[rows])


def user_features(layout_: StateLayout, state: Float64, last: Int64, now: Int64) -> Columns:
    """The features of users from their fused states, columns float32[B]."""
    out: Columns = {}
    for view in layout_.views[Entity.USER]:
        out |= view.columns(ReadContext(view.layout[1], state[:, layout_.places[view]], last, now))
    return out


def user_item_features(
    layout_: StateLayout, state: Float64, last: Int64, now: Int64, rows: Int64, item: ItemColumns, keyed: KeyedStates
) -> Columns:
    """The features of candidates, columns float32[N]: from the fused states of B users at their moments ``now``, of which ``rows``
    int64[N] says whose a candidate is, and from what ``keyed`` finds of that user with the candidate's item, category or brand."""
    moment, last_of_user = now[rows], last[rows]
    found: dict[Key, tuple[Float64, Int64]] = {}
    out: Columns = {}
    for view in layout_.views[Entity.USER_ITEM]:
        place, half_lives = layout_.places[view], view.layout[1]
        if view.key == Key.USER:
            out |= view.columns(ReadContext(half_lives, state[:, place][rows], last_of_user, moment, item=item))
            continue
        if view.key not in found:
            found[view.key] = keyed(view.key)
        held, held_last = found[view.key]
        total = total_last = None
        if view.uses_total:
            total, total_last = state[:, layout_.total_places[view]][rows], last_of_user
        out |= view.columns(ReadContext(half_lives, held[:, place], held_last, moment, total, total_last, item))
    return out


# -- online: the users of a request, from their folded states ----------------------------------------------------------


class StateReader:
    """User features from folded states: of all events that a state holds. A ``now`` before its last event reads it as of that event."""

    def __init__(self, spec: FeatureSpec, catalogue: Catalogue) -> None:
        self.spec = spec
        self.catalogue = catalogue
        self.layout = StateLayout(spec)
        self._vocabs = {Key.USER_ITEM: catalogue.items, Key.USER_CATEGORY: catalogue.categories, Key.USER_BRAND: catalogue.brands}

    def columns(self, users: Sequence[UserState], now: Int64, offsets: Int64, items: Int32) -> tuple[Columns, Columns]:
        """Columns float32[B] and float32[N]; see ``Reader``."""
        state, last = self._users(users)
        rows = np.repeat(np.arange(len(users)), np.diff(offsets))
        listed = self.catalogue.take(items)
        codes = group_codes(items, listed)
        own = user_features(self.layout, state, last, now)
        paired = user_item_features(self.layout, state, last, now, rows, listed, lambda key: self._match(key, users, rows, codes[key]))
        return own, paired

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
