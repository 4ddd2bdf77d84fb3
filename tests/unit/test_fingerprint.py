"""Whether a file is the one that was read is told by its content, not by the moment it was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maple.artifacts import Place
from maple.data import ingest
from maple.data.ingest import append_local, fingerprint, ingest_local
from maple.data.sources import SourceConfig

ROWS = [f"u{k % 50},i{k % 40},{1_700_000_000 + k * 60},1" for k in range(12_000)]


def write(folder: Path, rows: list[str]) -> None:
    (folder / "e.csv").write_text("u,i,t,q\n" + "\n".join(rows) + "\n")


def test_a_row_corrected_in_place_is_seen(tmp_path: Path) -> None:
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", "value": "q"}
    events = {"path": "e*.csv", "columns": columns, "constants": {"event": "purchase"}, "clock": {"unit": "s"}}
    source = SourceConfig.parse({"name": "b", "events": events}, "test")
    root, home = Place.at(tmp_path), Place.at(tmp_path / "home")
    write(tmp_path, ROWS)
    first = ingest_local(source, root, home)
    os.utime(tmp_path / "e.csv", (1, 1))
    assert append_local(source, root, home).name == first.name
    write(tmp_path, [*ROWS[:4700], ROWS[4700][:-1] + "9", *ROWS[4701:]])
    assert 9.0 in append_local(source, root, home).events()["value"].to_pylist()


def test_every_byte_of_a_small_file_counts_and_of_a_large_one_size_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(data: bytes) -> str:
        (tmp_path / "f").write_bytes(data)
        return fingerprint(Place.at(tmp_path / "f"))

    data = bytes(200_000)
    assert of(data) == of(data)
    assert len({of(data[:at] + b"x" + data[at + 1 :]) for at in (0, 1, 70_001, 199_999)} | {of(data), of(data[:-1])}) == 6
    monkeypatch.setattr(ingest, "HASHED", 1000)
    monkeypatch.setattr(ingest, "SAMPLE", 100)
    assert len({of(data[:at] + b"x" + data[at + 1 :]) for at in (0, 200_000 // 64 * 3, 199_999)} | {of(data), of(data[:-1])}) == 5
    assert of(data[:101] + b"x" + data[102:]) == of(data)  # as documented
