"""One global cut in time: what a model may learn from, what is tuned on, and what is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from maple.config import Section
from maple.data.dataset import Dataset, Int64
from maple.errors import DataError
from maple.schema import TIMESTAMP


class TimeSplit(Section):
    """Where to cut: shares of the target events in time order (test is the rest), or two ISO times, UTC where they name no zone."""

    train: float = Field(default=0.8, gt=0, lt=1)
    valid: float = Field(default=0.1, gt=0, lt=1)
    t1: str | None = None
    t2: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.t1 is None) != (self.t2 is None):
            raise ValueError("give both t1 and t2, or neither")
        if self.t1 is not None and self.t2 is not None:
            if moment(self.t1) >= moment(self.t2):
                raise ValueError(f"t1 {self.t1} must be before t2 {self.t2}")
        elif self.train + self.valid >= 1:
            raise ValueError("train + valid must leave a share for the test part")
        return self


@dataclass(frozen=True)
class Boundaries:
    """Two times in microseconds: train < t1 <= valid < t2 <= test."""

    t1: int
    t2: int

    def train(self, data: Dataset) -> Dataset:
        """Events strictly before t1."""
        return data.before(self.t1)

    def valid(self, data: Dataset) -> Dataset:
        """Events in [t1, t2)."""
        return data.between(self.t1, self.t2)

    def known(self, data: Dataset) -> Dataset:
        """Everything before the test part: events strictly before t2."""
        return data.before(self.t2)

    def test(self, data: Dataset) -> Dataset:
        """Events from t2 on."""
        return data.where(data.log.time >= self.t2)


def moment(text: str) -> int:
    """An ISO time as microseconds since 1970; ``ValueError`` where it is none."""
    for kind in (pa.timestamp("us"), TIMESTAMP):
        try:
            return int(pa.scalar(text).cast(kind).cast(pa.int64()).as_py())
        except pa.ArrowInvalid:
            continue
    raise ValueError(f"{text!r} is not an ISO time such as 2011-10-10 or 2011-10-10T00:00:00Z")


def boundaries(times: Int64, split: TimeSplit | None = None) -> Boundaries:
    """The cut for the times (microseconds, any order) of target events.

    Events at one instant (a basket, or a day's import) are never parted: all of an instant go to the later part. ``DataError`` where a
    part would be empty.
    """
    split = split or TimeSplit()
    ordered = np.sort(np.asarray(times))
    if len(ordered) == 0:
        raise DataError("there are no target events to split; check `targets:` of the source")
    if split.t1 is not None and split.t2 is not None:
        cut = Boundaries(moment(split.t1), moment(split.t2))
    else:
        first = min(int(split.train * len(ordered)), len(ordered) - 1)
        second = min(int((split.train + split.valid) * len(ordered)), len(ordered) - 1)
        cut = Boundaries(int(ordered[first]), int(ordered[second]))
    edges = np.searchsorted(ordered, [cut.t1, cut.t2])
    sizes = (edges[0], edges[1] - edges[0], len(ordered) - edges[1])
    for name, size in zip(("train", "valid", "test"), sizes, strict=True):
        if size <= 0:
            span = f"{pa.scalar(int(ordered[0]), TIMESTAMP)} to {pa.scalar(int(ordered[-1]), TIMESTAMP)}"
            raise DataError(
                f"the {name} part of the time split is empty: {len(ordered):,} target events at {len(np.unique(ordered)):,} instants, "
                f"{span}. Choose other shares, give t1 and t2, or use more data."
            )
    return cut


def split_of(data: Dataset, split: TimeSplit | None = None) -> Boundaries:
    """The cut for a dataset, by the times of its target events."""
    return boundaries(data.log.time[np.isin(data.log.event, data.targets)], split)
