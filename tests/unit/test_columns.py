"""Missing values per column: what each policy does, that only training rows are learned from, that the state holds all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maple.errors import ConfigError, DataError
from maple.hashing import rng
from maple.models.base import FitContext
from maple.models.columns import Columns, Missing
from maple.models.ctr import DCNv2, DCNv2Config

NAN = np.nan
ROWS: dict[str, np.ndarray[Any, Any]] = {
    "user.age": np.array([20, 30, 40, NAN], np.float32),
    "user.price": np.array([1, 2, 3, 4], np.float32),
    "item.kind": np.array([0, 0, 1, -1], np.int32),
}


def fit(missing: dict[str, Missing], rows: dict[str, np.ndarray[Any, Any]] = ROWS) -> Columns:
    return Columns.fit(rows, max_codes=10, min_count=1, missing=missing)


def test_each_policy_gives_the_columns_it_promises() -> None:
    asked = {**ROWS, "user.age": np.array([NAN, 30, np.inf, 40], np.float32)}
    both = fit({}).transform(asked)[0]
    assert both.shape[1] == 3  # age, price, and a flag for age alone: training had no missing price
    assert both[:, 2].tolist() == [1, 0, 1, 0]
    assert both[[0, 2], 0].tolist() == [0, 0]  # the center
    imputed = fit({"user.age": "impute"}).transform(asked)[0]
    np.testing.assert_array_equal(imputed, both[:, :2])
    flagged = fit({"user.*": "indicator"}).transform(asked)[0]
    assert flagged.T.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    rejected = fit({"user.price": "reject"}).transform({**asked, "user.price": np.full(4, NAN, np.float32)})[0]
    assert rejected[:, 1].tolist() == [0] * 4  # a request is answered with the center
    assert fit({"user.age": "impute", "user.*": "indicator"}).width == 2  # the first pattern that fits counts


def test_a_missing_value_where_none_may_be_stops_the_training() -> None:
    with pytest.raises(DataError, match=r"'user.age' is missing in 1 of 4 training rows.*`reject`"):
        fit({"user.*": "reject"})
    with pytest.raises(DataError, match=r"Did you mean 'user.price'"):
        fit({"user.prise": "impute"})
    with pytest.raises(DataError, match=r"'item.kind'"):
        fit({"item.kind": "impute"})  # codes have a row for what is unknown
    with pytest.raises(ConfigError, match="missing"):
        DCNv2Config.parse({"missing": {"user.age": "drop"}}, "ranker")


def test_the_state_round_trips_with_every_policy() -> None:
    for missing in ({}, {"user.*": "indicator"}, {"user.age": "impute"}):
        fitted = fit(missing)  # type: ignore[arg-type]
        again = Columns.from_state(fitted.state())
        for one, other in zip(fitted.transform(ROWS), again.transform(ROWS), strict=True):
            np.testing.assert_array_equal(one, other)
        assert again.width == fitted.width


def test_what_stands_in_is_learned_from_training_rows_only() -> None:
    draw = rng(0, "rows")
    size = 600
    train = {"a": draw.normal(5, 2, size).astype(np.float32), "b": draw.normal(0, 1, size).astype(np.float32)}
    train["a"][::7] = NAN
    labels = (train["b"] > 0).astype(np.float32)[:, None]
    config = DCNv2Config.parse({"ensemble": 1, "missing": {"b": "impute"}, "training": {"epochs": 1, "device": "cpu"}}, "ranker")
    model = DCNv2(config)
    model.fit(train, labels, np.repeat(np.arange(30), 20), FitContext())
    before = {name: array.copy() for name, array in model.state().items()}
    later = {"a": np.full(size, 1e6, np.float32), "b": np.where(np.arange(size) % 2, NAN, -1e6).astype(np.float32)}
    scores = model.score(later)
    assert np.isfinite(scores).all()
    assert all(np.array_equal(array, before[name]) for name, array in model.state().items())
    known = train["a"][np.isfinite(train["a"])]
    assert before["columns.center"][0] == pytest.approx(np.clip(known, *np.quantile(known, [0.005, 0.995])).mean(), rel=1e-5)
    center = float(before["columns.center"][0])
    flagged = model._columns
    assert flagged is not None
    one = flagged.transform({"a": np.array([center, NAN], np.float32), "b": np.array([0, 0], np.float32)})[0]
    np.testing.assert_allclose(one[:, 0], [0, 0], atol=1e-6)
    assert one[:, 2].tolist() == [0, 1]
    again = DCNv2.from_state(config, model.state())
    np.testing.assert_array_equal(again.score(later), scores)
