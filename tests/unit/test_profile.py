"""Profiles: known counts, the same to the last bit however rows are cut, estimates near the truth, drift that is there or not."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.data.drift import index, psi
from maple.data.profile import KEPT_VALUES, MAX_DAYS, ColumnProfile, Profile, bin_edges, log_bins
from maple.data.report import table_report
from maple.hashing import rng
from maple.schema import TIMESTAMP

DAY = 86_400_000_000


def table(**columns: Any) -> pa.Table:
    types = {"user_id": pa.string(), "timestamp": TIMESTAMP, "value": pa.float32(), "kind": pa.string(), "count": pa.int64()}
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})


def test_what_is_counted() -> None:
    found = Profile.of(
        table(
            user_id=["u", "u", "u", "v"],
            event_id=["1", "2", "3", "4"],
            kind=["a", "b", "a", None],
            value=[1.0, float("nan"), -3.0, None],
            timestamp=[0, DAY, DAY + 1, None],
            _row=[1, 2, 3, 4],
        )
    )
    assert (found.rows, found.users, set(found.columns)) == (4, 2, {"user_id", "event_id", "kind", "value", "timestamp"})
    assert found.per_user == {int(log_bins(np.array([1.0]))[0]): 1, int(log_bins(np.array([3.0]))[0]): 1}
    user, kind, value, time = (found.columns[name] for name in ("user_id", "kind", "value", "timestamp"))
    assert (user.kind, user.distinct, user.values, user.hashes) == ("identity", 2, {}, ())
    assert (kind.kind, kind.nulls, kind.distinct, kind.top()) == ("text", 1, 2, [("a", 2), ("b", 1)])
    assert (value.kind, value.nulls, value.low, value.high, value.values) == ("number", 2, -3.0, 1.0, {"-3": 1, "1": 1})
    assert (time.kind, time.nulls, time.low, time.high, time.bins) == ("time", 1, 0, DAY + 1, {0: 1, 1: 2})
    assert Profile.from_plain(json.loads(json.dumps(found.plain()))) == found
    assert Profile.of(table(user_id=[], value=[], timestamp=[], kind=[])).columns["value"].distinct == 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cut_and_shuffled_rows_give_the_same_profile(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 60))
    draw = rng(data.draw(st.integers(0, 10_000)), "rows")
    wide = data.draw(st.booleans())
    values = draw.choice(np.array([0.0, -0.0, 1.5, -2.25, np.nan, np.inf, 1e-30, 3e38]), size)
    rows = table(
        user_id=[f"u{number}" for number in draw.integers(0, 8, size)],
        kind=[None if draw.random() < 0.2 else f"k{number}" for number in draw.integers(0, 400 if wide else 3, size)],
        value=[None if draw.random() < 0.2 else float(value) for value in values],
        timestamp=(draw.integers(0, 10_000_000, size) * DAY).tolist() if wide else draw.integers(0, 3 * DAY, size).tolist(),
        count=draw.integers(-3, 10**12 if wide else 3, size).tolist(),
    )
    whole = Profile.of(rows.take(draw.permutation(size)))
    home = draw.integers(0, 4, 8)[[int(user[1:]) for user in rows["user_id"].to_pylist()]]
    parts = [Profile.of(rows.filter(pa.array(home == part))) for part in draw.permutation(4)]
    assert Profile.merge(parts) == whole
    assert Profile.merge([Profile.merge(parts[:2]), Profile.merge(parts[2:])]) == whole


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_lies_in_its_bin(value: float) -> None:
    low, high = bin_edges(int(log_bins(np.array([value]))[0]))
    assert low <= value <= high
    assert value == 0 or high - low <= abs(value) / 2 + 5e-324


def test_more_values_than_are_kept_are_estimated_and_not_shown() -> None:
    names = [f"name {number}" for number in range(20_000)]
    halves = [Profile.of(pa.table({"name": part})).columns["name"] for part in (names[:12_000], names[8_000:])]
    both = Profile.merge([Profile(0, 0, {"name": half}) for half in halves]).columns["name"]
    assert not both.complete
    assert both.values == {}
    assert len(both.hashes) == KEPT_VALUES
    assert abs(both.distinct - 20_000) < 3 * 20_000 / math.sqrt(KEPT_VALUES)
    exact = Profile.of(pa.table({"name": names[:KEPT_VALUES] * 2})).columns["name"]
    assert exact.distinct == KEPT_VALUES
    assert set(exact.values.values()) == {2}
    assert "name" not in json.dumps(both.plain()["values"])


def test_days_become_coarser_rather_than_more() -> None:
    days = Profile.of(table(timestamp=[day * DAY for day in range(3 * MAX_DAYS)])).columns["timestamp"]
    assert days.width == 4
    assert sum(days.bins.values()) == 3 * MAX_DAYS
    assert len(days.bins) <= MAX_DAYS


def test_types_that_differ_are_told_and_a_column_of_nulls_fits_any() -> None:
    parts = [Profile.of(pa.table({"x": column})) for column in (pa.array([1, 2]), pa.array(["1"]), pa.nulls(2))]
    assert Profile.merge(parts).columns["x"] == ColumnProfile("int64 | string", "other", 5, 2)
    mixed = Profile.merge([parts[2], parts[0]]).columns["x"]
    assert (mixed.type, mixed.kind, mixed.nulls, mixed.values) == ("int64", "number", 2, {"1": 1, "2": 1})


def test_quantiles_come_from_the_bins() -> None:
    values = np.sort(np.exp(rng(1, "values").normal(2.0, 1.0, 5_000)))
    column = Profile.of(pa.table({"x": values})).columns["x"]
    for share in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert column.quantile(share) == pytest.approx(np.quantile(values, share), rel=0.15)
    assert 1 <= column.magnitude(0.999) / np.quantile(values, 0.999) <= 1.3
    assert math.isnan(Profile.of(pa.table({"x": ["a"]})).columns["x"].quantile(0.5))


def test_psi_against_its_definition() -> None:
    before, after = np.array([50, 30, 20]), np.array([20, 30, 50])
    smooth = [(np.array(counts) + 0.5) / (100 + 1.5) for counts in (before, after)]
    wanted = sum((q - p) * math.log(q / p) for p, q in zip(*smooth, strict=True))
    assert index(before, after)[0] == pytest.approx(wanted)
    assert index(before, before)[0] == 0
    assert index(np.array([100, 0]), np.array([0, 100]))[0] < 11  # an empty bin is no infinity


def number(values: np.ndarray[Any, Any]) -> ColumnProfile:
    return Profile.of(pa.table({"x": values})).columns["x"]


def test_psi_finds_a_shift_and_leaves_chance_alone() -> None:
    draw = rng(3, "psi")
    parent = number(np.exp(draw.normal(0, 1, 20_000)))
    same = [psi(parent, number(np.exp(draw.normal(0, 1, 500)))) for _ in range(40)]
    values = [found.value for found in same if found is not None]
    noise = [found.noise for found in same if found is not None]
    assert np.mean(values) == pytest.approx(np.mean(noise), rel=0.3)  # what chance gives on average
    assert max(value - expected for value, expected in zip(values, noise, strict=True)) < 0.1
    moved = psi(parent, number(np.exp(draw.normal(1, 1, 500))))
    assert moved is not None
    assert moved.value > 0.5
    texts = [Profile.of(pa.table({"x": ["a"] * count + ["b"] * (100 - count)})).columns["x"] for count in (50, 90)]
    shifted = psi(*texts)
    assert shifted is not None
    assert shifted.value > 0.25
    assert "'b'" in shifted.told
    assert psi(texts[0], parent) is None
    assert psi(texts[0], texts[0]) is not None


def test_a_table_of_people_keeps_only_values_that_several_share() -> None:
    people = pa.table({"user_id": [f"u{n}" for n in range(9)], "mail": [f"{n}@x" for n in range(9)], "group": ["a"] * 6 + ["b"] * 3})
    found = table_report(people, pa.table({"reason": pa.array([], pa.string())}), {}).profile
    assert found is not None
    assert (found.columns["mail"].values, found.columns["mail"].distinct, found.columns["group"].values) == ({}, 9, {"a": 6})
    assert "@x" not in json.dumps(found.plain())
