"""One global cut in time: what a model may learn from, what is tuned on, and what is tested on. Other splits are in ``folds``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from maple.config import Section
from maple.data.dataset import Dataset, Int64
from maple.errors import DataError
from maple.schema import TIMESTAMP

DAY = 86_400_000_000  # microseconds


class TimeSplit(Section):
    """Where to cut: shares of the target events in time order (test is the rest), or two ISO times, UTC where they name no zone."""

    kind: Literal["time"] = "time"
    train: float = Field(default=0.8, gt=0, lt=1)
    valid: float = Field(default=0.1, gt=0, lt=1)
    t1: str | None = None
    t2: str | None = None
    gap_days: float = Field(default=0.0, ge=0)
    """Of the events after each cut so many days are neither asked for nor learned as labels: what takes time to be known."""

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
    """Two times and a gap in microseconds: train < t1, t1 + gap <= valid < t2, t2 + gap <= test.

    Models know what was before a cut and are asked at the cut; what they are asked for comes a gap later.
    """

    t1: int
    t2: int
    gap: int = 0

    @property
    def valid_start(self) -> int:
        """The first time of the validation part."""
        return self.t1 + self.gap

    @property
    def test_start(self) -> int:
        """The first time of the test part."""
        return self.t2 + self.gap

    def train(self, data: Dataset) -> Dataset:
        """Events strictly before t1."""
        return data.before(self.t1)

    def valid(self, data: Dataset) -> Dataset:
        """Events in [t1 + gap, t2)."""
        return data.between(self.valid_start, self.t2)

    def known(self, data: Dataset) -> Dataset:
        """Everything before the test part's cut: events strictly before t2."""
        return data.before(self.t2)

    def test(self, data: Dataset) -> Dataset:
        """Events from t2 + gap on."""
        return data.where(data.log.time >= self.test_start)

    def plain(self) -> dict[str, int]:
        """JSON-ready, the inverse of ``of``."""
        return {"t1": self.t1, "t2": self.t2, "gap": self.gap}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Boundaries:
        """From what ``plain`` gave, also where it stands among other things."""
        return Boundaries(int(plain["t1"]), int(plain["t2"]), int(plain.get("gap", 0)))


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
        t1, t2 = moment(split.t1), moment(split.t2)
    else:
        first = min(int(split.train * len(ordered)), len(ordered) - 1)
        second = min(int((split.train + split.valid) * len(ordered)), len(ordered) - 1)
        t1, t2 = int(ordered[first]), int(ordered[second])
    cut = Boundaries(t1, t2, round(split.gap_days * DAY))
    train, valid, last, test = np.searchsorted(ordered, [cut.t1, cut.valid_start, cut.t2, cut.test_start]).tolist()
    sizes = (train, last - valid, len(ordered) - test)
    for name, size in zip(("train", "valid", "test"), sizes, strict=True):
        if size <= 0:
            span = f"{pa.scalar(int(ordered[0]), TIMESTAMP)} to {pa.scalar(int(ordered[-1]), TIMESTAMP)}"
            raise DataError(
                f"the {name} part of the time split is empty: {len(ordered):,} target events at {len(np.unique(ordered)):,} instants, "
                f"{span}{f', with a gap of {split.gap_days:g} days' if cut.gap else ''}. "
                "Choose other shares, give t1 and t2, or use more data."
            )
    return cut


def split_of(data: Dataset, split: TimeSplit | None = None) -> Boundaries:
    """The cut for a dataset, by the times of its target events."""
    return boundaries(data.log.time[np.isin(data.log.event, data.targets)], split)
