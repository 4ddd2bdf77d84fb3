"""Leaks planted in columns, rows and ticks are found and named; honest features pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shop

from maple.artifacts import Place
from maple.data.dataset import Dataset
from maple.errors import DataError
from maple.features.build import build_local, target_rows
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.leakage import check_features, label_leaks, refuse_leaks, seen_future
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.ticks import partials
from maple.features.view import Entity
from maple.hashing import rng

SPEC = FeatureSpec()


def happenings(size: int = 600, users: int = 25) -> list[shop.Happening]:
    draw = rng(7, "happenings")
    at = np.sort(draw.integers(0, 60 * DAY, size))
    who, what = draw.integers(0, users, size), draw.integers(0, 4, size)
    kinds = draw.choice(["view", "purchase", "purchase", "return"], size)
    price = [1.0, 2.0, 8.0, 10.0]
    return [
        shop.Happening(f"u{user}", str(shop.ITEMS["item_id"][int(item)]), str(kind), int(time), 1.0, price[item])
        for user, item, kind, time in zip(who, what, kinds, at, strict=True)
    ]


def dataset() -> Dataset:
    return Dataset.from_tables(shop.table(shop.online(happenings())), shop.ITEMS)


def test_a_column_that_knows_the_label_is_named_and_honest_ones_are_not() -> None:
    draw = rng(1, "labels")
    y = (draw.random(20_000) < 0.02).astype(np.float32)
    bought = draw.poisson(np.where(y > 0, 3.0, 0.4)).astype(np.float32)  # an honest, strong feature: AUC about 0.9
    code = draw.integers(0, 50, len(y)).astype(np.int32)
    columns = {
        "times_bought": bought,
        "noise": draw.normal(size=len(y)).astype(np.float32),
        "since_bought": np.where(bought > 0, draw.random(len(y)), np.nan).astype(np.float32),
        "honest_code": np.where(draw.random(len(y)) < 0.3 * y, 50, code).astype(np.int32),
        "many_codes": draw.permutation(len(y)).astype(np.int32),
        "constant": np.ones(len(y), np.float32),
        "empty": np.full(len(y), np.nan, np.float32),
        "label": -y + draw.normal(0, 0.01, len(y)).astype(np.float32),
        "almost": y + draw.normal(0, 0.33, len(y)).astype(np.float32),
        "hole": np.where(y > 0, np.nan, draw.random(len(y))).astype(np.float32),
        "code": np.where(y > 0, code + 50, code).astype(np.int32),
        "band": np.where(y > 0, draw.uniform(0.45, 0.5, len(y)), draw.choice([-1, 1], len(y)) * draw.uniform(1, 2, len(y)) + 0.5).astype(
            np.float32
        ),
    }
    found = {(finding.check, finding.column): finding.severity for finding in label_leaks(columns, y)}
    assert found[("label_leak", "label")] == found[("label_leak_missing", "hole")] == found[("label_leak", "code")] == "error"
    assert found[("label_information", "band")] == "error"  # its AUC is a half: only the information tells
    assert ("label_leak", "band") not in found
    assert found[("label_leak", "almost")] == "warn"
    assert {column for _, column in found} == {"label", "almost", "hole", "code", "band"}
    assert label_leaks(columns, np.where(np.arange(len(y)) < 10, 1, 0)) == []  # ten positives prove nothing


def test_training_refuses_an_error_and_tells_a_warning() -> None:
    y = np.repeat([0.0, 1.0], 500).astype(np.float32)
    said: list[str] = []
    refuse_leaks(label_leaks({"almost": y + rng(2, "x").normal(0, 0.33, 1000)}, y), said.append)
    assert len(said) == 1
    assert "'almost'" in said[0]
    with pytest.raises(DataError, match=r"nothing was trained.*'label'.*AUC of 1\.0000"):
        refuse_leaks(label_leaks({"label": y}, y), said.append)


def test_rows_that_saw_their_own_event_are_found() -> None:
    data = dataset()
    rows = target_rows(data, SPEC, Catalogue.of(data))
    assert seen_future(rows, data, SPEC) == []
    time = np.asarray(rows["timestamp"].cast(pa.int64()))
    users, items = data.users.encode(rows["user_id"]), data.items.encode(rows["item_id"])
    own, paired = LogReader(data, SPEC).columns(users, time + 1, np.arange(len(rows) + 1), items)  # one microsecond late
    leaky = rows
    for name, column in (own | paired).items():
        leaky = leaky.set_column(leaky.column_names.index(name), name, pa.array(column))
    found = seen_future(leaky, data, SPEC)
    assert len(found) > 20
    assert {finding.severity for finding in found} == {"error"}
    assert {finding.column for finding in found} <= set(SPEC.feature_names(Entity.USER)) | set(SPEC.feature_names(Entity.USER_ITEM))
    one = leaky.set_column(leaky.column_names.index(found[0].column), found[0].column, pa.array(np.zeros(len(rows), np.float32)))
    assert any(finding.column == found[0].column for finding in seen_future(one, data, SPEC))


def test_finished_features_are_checked_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, home = shop.snapshot(tmp_path, happenings(), rows_per_bucket=200), Place.at(tmp_path / "home")
    honest = build_local(snapshot, SPEC, home)
    assert check_features(honest, snapshot) == []

    def early(data: Dataset, spec: FeatureSpec) -> pa.Table:
        """Partials as if everything had happened a tick before."""
        table = partials(data, spec)
        return table.set_column(1, "time", pa.array(np.asarray(table["time"]) - spec.tick))

    monkeypatch.setattr("maple.features.build.partials", early)
    honest.folder.delete()
    leaky = build_local(snapshot, SPEC, home)
    found = check_features(leaky, snapshot)
    assert found
    assert {finding.check for finding in found} == {"saw_future"}
    assert {finding.column for finding in found} <= set(SPEC.feature_names(Entity.ITEM))
    assert "at tick" in found[0].message
