"""Where a file is cut never changes what is read: the same rows with the same numbers, for any size of fragments."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maple.artifacts import Place
from maple.data.report import FILE
from maple.data.sources import TableSource
from maple.data.tables import Tables
from maple.errors import DataError
from maple.schema import EVENTS

COLUMNS = {"user_id": "u", "item_id": "i", "timestamp": "t"}
CELLS = st.sampled_from(["a", "bb", "", '"q"', '"x,y"', '"two\nlines"', '"a ""b"" c"', 'in"ch', '"', " ", "é", "1", "\x0b", '"open'])
LINES = st.lists(st.lists(CELLS, min_size=0, max_size=4).map(",".join), max_size=8)


def rows(folder: str, source: dict[str, Any], size: int) -> tuple[list[dict[str, Any]], int, int]:
    table = TableSource.parse({"constants": {"event": "view"}, **source}, "test")
    tables = Tables.open((table,), EVENTS, Place.at(folder), fragment_bytes=size, fragment_rows=size)
    found = pa.concat_tables([tables.schema.empty_table(), *tables.batches()]).drop_columns([FILE])
    for one in tables.fragments:
        held = sum(part.num_rows for part in tables.read(one))
        assert held <= one.rows if source["path"].endswith(".jsonl") or (one.stop is None and one.groups is None) else held == one.rows
    return sorted(found.to_pylist(), key=lambda row: row["_row"]), len(tables.fragments), tables.num_rows


@settings(max_examples=80, deadline=None)
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), mark=st.booleans(), size=st.integers(1, 40))
@example(lines=['5" nail,"a', 'b",2'], end="\n", last=True, mark=False, size=1)
@example(lines=["", "a,b,c", "", "short", "d,e,f"], end="\r\n", last=False, mark=True, size=1)
def test_csv(lines: list[str], end: str, last: bool, mark: bool, size: int) -> None:
    text = ("\ufeff" if mark else "") + end.join(["u,i,t", *lines]) + (end if last or not lines else "")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "e.csv").write_bytes(text.encode())
        Path(folder, "z.csv.gz").write_bytes(gzip.compress(text.encode()))
        try:
            whole, count, _ = rows(folder, {"path": "z.csv.gz", "columns": COLUMNS}, 1 << 20)
        except DataError:
            with pytest.raises(DataError, match="never closes"):
                rows(folder, {"path": "e.csv", "columns": COLUMNS}, size)
            with pytest.raises(csv.Error):
                list(csv.reader(io.StringIO(text, newline=""), strict=True))
            return
        assert count == 1
        records = [record for record in csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")) if record]
        assert len(whole) == len(records) - 1  # every record is a row, good or not
        assert rows(folder, {"path": "e.csv", "columns": COLUMNS}, size)[0] == whole
        assert len({row["_row"] for row in whole}) == len(whole)


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(st.sampled_from(['{"u": "a", "i": 1, "t": "2024-01-01"}', '{"u": "é"}', "{broken", "", "[]", "x\x0by"]), max_size=8),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    size=st.integers(1, 60),
)
def test_json_lines(lines: list[str], end: str, size: int) -> None:
    text = end.join(['{"u": "a", "i": "b", "t": "2024-01-01"}', *lines])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "e.jsonl").write_bytes(text.encode())
        Path(folder, "z.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        whole = rows(folder, {"path": "z.jsonl.gz", "columns": COLUMNS}, 1 << 20)[0]
        assert rows(folder, {"path": "e.jsonl", "columns": COLUMNS}, size)[0] == whole
        assert [row["_row"] for row in whole] == [0, *(n for n, line in enumerate(lines, 1) if line)]


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(st.lists(st.sampled_from(["1", "22", "", "x"]), max_size=5).map(" ".join), min_size=1, max_size=8),
    size=st.integers(1, 30),
)
def test_lists(lines: list[str], size: int) -> None:
    source = {
        "path": "e.txt",
        "format": "lists",
        "columns": {"user_id": "user", "item_id": "item", "timestamp": "place"},
        "clock": {"unit": "order"},
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "e.txt").write_text("\n".join(["0 0", *lines]) + "\n")
        found = rows(folder, source, size)[0]
        expected: list[tuple[str | None, str | None]] = []
        for line in ["0 0", *lines]:
            user, *items = line.split() or [""]
            expected += [(user, item) for item in items] or ([(None, None)] if user else [])
        assert [(row["user_id"], row["item_id"]) for row in found] == expected
        assert [row["_row"] for row in found] == list(range(len(expected)))
        assert rows(folder, source, 1 << 20)[0] == found


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_parquet_row_groups_are_cut_too(tmp_path: Path, size: int) -> None:
    whole = pa.table({"u": [f"u{n}" for n in range(25)], "i": ["i"] * 25, "t": ["2024-01-01"] * 25})
    pq.write_table(whole, tmp_path / "e.parquet", row_group_size=10)
    found, count, total = rows(str(tmp_path), {"path": "e.parquet", "columns": COLUMNS}, size)
    assert [(row["user_id"], row["_row"]) for row in found] == [(f"u{n}", n) for n in range(25)]
    assert (count, total) == ({1: 25, 3: 10, 7: 5, 100: 1}[size], 25)


def test_a_large_csv_becomes_several_fragments_unless_its_quotes_hide_line_ends(tmp_path: Path) -> None:
    lines = [f"u{n},i{n % 7},2024-01-0{1 + n % 9}" for n in range(500)]
    (tmp_path / "plain.csv").write_text("u,i,t\n" + "\n".join(lines) + "\n")
    (tmp_path / "quoted.csv").write_text("u,i,t\n" + "\n".join(lines) + '\n"x\ny",i,2024-01-01\n')
    plain, quoted = (rows(str(tmp_path), {"path": name, "columns": COLUMNS}, 1000) for name in ("plain.csv", "quoted.csv"))
    assert plain[1] > 5
    assert (plain[2], len(plain[0])) == (500, 500)
    assert quoted[1] == 1
    assert quoted[0][:500] == plain[0]
