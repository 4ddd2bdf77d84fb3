"""``maple snapshots`` and ``maple events expire`` as a person runs them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from click.testing import CliRunner

from maple.artifacts import Place
from maple.cli import cli
from maple.data.drafts import pointing
from maple.data.ingest import append_local, ingest_local
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.errors import ArtifactError, ConfigError
from maple.features.store import Event

NOW = 1_800_000_000_000_000


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a base and a layer; two of its ids are one person's."""
    columns = {"event_id": "id", "user_id": "who", "item_id": "what", "timestamp": "when"}
    plain = {
        "name": "shop", "events": {"path": "events*.csv", "columns": columns, "constants": {"event": "purchase"}},
        "identities": {"path": "edges.csv", "columns": {"device_id": "device_id", "user_id": "user_id"}},
    }  # fmt: skip
    source, root, place = SourceConfig.parse(plain, "test"), Place.at(tmp_path), Place.at(tmp_path / "home")
    (tmp_path / "edges.csv").write_text("device_id,user_id\nd1,ann\n")
    (tmp_path / "none.csv").write_text("device_id,user_id\n")
    rows = [f"{n},{'ann' if n % 2 else 'd1'},i{n % 3},2024-01-{n + 1:02d}T00:00:00\n" for n in range(20)]
    (tmp_path / "events0.csv").write_text("id,who,what,when\n" + "".join(rows[:15]))
    ingest_local(source, root, place, now=NOW)
    (tmp_path / "events1.csv").write_text("id,who,what,when\n" + "".join(rows[15:]))
    append_local(source, root, place, now=NOW)
    monkeypatch.setenv("MAPLE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*words: str) -> str:
    done = CliRunner().invoke(cli, list(words), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_versions_are_listed_shown_compared_and_chosen(home: Path) -> None:
    place = Place.at(home)
    young = Snapshot.open(place)
    old = young.parent
    assert old is not None
    told = run("snapshots", "list")
    assert old in told
    assert f"* {young.name}" in told
    assert "20" in run("snapshots", "show")
    told = run("snapshots", "diff", old)
    assert "events" in told
    assert "5" in told
    assert old in run("snapshots", "use", old)
    assert Snapshot.open(place).name == old
    with pytest.raises(ArtifactError, match="no-such"):
        run("snapshots", "show", "no-such")


def test_layers_become_a_base_and_what_nothing_needs_goes(home: Path) -> None:
    place = Place.at(home)
    before = Snapshot.open(place)
    assert "20 events" in run("snapshots", "compact")
    after = Snapshot.open(place)
    assert after.parent is None
    assert after.digest == before.digest
    assert after.events().equals(before.events())
    run("snapshots", "purge", "--grace", "0")
    assert [child.name for child in (place / "snapshots").children() if child.name[0].isdigit()] == [after.name]


def test_ids_are_stitched_by_other_edges_and_back(home: Path) -> None:
    place = Place.at(home)
    before = Snapshot.open(place).events()
    assert set(before["user_id"].to_pylist()) == {"ann"}
    run("snapshots", "restitch", str(home.parent / "none.csv"))
    assert set(Snapshot.open(place).events()["user_id"].to_pylist()) == {"ann", "d1"}
    run("snapshots", "restitch", str(home.parent / "edges.csv"))
    assert Snapshot.open(place).events().equals(before)
    (home.parent / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="the columns device_id and user_id"):
        run("snapshots", "restitch", str(home.parent / "wrong.csv"))


def test_old_online_events_expire(home: Path) -> None:
    from maple.cli.users import opened

    with opened(None) as (_, store):
        store.append([Event("a", "ann", "i1", "view", 1_600_000_000_000_000), Event("b", "ann", "i1", "view", NOW)])
    assert "1 events" in run("events", "expire", "365")
    with opened(None) as (_, store):
        assert [event.event_id for event in store.history("ann")] == ["b"]


def test_going_back_waits_for_who_is_publishing(home: Path) -> None:
    place = Place.at(home)
    young = Snapshot.open(place)
    with ThreadPoolExecutor(1) as pool:
        with pointing(place):
            going = pool.submit(run, "snapshots", "use", str(young.parent))
            assert wait([going], timeout=0.5).not_done
            assert Snapshot.open(place).name == young.name
        going.result(timeout=10)
    assert Snapshot.open(place).name == young.parent
