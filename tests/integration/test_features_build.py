"""The offline feature build on Ray: the same artifact as in one process, and nothing half-made after a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
from shop import ITEMS, Happening, snapshot

from maple.artifacts import Place
from maple.data.layers import events_file
from maple.errors import ArtifactError
from maple.features.build import FeatureArtifact, build_local
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.hashing import rng

SPEC = FeatureSpec()


def log(count: int) -> list[Happening]:
    draw = rng(5, "build")
    kinds, names = ["view", "purchase", "return"], ITEMS["item_id"].to_pylist()
    users, items, events, times = (draw.integers(bound, size=count).tolist() for bound in (100, 5, 3, 90))
    return [Happening(f"u{u}", names[i], kinds[e], t * DAY // 2, 1.0, 2.0) for u, i, e, t in zip(users, items, events, times, strict=True)]


def test_ray_builds_what_one_process_builds(ray_local: str, tmp_path: Path) -> None:
    from maple.features.build_ray import build

    snap = snapshot(tmp_path, log(2000), rows_per_bucket=500)
    assert snap.num_buckets >= 4
    alone = build_local(snap, SPEC, Place.at(tmp_path / "alone"))
    home = Place.at(tmp_path / "home")
    lines: list[str] = []
    made = build(snap, SPEC, home, lines.append)
    assert made.digest == alone.digest
    assert FeatureArtifact.open(home).digest == made.digest
    assert any(f"{made.num_rows:,} feature rows" in line for line in lines)
    assert build(snap, SPEC, home, lines.append).digest == made.digest
    assert "built already" in lines[-1]


def test_a_damaged_bucket_is_named_and_leaves_nothing(ray_local: str, tmp_path: Path) -> None:
    from maple.features.build_ray import build

    snap = snapshot(tmp_path, log(1000), rows_per_bucket=500)
    path = Path(snap.folder.path) / events_file(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    home = Place.at(tmp_path / "home")
    with pytest.raises(ArtifactError, match=r"bucket 1: .*altered"):
        build(snap, SPEC, home)
    assert (home / "features").children() == []
    with pytest.raises(ArtifactError, match="no features yet"):
        FeatureArtifact.open(home)
