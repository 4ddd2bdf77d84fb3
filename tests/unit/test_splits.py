"""The time cut: shares, ties, explicit times, empty parts, and that the test part is hidden."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from maple.data.dataset import Dataset
from maple.data.splits import Boundaries, TimeSplit, boundaries, moment, split_of
from maple.errors import ConfigError, DataError
from maple.schema import TIMESTAMP


def test_shares_of_distinct_times() -> None:
    times = np.random.default_rng(0).permutation(1_000)
    assert boundaries(times) == Boundaries(800, 900)
    assert boundaries(times, TimeSplit(train=0.5, valid=0.25)) == Boundaries(500, 750)


def test_an_instant_is_never_parted_and_goes_to_the_later_part() -> None:
    times = np.array([1] * 7 + [2] * 2 + [3])
    cut = boundaries(times, TimeSplit(train=0.75, valid=0.15))
    assert cut == Boundaries(2, 3)
    assert (times < cut.t1).sum() == 7


def test_empty_parts_and_no_times_are_data_errors() -> None:
    with pytest.raises(DataError, match="no target events"):
        boundaries(np.array([], np.int64))
    with pytest.raises(DataError, match="train part of the time split is empty"):
        boundaries(np.array([1] * 10))
    with pytest.raises(DataError, match="valid part of the time split is empty"):
        boundaries(np.array([1] * 5 + [2] * 5), TimeSplit(train=0.6, valid=0.2))
    with pytest.raises(DataError, match="test part of the time split is empty"):
        boundaries(np.array([0, moment("2024-01-02")]), TimeSplit(t1="2024-01-01", t2="2024-01-03"))


def test_explicit_times_and_wrong_settings() -> None:
    times = np.array([moment("2011-10-09"), moment("2011-10-10"), moment("2011-11-10T12:00:00Z")])
    assert boundaries(times, TimeSplit(t1="2011-10-10", t2="2011-11-10T12:00:00+00:00")) == Boundaries(times[1], times[2])
    for values in (
        {"t1": "2011-10-10"},
        {"t1": "2011-10-10", "t2": "2011-10-10"},
        {"t1": "soon", "t2": "2011-10-10"},
        {"train": 0.9, "valid": 0.1},
    ):
        with pytest.raises(ConfigError):
            TimeSplit.parse(values, "split")


def test_parts_of_a_dataset_are_disjoint_complete_and_in_time() -> None:
    count = 500
    draw = np.random.default_rng(1)
    events = pa.table(
        {
            "event_id": [str(number) for number in range(count)],
            "user_id": [f"u{number}" for number in draw.integers(20, size=count)],
            "item_id": [f"i{number}" for number in draw.integers(30, size=count)],
            "event": pa.array(np.where(draw.random(count) < 0.5, "view", "purchase")),
            "timestamp": pa.array(draw.integers(200, size=count)).cast(TIMESTAMP),
            "value": pa.nulls(count, pa.float32()),
            "price": pa.nulls(count, pa.float32()),
        }
    )
    data = Dataset.from_tables(events)
    cut = split_of(data)
    train, valid, known, test = cut.train(data), cut.valid(data), cut.known(data), cut.test(data)
    assert train.log.time.max() < cut.t1 <= valid.log.time.min()
    assert valid.log.time.max() < cut.t2 <= test.log.time.min()
    assert len(train.log) + len(valid.log) == len(known.log)
    assert len(known.log) + len(test.log) == count
    bought = data.log.time[np.isin(data.log.event, data.targets)]
    assert abs((bought < cut.t1).mean() - 0.8) < 0.03
    assert abs((bought < cut.t2).mean() - 0.9) < 0.03
