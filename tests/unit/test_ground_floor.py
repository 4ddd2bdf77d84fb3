"""Hashing, ids, settings and artifacts: the parts everything else stands on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple import artifacts
from maple.artifacts import Place
from maple.config import Section, read_yaml
from maple.errors import ArtifactError, ConfigError, DataError, unknown_name
from maple.hashing import combine, rng, stable_hash, stable_unit, stable_units
from maple.schema import EVENTS, check_id, conform, legal_ids

# -- hashing -----------------------------------------------------------------------------------------------------------


def test_hash_does_not_depend_on_the_process() -> None:
    code = "from maple.hashing import stable_hash; print(stable_hash('salt', 'ünïcode', '7'))"
    seen = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, check=True).stdout
        for seed in ("1", "2")
    }
    assert seen == {f"{stable_hash('salt', 'ünïcode', '7')}\n"}


def test_joined_keys_do_not_collide() -> None:
    assert stable_hash("s", "ab", "c") != stable_hash("s", "a", "bc")
    assert combine(["ab", "c"]) != combine(["a", "bc"])


def test_units_are_uniform_and_salts_are_independent() -> None:
    ids = [f"user-{n}" for n in range(20_000)]
    first, second = stable_units("one", ids), stable_units("two", ids)
    counts = np.bincount((first * 20).astype(int), minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, 99.9 %
    agree = ((first < 0.5) == (second < 0.5)).mean()
    assert abs(agree - 0.5) < 0.0117  # 3.3 standard errors


def test_named_streams_differ_and_repeat() -> None:
    assert rng(3, "a").random() == rng(3, "a").random()
    assert len({rng(3, "a").random(), rng(3, "b").random(), rng(4, "a").random()}) == 3


# -- ids and tables ----------------------------------------------------------------------------------------------------


@given(st.text(st.characters(), max_size=300))
def test_both_id_checks_agree(text: str) -> None:
    try:
        check_id(text)
        legal = True
    except DataError:
        legal = False
    try:
        text.encode()
    except UnicodeEncodeError:
        assert not legal
        return
    assert legal_ids(pa.array([text])).to_pylist() == [legal]


def test_conform_names_the_missing_column_and_keeps_extras() -> None:
    table = pa.table({"event_id": ["1"], "user_id": ["u"], "item_id": ["i"], "event": ["view"], "shop": [7]})
    with pytest.raises(DataError, match="'timestamp' is missing"):
        conform(table, EVENTS, "events.csv")
    whole = conform(table.append_column("timestamp", pa.array([0], pa.timestamp("us", "UTC"))), EVENTS, "events.csv")
    assert whole.column_names == [*EVENTS.names, "shop"]
    assert whole["price"].null_count == 1


# -- settings ----------------------------------------------------------------------------------------------------------


class Inner(Section):
    depth: int = 1


class Outer(Section):
    inner: Inner = Inner()
    learning_rate: float = 0.1


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        Outer.parse({"learnig_rate": 1}, "x.yaml")
    with pytest.raises(ConfigError, match=r"inner\.dept"):
        Outer.parse({"inner": {"dept": 1}}, "x.yaml")
    with pytest.raises(ConfigError, match="finite"):
        Outer.parse({"learning_rate": float("nan")}, "x.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("a: &x 1\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_yaml(tmp_path / "s.yaml")


def test_hint_only_for_near_names() -> None:
    assert "Did you mean 'als'" in unknown_name("model", "asl", ["als", "ease"])
    assert "Did you mean" not in unknown_name("model", "transformer", ["als", "ease"])


# -- artifacts ---------------------------------------------------------------------------------------------------------


def build(folder: Place) -> artifacts.Manifest:
    files = [artifacts.write_file(folder, "a.bin", b"alpha"), artifacts.write_file(folder, "part/b.bin", b"beta")]
    return artifacts.seal(folder, "thing", {"n": 2}, files)


def test_what_has_no_manifest_does_not_exist(tmp_path: Path) -> None:
    folder = Place.at(tmp_path / "x")
    artifacts.write_file(folder, "a.bin", b"alpha")
    with pytest.raises(ArtifactError, match="not a finished thing"):
        artifacts.open_manifest(folder, "thing")


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    assert build(Place.at(tmp_path / "x")).digest == build(Place.at(f"file://{tmp_path}/y")).digest


@pytest.mark.parametrize("name", ["a.bin", "part/b.bin", "manifest.json"])
def test_every_flipped_bit_is_seen(tmp_path: Path, name: str) -> None:
    folder = Place.at(tmp_path / "x")
    build(folder)
    path = tmp_path / "x" / name
    original = path.read_bytes()
    for position in range(len(original)):
        flipped = bytearray(original)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(flipped))
        try:
            manifest = artifacts.open_manifest(folder, "thing")
            artifacts.verify(folder, manifest)
        except ArtifactError:
            continue
        # Only white space of the manifest may change without changing what it says.
        assert name == "manifest.json"
        assert json.loads(bytes(flipped)) == json.loads(original)


def test_manifest_of_another_kind(tmp_path: Path) -> None:
    build(Place.at(tmp_path / "x"))
    with pytest.raises(ArtifactError, match="is a thing, not a bundle"):
        artifacts.open_manifest(Place.at(tmp_path / "x"), "bundle")


def test_tensors_and_tables_are_deterministic(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.array([1, -1], np.int32)}
    (tmp_path / "t").write_bytes(artifacts.tensor_bytes(arrays))
    back = artifacts.load_tensors(tmp_path / "t")
    assert all(np.array_equal(back[name], arrays[name]) and back[name].dtype == arrays[name].dtype for name in arrays)
    table = pa.table({"a": [1, 2, 3]})
    assert artifacts.parquet_bytes(table) == artifacts.parquet_bytes(table)


def test_latest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="maple ingest"):
        artifacts.latest(Place.at(tmp_path), "snapshot")
    artifacts.point(Place.at(tmp_path), "snapshot", "s1")
    assert artifacts.latest(Place.at(tmp_path), "snapshot") == "s1"


def test_stable_unit_is_in_range() -> None:
    assert 0 <= stable_unit("", "") < 1
