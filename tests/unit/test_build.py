"""The offline build in one process: point-in-time rows, the timeline, building again, and damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from shop import ITEMS, T0, Happening, snapshot

from maple.artifacts import Place
from maple.data.layers import events_file
from maple.errors import ArtifactError
from maple.features.build import FeatureArtifact, build_bucket, build_local, build_shard, plan, publish, rows_file, ticks_file
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.ticks import ItemTimeline
from maple.features.view import Entity
from maple.hashing import rng

SPEC = FeatureSpec()


def log(count: int = 400) -> list[Happening]:
    draw = rng(3, "build")
    kinds, names = ["view", "purchase", "return", "rating"], ITEMS["item_id"].to_pylist()
    users, items, events, times = (draw.integers(bound, size=count).tolist() for bound in (40, 5, 4, 60))
    return [Happening(f"u{u}", names[i], kinds[e], t * DAY // 3, 1.0, 2.0) for u, i, e, t in zip(users, items, events, times, strict=True)]


def test_rows_are_what_the_log_says_at_each_target_event(tmp_path: Path) -> None:
    snap = snapshot(tmp_path, log(), rows_per_bucket=50)
    assert snap.num_buckets >= 8
    made = build_local(snap, SPEC, Place.at(tmp_path / "home"))
    rows = made.user_events().sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("item_id", "ascending")])
    events = snap.events()
    assert made.num_rows == rows.num_rows == pa.compute.sum(pa.compute.equal(events["event"], "purchase")).as_py()
    assert rows.column_names[4:] == [*SPEC.feature_names(Entity.USER), *SPEC.feature_names(Entity.USER_ITEM)]
    data = snap.dataset()
    users, items = data.users.encode(rows["user_id"]), data.items.encode(rows["item_id"])
    now = np.asarray(rows["timestamp"].cast(pa.int64()))
    reader = LogReader(data, SPEC)
    offsets = np.arange(rows.num_rows + 1)
    own, paired = reader.columns(users, now, offsets, items)
    for name, column in (own | paired).items():
        np.testing.assert_array_equal(np.asarray(rows[name]), column, err_msg=name)


def test_the_timeline_has_the_codes_of_the_data_set(tmp_path: Path) -> None:
    snap = snapshot(tmp_path, log(), rows_per_bucket=50)
    made = build_local(snap, SPEC, Place.at(tmp_path / "home"))
    data = snap.dataset()
    assert made.catalogue().digest == Catalogue.of(data).digest
    whole, found = ItemTimeline.from_data(data, SPEC), made.timeline()
    np.testing.assert_array_equal(found.ticks, whole.ticks)
    np.testing.assert_allclose(found.state, whole.state, rtol=1e-12)


def test_items_that_the_table_lacks_have_features_too_and_nothing_between_the_phases_stays(tmp_path: Path) -> None:
    happened = [*log(60), *(Happening(f"u{n}", "ghost", "purchase", n * DAY) for n in range(8))]
    snap = snapshot(tmp_path, happened, rows_per_bucket=20)
    todo = plan(snap, SPEC, Place.at(tmp_path / "home"))
    todo = replace(todo, items=todo.items.filter(pa.compute.not_equal(todo.items["item_id"], "ghost")))
    buckets = [build_bucket(todo, bucket) for bucket in range(snap.num_buckets)]
    shards = [build_shard(todo, shard) for shard in range(todo.num_shards)]
    assert [name for made in shards for name in made.items] == ["ghost"]
    made = publish(todo, Place.at(tmp_path / "home"), [*buckets, *shards])
    timeline = made.timeline()
    code = made.catalogue().items.encode(["ghost"])
    assert timeline.at(code, np.array([T0 // DAY + 30]))["item.buyers.all"] == np.log1p(np.float32(8))
    assert sorted(child.name for child in made.folder.children()) == [
        "features.md",
        "item_ticks",
        "items.arrow",
        "manifest.json",
        "user_events",
    ]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    snap = snapshot(tmp_path, log(60), rows_per_bucket=20)
    path = Path(snap.folder.path) / events_file(snap.num_buckets - 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="altered"):
        build_local(snap, SPEC, Place.at(tmp_path / "home"))
    assert not (tmp_path / "home" / "features").exists() or list((tmp_path / "home" / "features").iterdir()) == []


def test_building_again_finds_the_result_and_another_spec_does_not(tmp_path: Path) -> None:
    snap = snapshot(tmp_path, log(60), rows_per_bucket=50)
    home = Place.at(tmp_path / "home")
    first = build_local(snap, SPEC, home)
    stamp = (tmp_path / "home" / "features" / first.name / rows_file(0)).stat().st_mtime_ns
    assert build_local(snap, SPEC, home).digest == first.digest
    assert (tmp_path / "home" / "features" / first.name / rows_file(0)).stat().st_mtime_ns == stamp
    other = build_local(snap, SPEC.with_(views=["user.baskets", "item.trend"]), home)
    assert other.name != first.name
    assert FeatureArtifact.open(home).name == other.name
    assert FeatureArtifact.open(home, first.name).spec == SPEC
    assert other.spec.views == ("user.baskets", "item.trend")


def test_missing_and_damaged_features_are_errors(tmp_path: Path) -> None:
    home = Place.at(tmp_path / "home")
    with pytest.raises(ArtifactError, match="maple features build"):
        FeatureArtifact.open(home)
    made = build_local(snapshot(tmp_path, log(60), rows_per_bucket=1000), SPEC, home)
    with pytest.raises(ArtifactError, match=r"unknown features 'nope'"):
        FeatureArtifact.open(home, "nope")
    for name, read in ((rows_file(0), made.user_events), (ticks_file(0), made.timeline), ("items.arrow", made.catalogue)):
        path = tmp_path / "home" / "features" / made.name / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(ArtifactError, match="altered"):
            read()
