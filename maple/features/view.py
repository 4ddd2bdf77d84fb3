"""What a view is: slots, what an event contributes to them, and how features are read from them.

A view is written once. Its slots are folded by the compiled step of ``fold`` offline and online; ``contribute`` and ``read``
are vectorised numpy and also the same code on both sides. The views are in ``user_views`` and ``item_views``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import ClassVar

import numpy as np

from maple.data.dataset import Bool, Float32, Int8, Int64
from maple.features.catalogue import EventColumns, ItemColumns, Mark
from maple.features.fold import DAY, NEVER, Float64, Slot, decay, initial, layout


class Key(StrEnum):
    """What a view keeps one state for."""

    USER = "user"
    USER_ITEM = "user_item"
    USER_CATEGORY = "user_category"
    USER_BRAND = "user_brand"
    ITEM = "item"  # on ticks


class Entity(StrEnum):
    """What a view's features are aligned with, and the first part of their names."""

    USER = "user"
    USER_ITEM = "user_item"
    ITEM = "item"


@dataclass(frozen=True, eq=False)
class ReadContext:
    """M states as they are before ``now``. ``total`` is the user's fold over all keys (views with ``uses_total``).

    A key without events has sums 0, other slots NaN and ``last`` NEVER. ``item`` holds the catalogue columns of the rows' items.
    """

    half_lives: Float64  # [W] microseconds
    state: Float64  # [M, W]
    last: Int64  # [M] microseconds
    now: Int64  # [M] microseconds
    total: Float64 | None = None
    total_last: Int64 | None = None
    item: ItemColumns | None = None
    _factors: dict[tuple[bool, float], Float64] = field(default_factory=dict)

    def value(self, slot: int) -> Float64:
        """A slot as it is stored."""
        return np.asarray(self.state[:, slot])

    def now_value(self, slot: int) -> Float64:
        """A sum decayed to now."""
        return np.asarray(self.state[:, slot] * self._factor(self.last, slot, False))

    def now_total(self, slot: int) -> Float64:
        """The user's total of a sum, decayed to now."""
        assert self.total is not None, "the view did not ask for totals"
        assert self.total_last is not None, "totals come with their times"
        return np.asarray(self.total[:, slot] * self._factor(self.total_last, slot, True))

    def days_since(self, slot: int) -> Float64:
        """Days from a slot that holds a time to now; NaN where it holds none, never negative."""
        return np.maximum(self.now - self.state[:, slot], 0.0) / DAY

    def _factor(self, last: Int64, slot: int, of_total: bool) -> Float64:
        half_life = float(self.half_lives[slot])
        if (of_total, half_life) not in self._factors:
            age = np.where(last == NEVER, 0, self.now - np.where(last == NEVER, 0, last))
            self._factors[of_total, half_life] = decay(age, half_life)
        return self._factors[of_total, half_life]


@dataclass(frozen=True)
class Feature:
    """What one number of a view says: its meaning, unit, and the half-life in days of what it counts (None = nothing fades)."""

    meaning: str
    unit: str
    half_life: float | None = None


class View(ABC):
    """A few related features folded from events. Instances are immutable; ``half_lives`` are in days, ascending."""

    name: ClassVar[str]
    doc: ClassVar[str]
    key: ClassVar[Key]
    entity: ClassVar[Entity]
    uses_total: ClassVar[bool] = False
    marks: ClassVar[tuple[Mark, ...]] = ()  # what its contributions need of each event; views of the user alone may

    def __init__(self, half_lives: tuple[float, ...]) -> None:
        self.half_lives = half_lives

    @property
    def short(self) -> float:
        """The middle half-life: what is current."""
        return self.half_lives[len(self.half_lives) // 2]

    @property
    def long(self) -> float:
        """The longest half-life: what is lasting."""
        return self.half_lives[-1]

    @property
    @abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """The W numbers of a state."""

    @property
    @abstractmethod
    def features(self) -> Mapping[str, Feature]:
        """Short name -> what it says, of every feature, in the order of ``read``."""

    @abstractmethod
    def contribute(self, events: EventColumns) -> Float64:
        """What N events put into the slots, float64[N, W]; NaN leaves a slot as it is."""

    @abstractmethod
    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        """The features of M states, one float64[M] each, in the order of ``features``."""

    @cached_property
    def layout(self) -> tuple[Int8, Float64]:
        """Ops and half-lives of the slots, as the fold takes them."""
        return layout(self.slots)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Full names of the features."""
        return tuple(f"{self.entity}.{self.name}.{feature}" for feature in self.features)

    def columns(self, ctx: ReadContext) -> dict[str, Float32]:
        """``read`` by full name as float32."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = self.read(ctx)
        assert len(values) == len(self.names), f"view {self.name} reads {len(values)} features and names {len(self.names)}"
        return {name: np.asarray(value, dtype=np.float32) for name, value in zip(self.names, values, strict=True)}

    def empty(self, rows: int) -> tuple[Float64, Int64]:
        """States of keys without events."""
        return initial(self.layout[0], rows)


# -- what contributions and reads are made of --------------------------------------------------------------------------


def put(events: EventColumns, *columns: tuple[Bool, Float64 | Int64 | float]) -> Float64:
    """Contributions from (which events, what) per slot."""
    out = np.full((len(columns), len(events)), np.nan)
    for slot, (rows, what) in enumerate(columns):
        np.copyto(out[slot], what, where=rows)
    return out.T  # each slot lies together: that is written fast, and folded as fast


def per(total: Float64, count: Float64) -> Float64:
    """total / count, NaN where there is nothing to divide by."""
    return np.where(count > 1e-9, total / np.maximum(count, 1e-9), np.nan)


def spread(count: Float64, total: Float64, squares: Float64) -> Float64:
    """Standard deviation from sums, NaN without any."""
    mean = per(total, count)
    return np.sqrt(np.maximum(per(squares, count) - mean * mean, 0.0))


def days(value: float) -> str:
    """A half-life in a feature's name: 7 -> 7d, 0.5 -> 12h."""
    return f"{value:g}d" if value >= 1 else f"{value * 24:g}h"
