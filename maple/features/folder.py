"""Folds events into user states, many users at once, and packs states as bytes: what both online stores share.

A packed state carries what it was folded under (the digest of spec and catalogue), its user and the revision of the user's log,
and a checksum; ``unpack`` gives None for anything that is not exactly what was asked for, and the store folds from the log again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgpack
import numpy as np

from maple.data.dataset import Float32, Int8, Int32, Int64
from maple.features.catalogue import Catalogue, EventColumns, Mark
from maple.features.fold import Float64, fold
from maple.features.spec import FeatureSpec
from maple.features.states import KEYED, Keyed, StateLayout, UserState, empty_state, group_codes
from maple.features.view import Key


@dataclass(frozen=True, eq=False)
class Rows:
    """Events of U users, flat: ``offsets`` int64[U+1] says whose; each user's are sorted by (time, event id)."""

    offsets: Int64
    ids: Sequence[str]
    items: Sequence[str]
    events: Int8
    times: Int64
    values: Float32
    prices: Float32

    def __len__(self) -> int:
        return len(self.times)


class Folder:
    """Folds under one spec and catalogue. Immutable and safe to share between threads."""

    def __init__(self, spec: FeatureSpec, catalogue: Catalogue) -> None:
        self.spec = spec
        self.catalogue = catalogue = catalogue.folding
        self.layout = StateLayout(spec)
        self.digest = spec.state_digest(catalogue)
        # the code -1 finds the None at the end
        self._labels: dict[Key, list[str | None]] = {
            Key.USER_CATEGORY: [*catalogue.categories.ids.to_pylist(), None],
            Key.USER_BRAND: [*catalogue.brands.ids.to_pylist(), None],
        }

    def empty(self, user: str) -> UserState:
        """A user without events."""
        return empty_state(user, self.layout)

    def advance(self, states: Sequence[UserState], new: Rows) -> list[UserState]:
        """The states after further events; user u's new events are all later than ``states[u].tail``."""
        items = self.catalogue.items.encode(new.items)
        codes = group_codes(items, self.catalogue.take(items))
        events = EventColumns.of(self.catalogue, items, new.events, new.times, new.values, new.prices)
        user = np.repeat(np.arange(len(states)), np.diff(new.offsets))
        keyed: dict[Key, list[Keyed]] = {}
        marks: dict[Mark, Float64] = {}
        for key in (*KEYED, Key.USER):  # what is kept below the user marks the events for the views of the user
            names = self._names(key, new, codes)
            x = self.layout.contributions(key, replace(events, marks=marks), codes)
            keyed[key], seen = self._fold(key, [state.keyed[key] for state in states], user, names, new.times, x)
            marks |= {mark: seen[:, column] for column, mark in enumerate(self.layout.marks[key])}
        return [self._user(state, u, new, {key: kept[u] for key, kept in keyed.items()}) for u, state in enumerate(states)]

    def _names(self, key: Key, new: Rows, codes: Mapping[Key, Int32]) -> Sequence[str | None]:
        """The string id of each event's group; None where it has none. An item that the catalogue does not know has its own id only."""
        if key == Key.USER:
            return [""] * len(new)
        if key == Key.USER_ITEM:
            return new.items
        names = self._labels[key]
        return [names[code] for code in codes[key].tolist()]

    def _fold(
        self, key: Key, held: Sequence[Keyed], user: Int64, names: Sequence[str | None], times: Int64, x: Float64
    ) -> tuple[list[Keyed], Float64]:
        """The states of a key after the events, and the slots of its marks right after each event, float64[N, marks]; NaN without a key."""
        index: list[dict[str, int]] = [dict(part.index) for part in held]
        local = np.empty(len(user), np.int64)
        for n, (u, name) in enumerate(zip(user.tolist(), names, strict=True)):
            if name is None:
                local[n] = -1
            else:
                rows = index[u]
                local[n] = rows.setdefault(name, len(rows))
        starts = np.concatenate([[0], np.cumsum([len(rows) for rows in index])]).astype(np.int64)
        state, last = self.layout.empty(key, int(starts[-1]))
        for part, start in zip(held, starts, strict=False):
            state[start : start + len(part.ids)] = part.state
            last[start : start + len(part.ids)] = part.last
        known = local >= 0
        watched = self.layout.mark_places[key]
        seen = np.full((len(user), len(watched)), np.nan)
        seen[known] = fold((starts[user] + local)[known], times[known], x[known], *self.layout.folds[key], state, last, watched)
        # copies, so that a state kept in memory does not keep the whole batch
        kept = [Keyed(tuple(rows), state[a:b].copy(), last[a:b].copy()) for rows, a, b in zip(index, starts, starts[1:], strict=False)]
        return kept, seen

    def _user(self, old: UserState, u: int, new: Rows, keyed: dict[Key, Keyed]) -> UserState:
        a, b = int(new.offsets[u]), int(new.offsets[u + 1])
        if a == b:
            return old
        limit = self.spec.history_limit
        return replace(
            old, items=(*old.items, *new.items[a:b])[-limit:], events=np.concatenate([old.events, new.events[a:b]])[-limit:],
            times=np.concatenate([old.times, new.times[a:b]])[-limit:], values=np.concatenate([old.values, new.values[a:b]])[-limit:],
            prices=np.concatenate([old.prices, new.prices[a:b]])[-limit:], size=old.size + b - a,
            tail=(int(new.times[b - 1]), new.ids[b - 1]), keyed=keyed,
        )  # fmt: skip

    # -- bytes -------------------------------------------------------------------------------------------------------

    def pack(self, state: UserState, revision: str) -> bytes:
        """The state as bytes: CRC-32, then msgpack with raw little-endian arrays."""
        keyed = [(list(part.ids), part.state.astype("<f8").tobytes(), part.last.astype("<i8").tobytes()) for part in self._parts(state)]
        history = [state.events, state.times.astype("<i8"), state.values.astype("<f4"), state.prices.astype("<f4")]
        raw = [array.tobytes() for array in history]
        body: bytes = msgpack.packb([self.digest, state.user, revision, list(state.items), *raw, state.size, *state.tail, keyed])
        return zlib.crc32(body).to_bytes(4, "little") + body

    def unpack(self, data: bytes | None, user: str, revision: str) -> UserState | None:
        """The state of this user at this revision, or None if the bytes are missing, damaged, someone else's or of other features."""
        if not data or zlib.crc32(memoryview(data)[4:]).to_bytes(4, "little") != data[:4]:
            return None
        try:
            digest, owner, stated, items, events, times, values, prices, size, time, tail, keyed = msgpack.unpackb(memoryview(data)[4:])
            if (digest, owner, stated) != (self.digest, user, revision):
                return None
            parts = {
                key: Keyed(
                    tuple(ids), np.frombuffer(state, "<f8").reshape(len(ids), len(self.layout.folds[key][0])), np.frombuffer(last, "<i8")
                )
                for key, (ids, state, last) in zip((Key.USER, *KEYED), keyed, strict=True)
            }
            return UserState(
                user, tuple(items), np.frombuffer(events, np.int8), np.frombuffer(times, "<i8"),
                np.frombuffer(values, "<f4"), np.frombuffer(prices, "<f4"), size, (time, tail), parts,
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            return None

    @staticmethod
    def _parts(state: UserState) -> list[Keyed]:
        return [state.keyed[key] for key in (Key.USER, *KEYED)]
