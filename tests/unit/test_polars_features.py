"""The views against the same features written in polars, window by window: every column of every view."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop import ITEMS, Happening, snapshot

from maple.artifacts import Place
from maple.features.build import build_local
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.features.view import Entity
from maple.hashing import rng

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import polars_features

SPEC = FeatureSpec()
KINDS = ["view", "view", "click", "add_to_cart", "purchase", "purchase", "rating", "return"]


def happenings(count: int) -> list[Happening]:
    """Users with many events at equal moments, sessions, repeats, missing numbers, an item without category, brand and price."""
    draw = rng(11, "polars")
    names = ITEMS["item_id"].to_pylist()
    users, items, kinds = (draw.integers(bound, size=count).tolist() for bound in (25, len(names), len(KINDS)))
    at = (draw.integers(80, size=count) * DAY // 2 + draw.integers(4, size=count) * DAY // 96).tolist()
    values = [None if skip else float(value) for skip, value in zip(draw.random(count) < 0.3, draw.integers(1, 5, count), strict=True)]
    prices = [None if skip else float(price) for skip, price in zip(draw.random(count) < 0.5, draw.integers(1, 40, count), strict=True)]
    rows = zip(users, items, kinds, at, values, prices, strict=True)
    return [Happening(f"u{u}", names[i], KINDS[k], t, value, price) for u, i, k, t, value, price in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place]:
    """A folder with what polars computes, and the home of the same snapshot's features."""
    folder = tmp_path_factory.mktemp("polars")
    snap = snapshot(folder, happenings(1500), rows_per_bucket=400)
    build_local(snap, SPEC, Place.at(folder / "home"))
    pq.write_table(snap.events(), folder / "clean.parquet")
    pq.write_table(snap.items(), folder / "known.parquet")
    polars_features.run(str(folder / "clean.parquet"), str(folder / "known.parquet"), folder)
    return folder, Place.at(folder / "home")


def same(mine: pa.ChunkedArray, theirs: pa.ChunkedArray, name: str) -> None:
    ours, other = (np.asarray(column.cast(pa.float32()).fill_null(float("nan"))) for column in (mine, theirs))
    # a deviation is the root of a small difference of large sums
    np.testing.assert_allclose(other, ours, rtol=1e-5, atol=1e-3 if name.endswith("std") else 1e-5, err_msg=name)


def test_every_view_is_covered() -> None:
    assert set(polars_features.COVERED) == set(SPEC.views)


def test_user_and_user_item_features_are_what_polars_computes(made: tuple[Path, Place]) -> None:
    from maple.features.build import FeatureArtifact

    folder, home = made
    keys = [("user_id", "ascending"), ("timestamp", "ascending"), ("item_id", "ascending")]
    mine = FeatureArtifact.open(home).user_events().sort_by(keys)
    theirs = pq.read_table(folder / "user_events.parquet").sort_by(keys)
    assert mine.num_rows == theirs.num_rows > 300
    assert theirs.column_names[4:] == [*SPEC.feature_names(Entity.USER), *SPEC.feature_names(Entity.USER_ITEM)]
    assert mine["item_id"].to_pylist() == theirs["item_id"].to_pylist()
    for name in theirs.column_names[4:]:
        same(mine[name], theirs[name], name)


def test_item_features_are_what_polars_computes(made: tuple[Path, Place]) -> None:
    from maple.features.build import FeatureArtifact

    folder, home = made
    theirs = pq.read_table(folder / "item_ticks.parquet")
    timeline = FeatureArtifact.open(home).timeline()
    assert theirs.num_rows == len(timeline.ticks)
    columns = timeline.at(timeline.catalogue.items.encode(theirs["item_id"]), np.asarray(theirs["tick"]))
    assert theirs.column_names[2:] == list(columns)
    for name, column in columns.items():
        same(pa.chunked_array([column]), theirs[name], name)
