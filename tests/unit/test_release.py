"""The release ledger by known answers: what each change leaves, what is refused, what a damaged folder says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from maple.artifacts import Place, seal, write_file
from maple.errors import ArtifactError, ConfigError, ServeError
from maple.hashing import sha256
from maple.train.release import Ledger, Release, stack


def make_bundle(home: Path, content: str) -> str:
    """A sealed artifact of kind bundle under its digest; returns the digest."""
    draft = Place.at(home / "draft" / content)
    entry = write_file(draft, "a.txt", content.encode())
    digest = seal(draft, "bundle", {}, [entry]).digest
    (home / "bundles").mkdir(parents=True, exist_ok=True)
    os.replace(draft.path, home / "bundles" / digest)
    return digest


@pytest.fixture
def a(home: Path) -> str:
    return make_bundle(home, "a")


@pytest.fixture
def b(home: Path) -> str:
    return make_bundle(home, "b")


@pytest.fixture
def c(home: Path) -> str:
    return make_bundle(home, "c")


@pytest.fixture
def ledger(home: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.delenv("MAPLE_LEDGER", raising=False)
    return Ledger.open(home)


def pointers(release: Release) -> tuple[str | None, str | None, str | None]:
    return release.champion, release.previous, release.shadow


def test_an_empty_ledger_is_generation_zero_and_has_no_champion(ledger: Ledger) -> None:
    assert ledger.read() == Release()
    assert ledger.history() == []
    with pytest.raises(ArtifactError, match="maple promote"):
        ledger.champion()
    with pytest.raises(ServeError, match="no earlier release"):
        ledger.rollback()
    assert not ledger.folder.exists()


def test_promote_moves_champion_to_previous(ledger: Ledger, a: str, b: str) -> None:
    first = ledger.promote(a, by="ann", note="first")
    assert (first.generation, *pointers(first)) == (1, a, None, None)
    second = ledger.promote(b, expected_generation=1, by="bob")
    assert (second.generation, *pointers(second)) == (2, b, a, None)
    assert ledger.read() == ledger.champion() == second
    assert [(r.generation, r.action, r.by, r.note) for r in ledger.history()] == [(1, "promote", "ann", "first"), (2, "promote", "bob", "")]
    assert first.at < second.at
    assert second.parent == sha256((ledger.folder / "000000001.json").read_bytes())


def test_promoting_the_champion_again_is_no_change(ledger: Ledger, a: str) -> None:
    assert ledger.promote(a) == ledger.promote(a)
    assert len(ledger.history()) == 1


def test_rollbacks_walk_down_and_never_bring_a_bad_release_back(ledger: Ledger, a: str, b: str, c: str) -> None:
    for digest in (a, b, c):
        ledger.promote(digest)
    assert pointers(ledger.rollback()) == (b, a, None)
    assert pointers(ledger.rollback()) == (a, None, None)
    with pytest.raises(ServeError, match="no earlier release"):
        ledger.rollback()
    assert pointers(ledger.promote(c)) == (c, a, None)
    assert stack(ledger.history()) == [a, c]


def test_a_promotion_that_was_rolled_back_is_not_gone_back_to(ledger: Ledger, a: str, b: str, c: str) -> None:
    ledger.promote(a)
    ledger.promote(b)
    ledger.rollback()
    assert pointers(ledger.promote(c)) == (c, a, None)
    assert pointers(ledger.rollback()) == (a, None, None)


def test_shadow_is_set_ended_and_cleared_by_its_promotion(ledger: Ledger, a: str, b: str) -> None:
    ledger.promote(a)
    assert pointers(ledger.set_shadow(b)) == (a, None, b)
    assert ledger.set_shadow(b).generation == 2
    assert pointers(ledger.set_shadow(None)) == (a, None, None)
    ledger.set_shadow(b)
    assert pointers(ledger.promote(b)) == (b, a, None)
    with pytest.raises(ServeError, match="is the champion"):
        ledger.set_shadow(b)


def test_a_stale_expectation_is_refused_and_says_who_moved_it(ledger: Ledger, a: str, b: str) -> None:
    ledger.promote(a, by="ann")
    before = ledger.history()
    for change in (
        lambda: ledger.promote(b, expected_generation=0),
        lambda: ledger.promote(a, expected_generation=7),
        lambda: ledger.rollback(expected_generation=0),
        lambda: ledger.set_shadow(b, expected_generation=0),
    ):
        with pytest.raises(ServeError, match=r"generation 1 .*by ann"):
            change()
    assert ledger.history() == before


@pytest.mark.parametrize("digest", ["", "latest", "../" * 10, "0" * 64, "A" * 64])
def test_a_bundle_that_does_not_exist_is_refused(ledger: Ledger, digest: str) -> None:
    with pytest.raises(ArtifactError):
        ledger.promote(digest)
    with pytest.raises(ArtifactError):
        ledger.set_shadow(digest)
    assert ledger.read() == Release()


def test_a_damaged_bundle_is_refused_and_nothing_changes(ledger: Ledger, home: Path, a: str, b: str, c: str) -> None:
    ledger.promote(a)
    (home / "bundles" / b / "a.txt").write_text("B")
    with pytest.raises(ArtifactError, match="altered"):
        ledger.promote(b)
    os.replace(home / "bundles" / c, home / "bundles" / ("0" * 64))
    with pytest.raises(ArtifactError, match="renamed"):
        ledger.promote("0" * 64)
    assert pointers(ledger.read()) == (a, None, None)
    assert not list(ledger.folder.glob("*.tmp"))


def test_rollback_to_a_damaged_bundle_is_refused(ledger: Ledger, home: Path, a: str, b: str) -> None:
    ledger.promote(a)
    ledger.promote(b)
    (home / "bundles" / a / "a.txt").write_text("?")
    with pytest.raises(ArtifactError, match="altered"):
        ledger.rollback()
    assert pointers(ledger.read()) == (b, a, None)


def test_a_changed_or_missing_record_shows(ledger: Ledger, a: str, b: str, c: str) -> None:
    for digest in (a, b, c):
        ledger.promote(digest)
    path = ledger.folder / "000000002.json"
    good = path.read_text()
    path.write_text(good.replace(b, a))
    with pytest.raises(ArtifactError, match=r"000000003\.json does not follow"):
        ledger.history()
    path.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        ledger.history()
    path.write_text(json.dumps({**json.loads(good), "generation": 5}))
    with pytest.raises(ArtifactError, match="not the record of generation 2"):
        ledger.history()
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing from the release ledger"):
        ledger.history()
    path.write_text(good)
    assert len(ledger.history()) == 3


def test_a_writer_that_died_leaves_no_trace(ledger: Ledger, a: str, b: str) -> None:
    ledger.promote(a)
    (ledger.folder / "000000002.abc.tmp").write_text('{"half')
    assert ledger.read().generation == 1
    assert ledger.promote(b).generation == 2


def test_the_ledger_of_a_bucket_needs_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAPLE_LEDGER", raising=False)
    bucket = Place(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "home")
    with pytest.raises(ConfigError, match="MAPLE_LEDGER"):
        Ledger.open(bucket)
    monkeypatch.setenv("MAPLE_LEDGER", str(tmp_path / "ledger"))
    assert Ledger.open(bucket).folder == tmp_path / "ledger"
    assert Ledger.open(bucket, tmp_path / "other").folder == tmp_path / "other"


def test_a_ledger_that_is_a_file_or_cannot_be_written_says_so(tmp_path: Path, home: Path, a: str) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        Ledger.open(home, blocked).promote(a)
    with pytest.raises(ConfigError, match="cannot write to the release ledger"):
        Ledger.open(home, "/proc/maple-ledger").promote(a)


def test_a_home_may_be_a_file_uri(home: Path, a: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAPLE_LEDGER", raising=False)
    assert Ledger.open(home.as_uri()).promote(a).champion == a
    assert Ledger.open(home).read().champion == a


def test_a_bundle_may_be_named_by_the_beginning_of_its_digest(ledger: Ledger, home: Path, a: str, b: str) -> None:
    assert ledger.resolve(a) == ledger.resolve(a[:6]) == a
    with pytest.raises(ArtifactError, match=f"no bundle begins .*{b[:12]}"):
        ledger.resolve("zzzzzz")
    with pytest.raises(ArtifactError, match="at least 6"):
        ledger.resolve(a[:5])
    (home / "bundles" / (a[:10] + "0" * 54)).mkdir()
    with pytest.raises(ArtifactError, match="2 bundles begin"):
        ledger.resolve(a[:8])
    with pytest.raises(ArtifactError, match="maple publish"):
        Ledger.open(home / "elsewhere").resolve(a)
