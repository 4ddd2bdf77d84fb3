"""Rows that could not be read: their whole text is kept, swallowed lines are told of, and a deletion blanks what may name the person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place
from maple.data.compact import compact
from maple.data.ingest import append_local, ingest_local
from maple.data.purge import purge
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.data.tombstones import Tombstones
from maple.errors import DataError

NOW = 1_800_000_000_000_000
HEAD = "id,who,what,when\n"


def source(**more: Any) -> SourceConfig:
    columns = {"event_id": "id", "user_id": "who", "item_id": "what", "timestamp": "when"}
    events = {"path": "e*.csv", "columns": columns, "constants": {"event": "purchase"}}
    return SourceConfig.parse({"name": "shop", "max_quarantined_share": 0.9, "events": events, **more}, "test")


def good(start: int, stop: int) -> str:
    return "".join(f"e{n},u{n % 5},i{n % 7},2024-01-{1 + n // 24:02d}T{n % 24:02d}:00:00\n" for n in range(start, stop))


def ingest(folder: Path, text: str, name: str = "e0.csv", **more: Any) -> Snapshot:
    (folder / name).write_text(HEAD + text)
    return ingest_local(source(**more), Place.at(folder), Place.at(folder / "home"), now=NOW)


def mentions(folder: Path, what: str) -> list[str]:
    return [str(path) for path in folder.rglob("*.parquet") if what in str(pq.read_table(path).to_pylist())]


@pytest.mark.parametrize("appended", [False, True])
def test_a_broken_line_of_a_deleted_user_leaves_no_trace(tmp_path: Path, appended: bool) -> None:
    home = Place.at(tmp_path / "home")
    broken = "e900,canary-7f3a,i1,2024-01-02T00:00:00,too,many\ne901,u1,i1,never\n"
    snapshot = ingest(tmp_path, good(0, 40) + ("" if appended else broken))
    if appended:
        (tmp_path / "e1.csv").write_text(HEAD + good(40, 60) + broken)
        snapshot = append_local(source(), Place.at(tmp_path), home, now=NOW)
    assert mentions(tmp_path / "home", "canary-7f3a")
    Tombstones.add(home, "canary-7f3a")
    aside = Snapshot.open(home, snapshot.name).quarantine().sort_by("row").to_pylist()
    assert [(row["reason"], row["user_id"], row["unreadable"]) for row in aside] == [
        ("unreadable", None, None),
        ("unreadable", "u1", "timestamp=never"),
    ]
    before = Snapshot.open(home).digest
    purge(home, grace_s=0)
    assert mentions(tmp_path / "home", "canary-7f3a") == []
    assert Snapshot.open(home).digest == before
    again = ingest_local(source(), Place.at(tmp_path), home, now=NOW)  # the files still name the user
    assert again.quarantine().num_rows == 2
    purge(home, grace_s=0)
    assert compact(home).name == again.name
    assert mentions(tmp_path / "home", "canary-7f3a") == []


def test_the_whole_text_of_a_record_is_kept_up_to_a_limit(tmp_path: Path) -> None:
    long = "x" * 5_000
    longer = "y" * 70_000
    snapshot = ingest(tmp_path, good(0, 40) + f"e900,u1,i1,2024-01-02,{long},end\ne901,u1,i1,2024-01-02,{longer},end\n")
    kept = snapshot.quarantine().sort_by("row")
    assert kept["reason"].to_pylist() == ["unreadable"] * 2
    short, cut = kept["unreadable"].to_pylist()
    assert short == f"line: e900,u1,i1,2024-01-02,{long},end"
    assert cut.startswith("line: e901,u1,i1,2024-01-02,yyy")
    assert cut.endswith("y ... and 4,490 more characters")


@pytest.mark.parametrize("closing", ['e903,u3,"i3,2024-01-02\n', 'e903,u3",i3,2024-01-02\n'])
def test_lines_that_an_open_quote_swallows_are_told_of(tmp_path: Path, closing: str) -> None:
    swallowed = 'e900,"u1,i1,2024-01-02\ne901,u1,i1,2024-01-02\ne902,u1,i1,2024-01-02\n' + closing
    snapshot = ingest(tmp_path, good(0, 20) + swallowed + good(20, 40))
    row = snapshot.quarantine().to_pylist()[0]
    assert (row["reason"], row["file"], row["row"]) == ("spanning_record", "e0.csv", 20)
    assert row["unreadable"].startswith("lines: 4 in one ")
    for part in ("e901,u1,i1,2024-01-02", "e902,u1,i1,2024-01-02", "e903,u3"):
        assert part in row["unreadable"]
    told = [found for found in snapshot.report().findings if found.check == "spanning_record"]
    assert [found.severity for found in told] == ["warn"]
    assert "row 21 of e0.csv" in told[0].message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "e0.csv").write_bytes((HEAD + good(0, 40)).encode(encoding))
    with pytest.raises(DataError, match=f"e0.csv.*declare `encoding: {encoding}`"):
        ingest_local(source(), Place.at(tmp_path), Place.at(tmp_path / "home"), now=NOW)


def test_unknown_event_kinds_are_named_with_what_to_write(tmp_path: Path) -> None:
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", "event": "e"}
    plain: dict[str, Any] = {"name": "shop", "events": {"path": "e.csv", "columns": columns, "clock": {"unit": "s"}}}
    rows = [f"u{n % 5},i{n % 7},{1_700_000_000 + n},{'buy' if n % 20 else 'view'}" for n in range(200)]
    (tmp_path / "e.csv").write_text("\n".join(["u,i,t,e", *rows]))
    root, home = Place.at(tmp_path), Place.at(tmp_path / "home")
    with pytest.raises(DataError, match=r"95\.0% of 200 rows.*'buy' \(190 rows\).*`values: \{event: \{\"buy\": purchase\}\}`"):
        ingest_local(SourceConfig.parse(plain, "test"), root, home, now=NOW)
    told = ingest_local(SourceConfig.parse({**plain, "max_quarantined_share": 1.0}, "test"), root, home, now=NOW).report().findings
    assert [found.severity for found in told if found.check == "known_event"] == ["warn"]
    plain["events"]["values"] = {"event": {"buy": "purchase"}}
    assert ingest_local(SourceConfig.parse(plain, "test"), root, home, now=NOW).report().events.kinds == {"purchase": 190, "view": 10}
