"""A shop with several tables: joins, exchange rates, units, rules of each table, and any file system."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.report import UNREADABLE
from maple.data.sources import SourceConfig, TableSource
from maple.data.tables import RuleBook, Tables
from maple.errors import ConfigError, DataError
from maple.schema import EVENTS

NOW = 1_800_000_000_000_000

#: A shop whose clicks, orders and order lines lie in files of three kinds.
SHOP = """
name: three-tables
events:
  - path: clicks.jsonl
    columns: {user_id: visitor.id, item_id: sku, timestamp: at}
    constants: {event: view}
    clock: {unit: ms}
  - path: order_lines.parquet
    join: {path: orders.csv, key: order_id, take: [customer, placed_at, currency]}
    columns: {user_id: customer, item_id: sku, timestamp: placed_at, value: quantity, price: unit_price, session_id: order_id}
    constants: {event: purchase}
    currencies: {column: currency, to: EUR, rates: {GBP: 1.25}}
    rules:
      - {name: no_quantity, kind: range, column: value, min: 0, exclusive: true}
identities:
  path: devices.csv
  columns: {device_id: cookie, user_id: customer}
"""


def shop(folder: Path) -> None:
    clicks = [
        {"visitor": {"id": "c1"}, "sku": "a", "at": 1_704_100_000_000}, {"visitor": {"id": "ann"}, "sku": "b", "at": 1_704_200_000_000},
        {"visitor": {}, "sku": "b", "at": 1_704_200_000_000},
    ]  # fmt: skip
    (folder / "clicks.jsonl").write_text("".join(json.dumps(click) + "\n" for click in clicks))
    (folder / "orders.csv").write_text(
        "order_id,customer,placed_at,currency\n1,ann,2024-01-02T10:00:00Z,EUR\n2,bob,2024-01-03T10:00:00Z,GBP\n3,cyd,2024-01-04,USD\n"
        "4,dan,2024-01-05,EUR\n4,eve,2024-01-05,EUR\n2,bob,2024-01-03T10:00:00Z,GBP\n"
    )
    lines = {
        "order_id": [1, 1, 2, 3, 4, 9, None], "sku": ["a", "b", "a", "a", "a", "a", "a"], "quantity": [1, 0, 2, 1, 1, 1, 1],
        "unit_price": [4.0] * 7,
    }  # fmt: skip
    pq.write_table(pa.table(lines), folder / "order_lines.parquet")
    (folder / "devices.csv").write_text("cookie,customer\nc1,ann\n")


def test_a_shop_of_three_tables(tmp_path: Path) -> None:
    shop(tmp_path)
    (tmp_path / "source.yaml").write_text(SHOP)
    source, root = load_source(str(tmp_path))
    assert SourceConfig.parse(source.plain(), "again") == source
    tables = Tables.open(source.events, EVENTS, root)
    assert [(part.label, part.table) for part in tables.fragments] == [("clicks.jsonl", 0), ("order_lines.parquet", 1)]
    rows = pa.concat_tables(list(tables.batches()))
    assert rows.schema == tables.schema
    assert rows["user_id"].to_pylist() == ["c1", "ann", None, "ann", "ann", "bob", "cyd", None, None, None]
    assert rows["price"].to_pylist() == [None, None, None, 4.0, 4.0, 5.0, 4.0, 4.0, 4.0, 4.0]
    assert rows["session_id"].to_pylist()[3:6] == ["1", "1", "2"]
    assert rows[UNREADABLE].to_pylist()[6:] == [
        "currency: currency=USD", "join: several different rows in orders.csv for order_id=4", "join: no row in orders.csv for order_id=9",
        "join: no row in orders.csv for order_id=(nothing)",
    ]  # fmt: skip
    book = RuleBook.of(tables, ids=("user_id", "item_id"), events=True)
    judged = [book.judge(part.table, pa.concat_tables(list(tables.read(part))), now=NOW) for part in tables.fragments]
    reasons = [[None if place < 0 else book.names[place] for place in found.reason] for found in judged]
    assert reasons[0] == [None, None, "required:user_id"]  # the rule about quantities is not theirs
    assert reasons[1] == [None, "no_quantity", None, "unknown_currency", "unmatched_join", "unmatched_join", "unmatched_join"]
    fired = {
        name: sum(int(bits >> place & 1) for found in judged for bits in found.fired.tolist()) for place, name in enumerate(book.names)
    }
    assert (fired["required:user_id"], fired["no_quantity"], fired["unmatched_join"], fired["unreadable"]) == (4, 1, 3, 4)


def test_its_ingestion_accounts_for_every_row(tmp_path: Path) -> None:
    shop(tmp_path)
    (tmp_path / "source.yaml").write_text(SHOP + "max_quarantined_share: 0.9\n")
    source, root = load_source(str(tmp_path))
    snapshot = ingest_local(source, root, Place.at(tmp_path / "home"), now=NOW)
    assert snapshot.num_events + snapshot.quarantine().num_rows == 10
    assert snapshot.report().events.files == {"clicks.jsonl": 3, "order_lines.parquet": 7}
    assert sorted(snapshot.quarantine()["reason"].to_pylist()) == sorted(
        ["required:user_id", "no_quantity", "unknown_currency", *["unmatched_join"] * 3]
    )


# -- settings ----------------------------------------------------------------------------------------------------------


def table(**more: Any) -> TableSource:
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", "value": "q", "price": "p"}
    return TableSource.parse({"path": "e.csv", "columns": columns, "constants": {"event": "purchase"}, **more}, "test")


def read(folder: Path, *tables: TableSource) -> pa.Table:
    return pa.concat_tables(list(Tables.open(tables, EVENTS, Place.at(folder)).batches()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"join": {"path": "o.csv", "kee": "x", "take": ["a"]}}, r"'join\.0\.kee'\. Did you mean 'key'"),
        ({"currencies": {"colum": "c", "to": "EUR", "rates": {"GBP": 1}}}, r"'currencies\.colum'\. Did you mean 'column'"),
        (
            {"join": [{"path": "o.csv", "key": "x", "take": ["a"]}, {"path": "o.csv", "key": "x", "take": ["a"]}]},
            "two joins give a column 'a'",
        ),
        ({"currencies": {"column": "c", "to": "EUR"}}, "either `rates:` or"),
        ({"currencies": {"column": "c", "to": "EUR", "rates": {"GBP": 0}}}, "greater than 0"),
        ({"currencies": {"column": "c", "to": "EUR", "rates": {"GBP": 1}, "applies_to": "prise"}}, "Did you mean 'price'"),
        ({"units": {"column": "c", "factors": {}}}, "at least 1 item"),
        ({"path": "http://example.org/e.csv"}, "reads no http:// addresses"),
        ({"path": ["e.csv", "hf://datasets/x/e.csv"]}, "reads no hf:// addresses"),
    ],
)
def test_wrong_settings_say_what_is_wrong(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        table(**change)


def test_sources_check_their_tables_together() -> None:
    plain = table().plain()
    with pytest.raises(ConfigError, match=r"events\[1\]: map a column to 'user_id'"):
        SourceConfig.parse({"events": [plain, {"path": "x.csv", "columns": {"item_id": "i"}}]}, "test")
    with pytest.raises(ConfigError, match="cannot be mixed"):
        SourceConfig.parse({"events": [plain, {**plain, "clock": {"unit": "order"}}]}, "test")
    with pytest.raises(ConfigError, match="identities: map a column to 'device_id'"):
        SourceConfig.parse({"events": plain, "identities": {"path": "d.csv", "columns": {"user_id": "u"}}}, "test")
    assert SourceConfig.parse({"events": plain}, "test").plain()["events"] == plain
    assert len(SourceConfig.parse({"events": [plain, plain]}, "test").plain()["events"]) == 2


def test_a_rule_judges_columns_of_its_own_table(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("u,i,t,q,p\n")
    rule = {"kind": "required", "column": "colour"}
    tables = Tables.open((table(keep={"colour": "q"}), table(rules=[rule])), EVENTS, Place.at(tmp_path))
    with pytest.raises(ConfigError, match="'colour', which events do not have"):
        RuleBook.of(tables, ids=("user_id", "item_id"), events=True)


# -- joins, rates, units, lists ------------------------------------------------------------------------------------------


def test_a_join_may_have_several_keys_of_other_names_and_other_types(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("shop,no,i,t,q,p\nx,1,a,2024-01-01,1,1\nx,2,a,2024-01-01,1,1\ny,1,a,2024-01-01,1,1\n")
    pq.write_table(
        pa.table({"store": ["x", "y"], "number": [1.0, 1.0], "client": ["ann", "bob"], "u": ["no", "no"]}), tmp_path / "o.parquet"
    )
    join = {"path": "o.parquet", "key": {"shop": "store", "no": "number"}, "take": {"u": "client"}}
    assert read(tmp_path, table(join=join))["user_id"].to_pylist() == ["ann", None, "bob"]
    with pytest.raises(DataError, match=r"o\.parquet: unknown column 'clint'\. Did you mean 'client'"):
        read(tmp_path, table(join={**join, "take": {"u": "clint"}}))


def test_rates_by_day_use_the_last_known_one(tmp_path: Path) -> None:
    days = ["2024-01-01", "2024-01-03", "2024-01-04T23:59", "2024-01-09", "2023-12-31"]
    (tmp_path / "e.csv").write_text(
        "u,i,t,q,p,c\n" + "".join(f"u,i,{day},1,10,GBP\n" for day in days) + "u,i,2024-01-01,1,10,EUR\nu,i,2024-01-01,1,,XXX\n"
    )
    (tmp_path / "rates.csv").write_text("date,currency,rate\n2024-01-03,GBP,1.2\n2024-01-01,GBP,1.1\n2024-01-05,GBP,1.3\n")
    daily = {"column": "c", "to": "EUR", "daily": {"path": "rates.csv"}}
    found = read(tmp_path, table(currencies=daily))
    assert found["price"].to_pylist() == pytest.approx([11.0, 12.0, 12.0, 13.0, 10.0, 10.0, None])
    assert found[UNREADABLE].to_pylist() == [None] * 4 + ["currency: c=GBP", None, None]  # no amount, nothing to convert
    (tmp_path / "rates.csv").write_text("date,currency,rate\n2024-01-03,GBP,1.2\n2024-01-04,GBP,-1\n")
    with pytest.raises(DataError, match=r"row 2 of rates\.csv is no exchange rate"):
        read(tmp_path, table(currencies=daily))


def test_units_become_one(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("u,i,t,q,p,c\nu,i,2024-01-01,2,1,kg\nu,i,2024-01-01,5,1, g \nu,i,2024-01-01,5,1,lb\n")
    found = read(tmp_path, table(units={"column": "c", "factors": {"kg": 1000, "g": 1}}))
    assert found["value"].to_pylist() == [2000.0, 5.0, 5.0]
    assert found[UNREADABLE].to_pylist() == [None, None, "unit: c=lb"]


def test_lists_in_texts_and_in_json(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("u,i,t,q,p,tags,v\nu,i,2024-01-01,2,1,a|b c,1|x\nu,i,2024-01-01,2,1,,1.5|2\n")
    more = {"keep": ["tags", "v"], "types": {"tags": "strings", "v": "floats"}, "separator": "|"}
    found = read(tmp_path, table(**more))
    assert found.select(["tags", "v", UNREADABLE]).to_pylist() == [
        {"tags": ["a", "b c"], "v": None, UNREADABLE: "v=1|x"}, {"tags": None, "v": [1.5, 2.0], UNREADABLE: None},
    ]  # fmt: skip
    (tmp_path / "e.jsonl").write_text(
        '{"u": "u", "i": ["a", "b"], "t": "2024-01-01", "q": 1, "p": 1, "tags": ["a|b", "c"], "v": [1, 2.5]}\n'
    )
    found = read(tmp_path, table(path="e.jsonl", **more))
    assert found.select(["tags", "v"]).to_pylist() == [{"tags": ["a|b", "c"], "v": [1.0, 2.5]}]
    assert "\x1f" in found["item_id"][0].as_py()  # a list is no id: the rule about ids sets the row aside


# -- file systems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "file", "subtree", "mock", "fsspec"])
def test_any_file_system(tmp_path: Path, kind: str) -> None:
    content = b"u,i,t,q,p\n" + b"".join(b"u%d,i,2024-01-01,1,1\n" % n for n in range(50))
    at: Place
    if kind in ("local", "file"):
        at = Place.at(tmp_path if kind == "local" else f"file://{tmp_path}")
    elif kind == "subtree":
        at = Place(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "deep")
    elif kind == "mock":
        at = Place(pafs._MockFileSystem(current_time=datetime(2024, 1, 1, tzinfo=UTC)), "bucket/shop")
    else:
        at = Place(pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory"))), f"{tmp_path}/shop")
    (at / "day" / "e.csv").write(content)
    pq_bytes = pa.BufferOutputStream()
    pq.write_table(pa.table({"u": ["v"], "i": ["i"], "t": ["2024-01-01"], "q": [1], "p": [1]}), pq_bytes)
    (at / "day" / "e.parquet").write(pq_bytes.getvalue().to_pybytes())
    made = Tables.open((table(path="day/*"),), EVENTS, at, fragment_bytes=100)
    assert len(made.fragments) > 5
    assert sorted({part.label for part in made.fragments}) == ["day/e.csv", "day/e.parquet"]
    found = pa.concat_tables(list(made.batches()))
    assert found["user_id"].to_pylist() == [*(f"u{n}" for n in range(50)), "v"]
    assert made.file_columns()["u"] == "string | text"


def test_a_path_may_be_a_uri(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("u,i,t,q,p\nu,i,2024-01-01,1,1\n")
    elsewhere = Place.at(tmp_path / "elsewhere")
    for path in (f"file://{tmp_path}/e.csv", f"file://{tmp_path}/*.csv"):
        made = Tables.open((table(path=path),), EVENTS, elsewhere)
        assert [part.label for part in made.fragments] == [f"file://{tmp_path}/e.csv"]
        assert made.num_rows == 1
