"""Deleting a user for good: ingested, appended, stored online, built into features; deleted and purged; then every file is searched.

Row ``data/delete-user/residual-hits``: files under the home that still hold the id, in any encoding that Maple writes. The same search
before the deletion has to find it.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from harness import row

from maple.artifacts import Place
from maple.data.ingest import append_local, ingest_local
from maple.data.presets import load_source
from maple.data.simulate import simulate, write
from maple.data.snapshot import Snapshot
from maple.features.build import build_local
from maple.features.spec import FeatureSpec

COMMAND = "python benchmarks/data.py --only deletion"
CANARY = "canary-6f1d2c"


def run(scratch: Path, users: int = 400) -> list[dict[str, Any]]:
    """The rows of this part."""
    folder = write(simulate(11, num_users=users), scratch / "shop")
    victim = _rename(folder)
    home = scratch / "home"
    source, root = load_source(str(folder))
    plain = source.plain()
    plain["events"]["path"] = "events*.parquet"
    (folder / "clicks.jsonl").write_text(  # a line that no parser can take apart names the user
        f'{{"who": "u1", "what": "i1", "at": "2024-01-01T00:00:00"}}\n{{"who": "{CANARY}", "what": broken\n'
    )
    clicks = {"path": "clicks.jsonl", "columns": {"user_id": "who", "item_id": "what", "timestamp": "at"}, "constants": {"event": "view"}}
    plain["events"] = [plain["events"], clicks]
    source = type(source).parse(plain, "benchmark")
    late = pq.read_table(folder / "events.parquet")
    cut = late.num_rows * 9 // 10
    pq.write_table(late.slice(0, cut), folder / "events.parquet")
    ingest_local(source, root, Place.at(home), rows_per_bucket=20_000)
    pq.write_table(late.slice(cut), folder / "events-2.parquet")
    snapshot = append_local(source, root, Place.at(home))
    build_local(snapshot, FeatureSpec(), Place.at(home))
    _store(home, snapshot)
    before = hits(home)
    assert before, "the search finds a user who is there"
    _maple(home, "users", "delete", CANARY, "--yes")
    hidden = CANARY not in Snapshot.open(Place.at(home)).events(columns=["user_id"])["user_id"].to_pylist()
    _maple(home, "snapshots", "purge", "--grace", "0")
    again = ingest_local(source, root, Place.at(home), rows_per_bucket=20_000)  # the raw files still name the user
    left = hits(home)
    for path in left:
        print(f"  still there: {path}")
    kept = again.num_events
    about = f"{len(before)} files before; {victim} rows of the user, {kept:,} events kept; hidden at once: {hidden}"
    return [row("data/delete-user/residual-hits", len(left), "files", about, None, COMMAND)]


def hits(home: Path) -> list[str]:
    """The files below a folder that hold the id."""
    return [str(path.relative_to(home)) for path in sorted(home.rglob("*")) if path.is_file() and any(map(_has, _contents(path)))]


def _has(data: bytes) -> bool:
    return CANARY.encode() in data or CANARY.encode("utf-16-le") in data or CANARY.encode().hex().encode() in data


def _contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what they say where they are packed."""
    raw = path.read_bytes()
    yield path.name.encode()
    yield raw
    if path.suffix == ".parquet":
        yield from _cells(pq.read_table(path))
    elif path.suffix == ".arrow":
        yield from _cells(pa.ipc.open_file(path).read_all())
    elif raw.startswith(b"SQLite format 3"):
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for record in connection.execute(f'SELECT * FROM "{table}"'):
                    for cell in record:
                        yield str(cell).encode()
                        if isinstance(cell, bytes):
                            yield from _unpacked(cell)
    else:
        yield from _unpacked(raw)


def _cells(table: pa.Table) -> Iterator[bytes]:
    for column in table.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            yield "\n".join(pc.unique(column.drop_null()).to_pylist()).encode()
        elif pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_dictionary(column.type):
            yield str(column.to_pylist()).encode()


def _unpacked(raw: bytes) -> Iterator[bytes]:
    try:
        yield str(msgpack.unpackb(raw, strict_map_key=False)).encode()
    except (ValueError, TypeError, msgpack.exceptions.UnpackException):  # not msgpack at all
        return


def _rename(folder: Path) -> int:
    """Make the busiest user of a shop's files the canary; how many rows it has."""
    events = pq.read_table(folder / "events.parquet")
    counts = pc.value_counts(events["customer"].combine_chunks().drop_null())
    most = counts.field("values")[pc.index(counts.field("counts"), pc.max(counts.field("counts"))).as_py()].as_py()
    for name, column in (("events", "customer"), ("users", "user_id")):
        table = pq.read_table(folder / f"{name}.parquet")
        ids = pc.if_else(pc.equal(table[column], most), CANARY, table[column])
        pq.write_table(table.set_column(table.column_names.index(column), column, ids), folder / f"{name}.parquet")
    return int(pc.max(counts.field("counts")).as_py())


def _store(home: Path, snapshot: Snapshot) -> None:
    """Put the snapshot's events into the online store of the home, as serving does."""
    from maple.serve.people import folds_nothing
    from maple.serve.settings import ServeSettings
    from maple.serve.stores import open_store

    store = open_store(ServeSettings.parse({"home": str(home)}, "serve"), folds_nothing())
    try:
        for bucket in range(snapshot.num_buckets):
            store.backfill(snapshot.events([bucket]))
    finally:
        store.close()


def _maple(home: Path, *arguments: str) -> None:
    command = [sys.executable, "-c", "from maple.cli import main; main()", "--home", str(home), *arguments]
    subprocess.run(command, check=True, env={**os.environ, "MAPLE_HOME": str(home)}, stdout=subprocess.DEVNULL)
