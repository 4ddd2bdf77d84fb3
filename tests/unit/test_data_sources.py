"""Sources: presets, mappings, readers of every format, unreadable cells, unsafe and broken files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place
from maple.data import presets
from maple.data.files import columns_of, open_parquet
from maple.data.presets import load_source
from maple.data.report import UNREADABLE
from maple.data.sources import SourceConfig, TableSource
from maple.data.tables import Tables
from maple.errors import ConfigError, DataError
from maple.schema import EVENTS, ITEMS

COLUMNS = {"user_id": "who", "item_id": "what", "timestamp": "when", "value": "amount"}
ROWS = [("u1", "i1", "2024-03-01T10:00:00", "2"), ("u2", "i2", "2024-03-01T11:30:00", "1.5")]


def events(path: str | tuple[str, ...], **more: Any) -> TableSource:
    return TableSource.parse({"path": path, "columns": COLUMNS, "constants": {"event": "purchase"}, **more}, "test")


def read(table: TableSource, folder: Path, schema: pa.Schema = EVENTS) -> pa.Table:
    return pa.concat_tables(list(opened(table, folder, schema).batches()))


def opened(table: TableSource, folder: Path, schema: pa.Schema = EVENTS) -> Tables:
    return Tables.open((table,), schema, Place.at(folder))


def lines(rows: Sequence[tuple[str, ...]], delimiter: str, head: tuple[str, ...] | None = ("who", "what", "when", "amount")) -> str:
    return "".join(delimiter.join(row) + "\n" for row in (*([head] if head else []), *rows))


def check(table: pa.Table) -> None:
    assert table["user_id"].to_pylist() == ["u1", "u2"]
    assert table["item_id"].to_pylist() == ["i1", "i2"]
    assert table["event"].to_pylist() == ["purchase", "purchase"]
    assert table["value"].to_pylist() == [2.0, 1.5]
    assert table["timestamp"].to_pylist() == [datetime(2024, 3, 1, 10, tzinfo=UTC), datetime(2024, 3, 1, 11, 30, tzinfo=UTC)]
    assert table["_row"].to_pylist() == [0, 1]
    assert table[UNREADABLE].null_count == 2


def test_each_format_gives_the_same_events(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(lines(ROWS, ","))
    (tmp_path / "e.tsv").write_text(lines(ROWS, "\t"))
    (tmp_path / "e.dat").write_text(lines(ROWS, "::", None))
    (tmp_path / "e.inter").write_text(lines(ROWS, "\t", ("who:token", "what:token", "when:token", "amount:float")))
    (tmp_path / "e.jsonl").write_text(
        "".join(json.dumps(dict(zip(("who", "what", "when", "amount"), row, strict=True))) + "\n" for row in ROWS)
    )
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(lines(ROWS, ",").encode()))
    pq.write_table(pa.table(dict(zip(("who", "what", "when", "amount"), zip(*ROWS, strict=True), strict=True))), tmp_path / "e.parquet")
    for name in ("e.csv", "e.tsv", "e.inter", "e.jsonl", "e.csv.gz", "e.parquet"):
        check(read(events(name), tmp_path))
    check(read(events("e.dat", header=["who", "what", "when", "amount"]), tmp_path))


def test_quoted_fields_may_hold_delimiters_and_newlines(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('who,what,when,amount\n"u,1","i\n1",2024-03-01,1\n')
    assert read(events("e.csv"), tmp_path).select(["user_id", "item_id"]).to_pylist() == [{"user_id": "u,1", "item_id": "i\n1"}]


@pytest.mark.parametrize(
    ("clock", "text"),
    [
        ({"unit": "iso"}, "2024-03-01T10:00:00Z"),
        ({"unit": "iso"}, "2024-03-01 12:00:00+02:00"),
        ({"unit": "iso", "timezone": "Europe/Berlin"}, "2024-03-01 11:00"),
        ({"unit": "s"}, "1709287200"),
        ({"unit": "s"}, "1709287200.0"),
        ({"unit": "ms"}, "1709287200000"),
        ({"unit": "us"}, "1709287200000000"),
        ({"unit": "strptime", "format": "%d/%m/%Y %H:%M"}, "01/03/2024 10:00"),
        ({"unit": "strptime", "format": "%d/%m/%Y %H:%M", "timezone": "America/New_York"}, "01/03/2024 05:00"),
    ],
)
def test_clocks(tmp_path: Path, clock: dict[str, str], text: str) -> None:
    (tmp_path / "e.csv").write_text(f"who,what,when,amount\nu,i,{text},1\nu,i,no time,1\n")
    table = read(events("e.csv", clock=clock), tmp_path)
    assert table["timestamp"].to_pylist() == [datetime(2024, 3, 1, 10, tzinfo=UTC), None]
    assert table[UNREADABLE].to_pylist() == [None, "timestamp=no time"]


def test_one_bad_cell_costs_one_row_and_says_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(
        "who,what,when,amount\nu,i,2024-13-45,1\nu,i,2024-01-01,many\nu,i,2024-01-01,1e999\nu,i,2024-01-01, 3 \nu,i,2024-01-01,\n"
    )
    table = read(events("e.csv"), tmp_path)
    assert table[UNREADABLE].to_pylist() == ["timestamp=2024-13-45", "value=many", "value=1e999", None, None]
    assert table["value"].to_pylist() == [1.0, None, None, 3.0, None]


@pytest.mark.parametrize(("name", "delimiter"), [("e.csv", ","), ("e.dat", "::"), ("e.inter", "\t")])
def test_lines_of_the_wrong_width_are_kept_as_unreadable_rows_with_their_numbers(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [
        ("u1", "i1", "2024-01-01", "1"),
        ("short",),
        ("u2", "i2", "2024-01-01", "1"),
        ("a", "b", "c", "d", "e"),
        ("u3", "i3", "2024-01-01", "1"),
    ]
    (tmp_path / name).write_text(lines(rows, delimiter))
    table = read(events(name, **({"header": ["who", "what", "when", "amount"]} if name == "e.dat" else {})), tmp_path)
    if name == "e.dat":  # its first line is data here, and its texts are no times
        table = table.filter(pa.array([row != 0 for row in table["_row"].to_pylist()]))
    by_row = {row["_row"] - (name == "e.dat"): row for row in table.to_pylist()}
    assert sorted(by_row) == [0, 1, 2, 3, 4]
    assert [by_row[row]["user_id"] for row in range(5)] == ["u1", None, "u2", None, "u3"]
    assert by_row[1][UNREADABLE] == "line: short"
    assert by_row[3][UNREADABLE] == f"line: {delimiter.join('abcde')}"


def test_a_header_row_of_data_without_header_is_declared(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(lines(ROWS, ",", None))
    check(read(events("e.csv", header=["who", "what", "when", "amount"]), tmp_path))


def test_jsonl_reads_numbers_as_ids_and_sets_broken_lines_aside(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(
        '{"who": 7, "what": "i", "when": "2024-01-01", "amount": 2}\n{broken\n\n[1]\n{"what": "i", "when": null, "amount": "\\ud800"}\n'
    )
    table = read(events("e.jsonl"), tmp_path).sort_by("_row")
    assert table["user_id"].to_pylist() == ["7", None, None, None]
    assert table["_row"].to_pylist() == [0, 1, 3, 4]
    surrogate = 'line: {"what": "i", "when": null, "amount": "\\ud800"}'  # has no UTF-8: as a "?" it could be somebody's id
    assert table[UNREADABLE].to_pylist() == [None, "line: {broken", "line: [1]", surrogate]


def test_values_ratios_extracts_types_and_nulls(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(
        "who,what,when,amount,kind,paid,film\n1,i,2024-01-01,2,buy,5,Heat (1995)\n1,NA,2024-01-01,0,look,5,Alien\n"
    )
    table = TableSource.parse(
        {
            "path": "e.csv", "columns": {**COLUMNS, "event": "kind"}, "values": {"event": {"buy": "purchase", "look": "view"}},
            "ratios": {"price": ["paid", "amount"]}, "extract": {"year": {"column": "film", "pattern": r"\((?P<value>\d{4})\)"}},
            "keep": {"film": "film"}, "types": {"year": "int"}, "nulls": ["", "NA"],
        },
        "test",
    )  # fmt: skip
    out = read(table, tmp_path)
    assert out["event"].to_pylist() == ["purchase", "view"]
    assert out["price"].to_pylist() == [2.5, None]
    assert out["year"].to_pylist() == [1995, None]
    assert out["film"].to_pylist() == ["Heat (1995)", "Alien"]
    assert out["item_id"].to_pylist() == ["i", None]
    assert out[UNREADABLE].null_count == 2


def test_parquet_ids_may_be_numbers_categories_or_floats_with_gaps(tmp_path: Path) -> None:
    raw = pa.table(
        {
            "who": pa.array([17850.0, None, 1.5]),
            "what": pa.array(["a", "b", "a"]).dictionary_encode(),
            "when": pa.array([datetime(2024, 1, 1)] * 3, pa.timestamp("ns")),
            "amount": pa.array([1, 2, 3], pa.int8()),
        }
    )
    pq.write_table(raw, tmp_path / "e.parquet")
    table = read(events("e.parquet"), tmp_path)
    assert table["user_id"].to_pylist() == ["17850", None, None]
    assert table[UNREADABLE].to_pylist() == [None, None, "user_id=1.5"]
    assert table["item_id"].to_pylist() == ["a", "b", "a"]


def test_globs_several_files_and_row_groups_number_their_rows(tmp_path: Path) -> None:
    (tmp_path / "day").mkdir()
    whole = pa.table({"who": [str(n) for n in range(10)], "what": ["i"] * 10, "when": ["2024-01-01"] * 10, "amount": [1.0] * 10})
    pq.write_table(whole, tmp_path / "day" / "b.parquet", row_group_size=2)
    pq.write_table(whole.slice(0, 3), tmp_path / "day" / "a.parquet")
    table = events("day/*.parquet")
    found = Tables.open((table,), EVENTS, Place.at(tmp_path), fragment_rows=4)
    assert [(part.label, part.groups, part.first) for part in found.fragments] == [
        ("day/a.parquet", (0,), 0), ("day/b.parquet", (0, 1), 0), ("day/b.parquet", (2, 3), 4), ("day/b.parquet", (4,), 8),
    ]  # fmt: skip
    out = pa.concat_tables(list(found.batches()))
    assert [int(who) for who in out["user_id"].to_pylist()] == out["_row"].to_pylist()
    assert out.schema == found.schema
    assert found.num_rows == out.num_rows == 13


def test_files_that_disagree_on_a_kept_column_are_refused(tmp_path: Path) -> None:
    base = {"who": ["u"], "what": ["i"], "when": ["2024-01-01"], "amount": [1.0]}
    pq.write_table(pa.table({**base, "x": ["text"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({**base, "x": [1]}), tmp_path / "b.parquet")
    table = events("*.parquet", keep=["x"])
    with pytest.raises(DataError, match=r"'x' is string in a\.parquet but int64 in b\.parquet"):
        opened(table, tmp_path)


def test_latin_text_needs_its_encoding_declared(tmp_path: Path) -> None:
    (tmp_path / "e.dat").write_bytes("u::Café::2024-01-01::1\n".encode("latin-1"))
    header = ["who", "what", "when", "amount"]
    with pytest.raises(DataError, match=r"e\.dat .*utf-8.*encoding"):
        read(events("e.dat", header=header), tmp_path)
    assert read(events("e.dat", header=header, encoding="latin-1"), tmp_path)["item_id"].to_pylist() == ["Café"]
    (tmp_path / "e.csv").write_bytes("who,what,when,amount\nu,Café,2024-01-01,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"encoding"):
        read(events("e.csv"), tmp_path)
    assert read(events("e.csv", encoding="latin-1"), tmp_path)["item_id"].to_pylist() == ["Café"]


# -- what cannot be used ------------------------------------------------------------------------------------------------


def test_missing_empty_and_unmatched_files(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a\n")
    with pytest.raises(DataError, match=r"gone\.csv does not exist.*has: other\.csv"):
        opened(events("gone.csv"), tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        opened(events("*.tsv"), tmp_path)
    (tmp_path / "void.csv").touch()
    with pytest.raises(DataError, match="is empty"):
        opened(events("void.csv"), tmp_path)


def test_an_unknown_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("who,what,whem,amount\nu,i,2024-01-01,1\n")
    with pytest.raises(DataError, match=r"e\.csv: unknown column 'when'\. Did you mean 'whem'"):
        opened(events("e.csv"), tmp_path)
    pq.write_table(pa.table({"who": ["u"], "what": ["i"], "when": ["x"]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="unknown column 'amount'"):
        opened(events("e.parquet"), tmp_path)


def test_a_column_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    base = {"who": pa.array(["u"]), "what": pa.array(["i"]), "when": pa.array([True]), "amount": pa.array([1.0])}
    pq.write_table(pa.table(base), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="'timestamp' is bool, but a time is needed"):
        read(events("e.parquet"), tmp_path)
    pq.write_table(pa.table({**base, "when": pa.array([1700000000])}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="declare under `clock:`"):
        read(events("e.parquet"), tmp_path)
    pq.write_table(pa.table({**base, "when": pa.array([{"a": 1}])}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="which Maple does not read"):
        read(events("e.parquet"), tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "tiny"])
def test_a_damaged_parquet_file_is_a_data_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"who": ["u"] * 500, "what": ["i"] * 500, "when": ["2024-01-01"] * 500, "amount": [1.0] * 500}), path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "garbage": b"PAR1" + b"\x00" * 200 + b"\x10\x00\x00\x00PAR1",
            "flipped": data[:4] + bytes(byte ^ 0xFF for byte in data[4:60]) + data[60:],
            "tiny": b"PAR1",
        }[damage]
    )
    with pytest.raises(DataError, match=r"e\.parquet"):
        read(events("e.parquet"), tmp_path)


def test_a_parquet_file_with_extension_types_is_refused_before_it_can_run_code(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.int64(), "maple.test.trap")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"code"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Trap:
            ran.touch()
            return cls()

    pa.register_extension_type(Trap())
    try:
        trapped = pa.ExtensionArray.from_storage(Trap(), pa.array([1]))
        pq.write_table(
            pa.table({"who": ["u"], "what": ["i"], "when": ["2024-01-01"], "amount": [1.0], "unused": trapped}), tmp_path / "e.parquet"
        )
        assert not ran.exists()
        pq.read_schema(tmp_path / "e.parquet")
        assert ran.exists(), "the trap works: an ordinary reader runs it"
        ran.unlink()
        with pytest.raises(DataError, match="extension types"):
            opened(events("e.parquet"), tmp_path)
        with pytest.raises(DataError, match="extension types"):
            columns_of(Place.at(tmp_path / "e.parquet"))
        assert not ran.exists()
    finally:
        pa.unregister_extension_type("maple.test.trap")


def test_the_extension_check_finds_every_alignment_of_the_stored_schema(tmp_path: Path) -> None:
    for padding in range(8):
        field = pa.field(
            "x" * (padding + 1), pa.int64(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor_v2", "ARROW:extension:metadata": "x"}
        )
        pq.write_table(pa.table([pa.array([1])], schema=pa.schema([field])), tmp_path / "e.parquet")
        with pytest.raises(DataError, match="extension types"):
            open_parquet(Place.at(tmp_path / "e.parquet"), "e.parquet")


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"path": "../e.csv"}, "inside the data folder"),
        ({"path": "/etc/passwd"}, "inside the data folder"),
        ({"colums": {}}, "Did you mean 'columns'"),
        ({"clock": {"unit": "strptime"}}, "strptime needs it"),
        ({"clock": {"timezone": "Mars/Olympus"}}, "unknown timezone"),
        ({"encoding": "utf-99"}, "unknown text encoding"),
        ({"keep": {"user_id": "x"}}, "declared twice"),
        ({"keep": {"_row": "x"}}, "reserved"),
        ({"extract": {"x": {"column": "who", "pattern": "(a)"}}}, r"\(\?P<value>"),
        ({"rules": [{"kind": "pattern", "column": "item_id", "matches": "("}]}, "not a regular expression"),
        ({"rules": [{"kind": "range", "column": "price"}]}, "min"),
        ({"rules": [{"kind": "required", "column": "x", "action": "convert"}]}, "convert"),
        ({"rules": [{"kind": "guess", "column": "x"}]}, "guess"),
    ],
)
def test_wrong_table_settings_say_what_is_wrong(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        events("e.csv", **{key: value for key, value in change.items() if key != "path"}) if "path" not in change else events(
            change["path"]
        )


def test_a_source_must_map_the_required_columns() -> None:
    with pytest.raises(ConfigError, match="map a column to 'timestamp'"):
        SourceConfig.parse(
            {"events": {"path": "e.csv", "columns": {"user_id": "u", "item_id": "i"}, "constants": {"event": "purchase"}}}, "test"
        )
    with pytest.raises(ConfigError, match=r"unknown event type 'purchse'\. Did you mean 'purchase'"):
        SourceConfig.parse({"events": {"path": "e.csv", "columns": COLUMNS, "constants": {"event": "x"}}, "targets": ["purchse"]}, "test")


def test_a_folder_uses_its_own_yaml_then_its_name_and_else_advises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAPLE_DATA", raising=False)
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    source, root = load_source(str(folder))
    assert (source.name, root.path) == ("ml-100k", str(folder))
    (folder / "source.yaml").write_text(
        "name: mine\nevents: {path: e.csv, columns: {user_id: who, item_id: what, timestamp: when}, constants: {event: view}}\n"
    )
    assert load_source(str(folder))[0].name == "mine"
    assert load_source(str(folder / "source.yaml"))[1].path == str(folder)
    assert load_source("ml-100k", folder)[0].name == "ml-100k"
    other = tmp_path / "shop"
    other.mkdir()
    with pytest.raises(ConfigError, match="holds no table"):
        load_source(str(other))
    (other / "orders.csv").write_text("client;article\n1;2\n")
    with pytest.raises(ConfigError, match=r"(?s)no source.yaml.*orders.csv: client;article.*path: orders.csv"):
        load_source(str(other))
    with pytest.raises(ConfigError, match=r"unknown source preset 'online-retial'\. Did you mean 'online-retail'"):
        load_source("online-retial")
    with pytest.raises(ConfigError, match="MAPLE_DATA"):
        load_source("online-retail")
    with pytest.raises(ConfigError, match="does not exist"):
        load_source(str(tmp_path / "nowhere" / "x"))


def test_every_preset_parses() -> None:
    assert presets.names() == ["amazon-beauty", "complete-journey", "gowalla", "ml-100k", "ml-1m", "online-retail"]
    for name in presets.names():
        assert load_source(name, "/")[0].name == name


def test_preset_tables_of_the_real_sets(data_dir: Path) -> None:
    rows = {
        "online-retail": (541_909, 0), "complete-journey": (75_000, 92_331), "ml-100k": (100_000, 1_682), "ml-1m": (1_000_209, 3_883),
        "gowalla": (810_128 + 217_242, 0), "amazon-beauty": (198_502, 0),
    }  # fmt: skip
    for name, (num_events, num_items) in rows.items():
        source, root = load_source(str(data_dir / name))
        table = pa.concat_tables([part.select(["user_id", UNREADABLE]) for part in Tables.open(source.events, EVENTS, root).batches()])
        assert (table.num_rows, table[UNREADABLE].null_count) == (num_events, num_events)
        if source.items is not None:
            assert read(source.items, data_dir / name, ITEMS).num_rows == num_items
