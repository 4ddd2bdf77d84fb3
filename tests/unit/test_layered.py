"""Snapshots in layers: what an append reads and writes, time travel, deletion, stitching anew, compaction, and what dead makers leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place, point
from maple.data.compact import compact, due
from maple.data.drafts import MAKER, sweep, tidy
from maple.data.ingest import append_local, dry_run, ingest_local, restitch
from maple.data.purge import purge
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.data.tombstones import Tombstones
from maple.data.versions import diff, versions
from maple.errors import ArtifactError, ConfigError, DataError

NOW = 1_800_000_000_000_000
HEAD = "id,who,what,when,n\n"


def source(**more: Any) -> SourceConfig:
    columns = {"event_id": "id", "user_id": "who", "item_id": "what", "timestamp": "when", "value": "n"}
    plain = {"name": "shop", "events": {"path": "e*.csv", "columns": columns, "constants": {"event": "purchase"}}}
    return SourceConfig.parse({**plain, "max_quarantined_share": 0.9, **more}, "test")


def lines(start: int, stop: int, users: int = 20) -> list[str]:
    return [f"e{n:04d},u{n % users},i{n % 7},2024-01-{1 + n // 100:02d}T{n % 24:02d}:00:00,{n}" for n in range(start, stop)]


def write(folder: Path, name: str, rows: list[str]) -> None:
    (folder / name).write_text(HEAD + "".join(row + "\n" for row in rows))


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with a first file, ingested into ``home``."""
    write(tmp_path, "e0.csv", lines(0, 400))
    ingest_local(source(), Place.at(tmp_path), Place.at(tmp_path / "home"), rows_per_bucket=150, now=NOW)
    return tmp_path


def grow(shop: Path, **more: Any) -> Snapshot:
    return append_local(source(**more), Place.at(shop), Place.at(shop / "home"), now=NOW)


def ids(snapshot: Snapshot) -> list[str]:
    return sorted(snapshot.events(columns=["event_id"])["event_id"].to_pylist())


def test_only_new_files_are_read_and_only_their_rows_are_written(shop: Path) -> None:
    base = Snapshot.open(Place.at(shop / "home"))
    write(shop, "e1.csv", lines(400, 410))
    (shop / "e0.csv").touch()  # looked at, but with the same content: not read again
    child = grow(shop)
    assert (child.parent, child.num_events, base.num_events) == (base.name, 410, 400)
    assert child.report().events.files == {"e1.csv": 10}
    events = [entry for name, entry in child.manifest.files.items() if name.startswith("events/")]
    assert [entry.rows for entry in events] == [10]
    assert ids(Snapshot.open(Place.at(shop / "home"), base.name)) == ids(base)  # time travel
    assert child.report().parent == base.name


def test_a_grown_file_brings_its_new_rows_and_the_known_ones_count_for_nothing(shop: Path) -> None:
    write(shop, "e0.csv", lines(0, 405))
    child = grow(shop)
    events = child.report().events
    assert (events.rows_in, events.rows_clean, events.rows_quarantined, events.rows_known) == (405, 5, 0, 400)
    assert child.quarantine().num_rows == 0
    assert child.num_events == 405


def test_another_content_under_a_known_id_is_set_aside_and_the_first_counts(shop: Path) -> None:
    write(shop, "e1.csv", [lines(3, 4)[0] + "1", *lines(400, 403)])
    child = grow(shop)
    assert child.report().events.reasons == {"conflict": 1}
    (row,) = child.quarantine().to_pylist()
    assert (row["reason"], row["event_id"], row["value"]) == ("conflict", "e0003", 31.0)
    assert child.events().filter(pa.compute.field("event_id") == "e0003")["value"].to_pylist() == [3.0]


def test_what_cannot_be_appended_is_refused_by_name(shop: Path) -> None:
    write(shop, "e1.csv", lines(400, 405))
    with pytest.raises(ConfigError, match=r"session_gap_minutes.*was made with 30"):
        grow(shop, session_gap_minutes=10.0)
    with pytest.raises(ConfigError, match="duplicates: keep"):
        grow(shop, duplicates="keep")
    clock = source().plain()
    clock["events"]["clock"] = {"unit": "order"}
    with pytest.raises(ConfigError, match="cannot be appended"):
        append_local(SourceConfig.parse(clock, "test"), Place.at(shop), Place.at(shop / "home"), now=NOW)
    base = Snapshot.open(Place.at(shop / "home"))
    write(shop, "e1.csv", [f"x{n},u1,i1,never,1" for n in range(3)])
    with pytest.raises(DataError, match="no events are left"):
        grow(shop)
    assert Snapshot.open(Place.at(shop / "home")).name == base.name
    assert [one.name for one in versions(Place.at(shop / "home"))] == [base.name]


def test_an_append_to_what_is_no_longer_the_latest_publishes_nothing(shop: Path) -> None:
    home = Place.at(shop / "home")
    base = Snapshot.open(home)
    write(shop, "e1.csv", lines(400, 405))
    newer = grow(shop)
    write(shop, "e2.csv", lines(405, 410))
    with pytest.raises(ArtifactError, match=f"{newer.name} became the latest.*Append again"):
        append_local(source(), Place.at(shop), home, parent=base, now=NOW)
    assert Snapshot.open(home).name == newer.name
    assert [child.name for child in (home / "snapshots").children() if "." not in child.name] == [base.name, newer.name]


def test_compaction_keeps_content_and_digest_splits_buckets_and_carries_what_came_meanwhile(shop: Path) -> None:
    home = Place.at(shop / "home")
    for number in range(10):
        write(shop, f"e{number + 1}.csv", lines(400 + 40 * number, 440 + 40 * number))
        grown = grow(shop)
    assert due(grown) is not None
    assert due(grown).startswith("10 layers")  # type: ignore[union-attr]
    base = compact(home)
    assert (base.num_buckets, grown.num_buckets, base.digest) == (8, 4, grown.digest)
    assert ids(base) == ids(grown)
    assert Snapshot.open(home).name == base.name
    assert due(base) is None
    assert base.report().events.rows_in == 800 == base.report().events.rows_clean
    assert compact(home).name == base.name
    write(shop, "e91.csv", lines(800, 804))
    first = grow(shop)
    write(shop, "e92.csv", lines(804, 808))
    second = grow(shop)
    under = compact(home, first.name)  # as if the second had been appended while the first was compacted
    assert Snapshot.open(home).name == second.name
    assert ids(under) == ids(first)


def test_what_is_appended_while_a_compaction_runs_lies_over_the_new_base(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maple.data import compact as module

    home = Place.at(shop / "home")
    write(shop, "e1.csv", lines(400, 405))
    grow(shop)
    rewritten = module._rewritten

    def meanwhile(*args: Any) -> Any:
        found = rewritten(*args)
        write(shop, "e2.csv", lines(405, 410))
        grow(shop)
        return found

    monkeypatch.setattr(module, "_rewritten", meanwhile)
    base = compact(home)
    now = Snapshot.open(home)
    assert (now.parent, now.num_events, base.num_events) == (base.name, 410, 405)
    assert ids(now) == [f"e{n:04d}" for n in range(410)]


def test_a_deleted_user_comes_out_of_no_version_and_leaves_no_trace_after_purging(shop: Path) -> None:
    home = Place.at(shop / "home")
    (shop / "users.csv").write_text("id,country\nu7,NL\nu8,DE\n")
    more = {"users": {"path": "users.csv", "columns": {"user_id": "id"}, "keep": ["country"]}}
    base = ingest_local(source(**more), Place.at(shop), home, rows_per_bucket=100, now=NOW)
    write(shop, "e1.csv", [*lines(400, 420), "bad,u7,i1,never,1"])
    child = grow(shop, **more)
    before = child.digest
    assert b"u7" not in b"".join(path.read_bytes() for path in (shop / "home").rglob("tombstones/*"))
    Tombstones.add(home, "u7")
    Tombstones.add(home, "u7")
    for snapshot, rows in ((Snapshot.open(home, base.name), 380), (Snapshot.open(home), 399)):
        assert "u7" not in snapshot.events()["user_id"].to_pylist()
        assert (snapshot.num_events, snapshot.events(columns=["item_id"]).num_rows) == (rows, rows)
        users = snapshot.users()
        assert users is not None
        assert users["user_id"].to_pylist() == ["u8"]
    now = Snapshot.open(home)
    assert now.digest != before
    assert "u7" not in now.quarantine()["user_id"].to_pylist()
    assert now.holds_deleted()
    write(shop, "e2.csv", lines(420, 440))
    again = grow(shop, **more)  # the user is in the file again
    assert (again.report().events.rows_deleted, again.report().events.rows_clean) == (1, 19)
    assert not any(name.startswith("snapshots/" + again.name) for name in purge(home, grace_s=0) if name != f"snapshots/{again.name}")
    left = Snapshot.open(home)
    assert left.parent is None
    assert not left.holds_deleted()
    assert [one.name for one in versions(home)] == [left.name]
    assert left.digest == again.digest
    assert _mentions(shop / "home", "u7") == []
    assert _mentions(shop / "home", "u8") != []


def _mentions(folder: Path, text: str) -> list[str]:
    """The files that hold a text as a value, Parquet and Arrow decoded, others as bytes."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".parquet":
            values = {str(value) for column in pq.read_table(path).columns for value in column.to_pylist()}
        elif path.suffix == ".arrow":
            values = {str(value) for column in pa.ipc.open_file(path).read_all().columns for value in column.to_pylist()}
        else:
            values = set(path.read_bytes().decode(errors="replace").replace(chr(34), " ").split())
        if text in values:
            found.append(str(path))
    return found


def test_purging_keeps_what_a_run_names_and_what_is_young(shop: Path) -> None:
    home = Place.at(shop / "home")
    first = Snapshot.open(home)
    others = [ingest_local(source(), Place.at(shop), home, rows_per_bucket=100, now=NOW) for _ in range(2)]
    (home / "runs/r1/manifest.json").write(json.dumps({"meta": {"snapshot": first.name}}).encode())
    assert purge(home) == []  # all are young
    assert purge(home, grace_s=0) == [f"snapshots/{others[0].name}"]
    assert [one.name for one in versions(home)] == [first.name, others[1].name]


def test_stitching_anew_moves_events_and_the_old_edges_take_it_back(tmp_path: Path) -> None:
    edges = pa.table({"device_id": ["u3", "u4"], "user_id": ["u1", "u1"]})
    (tmp_path / "ids.csv").write_text("device_id,user_id\nu3,u1\nu4,u1\n")
    write(tmp_path, "e0.csv", lines(0, 100))
    names = {name: name for name in ("device_id", "user_id")}
    config = source(identities={"path": "ids.csv", "columns": names})
    home = Place.at(tmp_path / "home")
    first = ingest_local(config, Place.at(tmp_path), home, rows_per_bucket=20, now=NOW)
    other = pa.table({"device_id": ["u4", "u9"], "user_id": ["u2", "u2"]})
    second = restitch(home, other)
    owners = {row["source_user_id"]: row["user_id"] for row in second.events().to_pylist()}
    assert {name: owner for name, owner in owners.items() if name != owner} == {"u4": "u2", "u9": "u2"}
    assert sum(entry.rows or 0 for name, entry in second.manifest.files.items() if name.startswith("events/")) == 15
    third = restitch(home, edges)
    assert [third.events([bucket]).to_pylist() for bucket in range(8)] == [first.events([bucket]).to_pylist() for bucket in range(8)]
    write(tmp_path, "e1.csv", lines(100, 120))
    whole = ingest_local(config, Place.at(tmp_path), Place.at(tmp_path / "whole"), rows_per_bucket=20, now=NOW)
    grown = append_local(config, Place.at(tmp_path), home, now=NOW)
    assert sorted(map(str, grown.events().to_pylist())) == sorted(map(str, whole.events().to_pylist()))
    assert compact(home).digest == grown.digest


def test_a_difference_counts_rows_users_items_kinds_and_days(shop: Path) -> None:
    base = Snapshot.open(Place.at(shop / "home"))
    write(shop, "e1.csv", ["n1,new,i1,2024-02-01,1", "n2,u1,i9,2024-02-01,1", "n3,u1,i1,2024-02-02,1"])
    child = grow(shop)
    found = diff(base, child)
    assert (found.added, found.removed, found.changed) == (3, 0, 0)
    assert (found.users_added, found.users_removed, found.items_added, found.items_removed) == (1, 0, 1, 0)
    assert found.kinds == {"purchase": (3, 0)}
    assert found.days == {"2024-02-01": (2, 0), "2024-02-02": (1, 0)}
    assert diff(child, base).removed == 3
    assert diff(child, child).added == 0


def test_a_dry_run_reports_and_leaves_nothing(shop: Path) -> None:
    before = sorted((shop / "home").rglob("*"))
    write(shop, "e1.csv", ["n1,,i1,2024-02-01,1", "n2,u1,i9,2024-02-01,1"])
    found = dry_run(source(), Place.at(shop), Place.at(shop / "home"), now=NOW)
    assert found.report.events.reasons == {"required:user_id": 1}
    assert found.examples["reason"].to_pylist() == ["required:user_id"]
    assert sorted((shop / "home").rglob("*")) == before


def test_what_a_dead_maker_left_is_swept_and_a_living_ones_draft_is_not(shop: Path) -> None:
    home = Place.at(shop / "home")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    for name, pid in (("20200101T000000-aaaaaa", int(dead.stdout)), ("20200101T000000-bbbbbb", os.getpid())):
        import psutil

        started = psutil.Process().create_time()
        host = os.uname().nodename
        (home / "snapshots" / name / MAKER).write(json.dumps({"host": host, "pid": pid, "started": started}).encode())
    (home / "snapshots" / "20200101T000000-cccccc/events/bucket=00000/part.parquet").write(b"torn")  # nobody knows whose
    with pytest.raises(ArtifactError, match="not a finished snapshot"):
        Snapshot.open(home, "20200101T000000-aaaaaa")
    assert sweep(home) == ["20200101T000000-aaaaaa"]
    assert len(versions(home)) == 1


def test_a_parent_that_was_replaced_is_noticed(shop: Path) -> None:
    home = Place.at(shop / "home")
    base = Snapshot.open(home)
    write(shop, "e1.csv", lines(400, 405))
    child = grow(shop)
    other = ingest_local(source(), Place.at(shop), home, rows_per_bucket=100, now=NOW)
    (base.folder / "manifest.json").write((other.folder / "manifest.json").read())
    with pytest.raises(ArtifactError, match="was replaced"):
        Snapshot.open(home, child.name)
    point(home, "snapshot", other.name)
    assert Snapshot.open(home).num_events == 405


def grown_old(home: Place, hours: float = 2.0) -> None:
    """As if everything in a home had been made some hours ago; what was the latest until now was."""
    for path in Path(home.path).glob("snapshots/*/manifest.json"):
        os.utime(path, (path.stat().st_mtime - 3600 * hours,) * 2)


def while_publishing(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Do something once, just before an append is published."""

    def meanwhile(*args: Any) -> None:
        monkeypatch.setattr("maple.data.ingest.tidy", tidy)
        act()
        tidy(*args)

    monkeypatch.setattr("maple.data.ingest.tidy", meanwhile)


@pytest.mark.parametrize("grace", [0.0, 3600.0])
def test_an_append_whose_parent_is_compacted_and_purged_meanwhile_lies_over_the_new_base(
    shop: Path, monkeypatch: pytest.MonkeyPatch, grace: float
) -> None:
    home = Place.at(shop / "home")
    write(shop, "e1.csv", lines(400, 405))
    under = grow(shop)
    grown_old(home)
    write(shop, "e2.csv", lines(405, 410))
    bases = []

    def act() -> None:
        bases.append(compact(home).name)
        # the parent was the latest until this moment: its grace begins now
        assert (f"snapshots/{under.name}" in purge(home, grace_s=grace)) == (grace == 0)

    while_publishing(monkeypatch, act)
    child = grow(shop)
    assert (child.parent, child.stack.layers[0].folder.name) == (bases[0], bases[0])
    now = Snapshot.open(home)
    assert now.name == child.name
    assert ids(now) == ids(child) == [f"e{n:04d}" for n in range(410)]
    assert compact(home).digest == now.digest


def test_an_append_over_what_has_other_buckets_meanwhile_is_refused_and_leaves_nothing(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Place.at(shop / "home")
    write(shop, "e1.csv", lines(400, 700))
    grow(shop)
    write(shop, "e2.csv", lines(700, 705))

    def act() -> None:
        compact(home)
        purge(home, grace_s=0)

    while_publishing(monkeypatch, act)
    with pytest.raises(ArtifactError, match=r"nothing was published\. Append again"):
        grow(shop)
    now = Snapshot.open(home)
    assert (now.parent, now.num_buckets) == (None, 8)
    assert [folder.name for folder in (home / "snapshots").children() if "." not in folder.name] == [now.name]
    assert grow(shop).num_events == 705


def test_the_grace_counts_from_when_a_snapshot_was_superseded(shop: Path) -> None:
    home = Place.at(shop / "home")
    first = Snapshot.open(home)
    grown_old(home)
    second = ingest_local(source(), Place.at(shop), home, rows_per_bucket=100, now=NOW)
    assert purge(home) == []  # the first is two hours old, but was the latest until now
    (first.folder / "superseded.json").write(b'{"at": 1.0}')
    assert purge(home) == [f"snapshots/{first.name}"]
    assert Snapshot.open(home).name == second.name


@pytest.mark.parametrize("compacted", [False, True])
def test_a_grown_file_sets_nothing_aside_twice(shop: Path, compacted: bool) -> None:
    home = Place.at(shop / "home")
    bad = [",u1,i1,never,1", "b1,,i1,2024-01-01,1", "e0003,u3,i3,2024-01-01T03:00:00,77", ",u2,i1,2024-01-01,nan", "b2,u4,,2024-01-01,"]
    write(shop, "e1.csv", [*lines(400, 405), *bad, "x1,u1,i1,2024-01-02,1", "x1,u1,i1,2024-01-02,2"])
    first = grow(shop)
    aside = first.quarantine()
    assert set(aside["reason"].to_pylist()) > {"conflict", "duplicate"}
    if compacted:
        compact(home)
    for more in (1, 2):
        wrong = [] if more == 1 else ["b9,u1,,2024-01-01,1"]
        rows = [*lines(400, 405), *bad, "x1,u1,i1,2024-01-02,1", "x1,u1,i1,2024-01-02,2", *lines(405, 405 + more), *wrong]
        write(shop, "e1.csv", rows)
        again = grow(shop)
        events = again.report().events
        assert (events.rows_clean, events.rows_quarantined, events.rows_known) == (1, len(wrong), len(rows) - 1 - len(wrong))
    assert again.quarantine().num_rows == aside.num_rows + 1
    write(shop, "e1.csv", [*lines(400, 405), *bad[:3], "b1,,i2,2024-01-01,1", *lines(410, 420)])  # other content in a row that was bad
    (row,) = [row for row in grow(shop).quarantine().to_pylist() if row["item_id"] == "i2"]
    assert row["reason"] == "required:user_id"


def test_items_and_users_that_leave_their_tables_leave_the_snapshot(tmp_path: Path) -> None:
    def tables(items: str, users: str) -> None:
        (tmp_path / "items.csv").write_text("id,title\n" + "".join(f"{item},title {item}\n" for item in items.split()))
        (tmp_path / "users.csv").write_text("id,country\n" + "".join(f"{user},NL\n" for user in users.split()))

    config = source(
        items={"path": "items.csv", "columns": {"item_id": "id", "title": "title"}},
        users={"path": "users.csv", "columns": {"user_id": "id"}, "keep": ["country"]},
    )
    root, home = Place.at(tmp_path), Place.at(tmp_path / "home")
    write(tmp_path, "e0.csv", lines(0, 20))
    tables("i1 i2 x1 x2", "u1 v1 v2")
    ingest_local(config, root, home, now=NOW)
    for items, users in (("i1 x2", "u1 v2"), ("i1 x1 x2", "u1 v1")):  # i2, which has events, and x1 leave; x1 comes back
        tables(items, users)
        child = append_local(config, root, home, now=NOW)  # no new events, but news all the same
        whole = ingest_local(config, root, Place.at(tmp_path / f"whole-{len(items)}"), now=NOW)
        assert child.items().to_pylist() == whole.items().to_pylist()
        assert child.users() == whole.users()
        assert append_local(config, root, home, now=NOW).name == child.name
    assert child.manifest.files["items.parquet"].rows == 1
    assert "left/items.parquet" not in child.manifest.files
    tables("i1", "u1")
    last = append_local(config, root, home, now=NOW)
    assert last.manifest.files["left/items.parquet"].rows == 2
    assert compact(home).items().to_pylist() == last.items().to_pylist()
    tables("i1", "u1 w1")
    append_local(config, root, home, now=NOW)
    tables("i1", "u1")
    append_local(config, root, home, now=NOW)
    Tombstones.add(home, "w1")  # nobody who can be seen, but still in a layer below and among those who left
    assert Snapshot.open(home).holds_deleted()
    purge(home, grace_s=0)
    assert _mentions(tmp_path / "home", "w1") == []


def test_compaction_keeps_the_rows_set_aside_of_all_layers_and_shows_some(tmp_path: Path) -> None:
    config = source(items={"path": "items.csv", "columns": {"item_id": "id", "title": "title"}})
    root, home = Place.at(tmp_path), Place.at(tmp_path / "home")
    for number, wrong in enumerate((",first\n", ",first\n,second\n", ",third\n")):
        (tmp_path / "items.csv").write_text("id,title\ni1,one\ni2,two\n" + wrong)
        write(tmp_path, f"e{number}.csv", [*lines(10 * number, 10 * number + 10), f"b{number},u1,gadget,never,1"])
        (append_local if number else ingest_local)(config, root, home, now=NOW)
    base = compact(home)
    table = base.stack.top.table("quarantine/items.parquet")
    assert table["title"].to_pylist() == ["first", "second", "third"]
    assert "gadget" in (base.folder / "report.html").read().decode()


def test_a_snapshot_that_cannot_be_read_is_listed_with_the_reason_and_no_empty_folder_stays(shop: Path) -> None:
    home = Place.at(shop / "home")
    base = Snapshot.open(home)
    assert not (base.folder / "scratch").exists()
    write(shop, "e1.csv", lines(400, 405))
    child = grow(shop)
    (base.folder / "manifest.json").write(b"torn")
    found = {one.name: one.unreadable for one in versions(home)}
    assert set(found) == {base.name, child.name}
    assert all("cannot be read" in why for why in found.values())


def test_an_id_that_came_deleted_stays_deleted_whoever_it_is_stitched_to(tmp_path: Path) -> None:
    home = Place.at(tmp_path)
    stones = Tombstones.add(home, "d1")
    table = pa.table({"user_id": ["ann", "ann", "bob"], "source_user_id": ["d1", "ann", "bob"]})
    assert stones.keep(table)["source_user_id"].to_pylist() == ["ann", "bob"]
