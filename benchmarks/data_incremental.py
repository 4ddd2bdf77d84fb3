"""Appending the last 1 % of a shop's events against ingesting everything, Ray warm: time and bytes, both by the public functions.

Rows: ``data/ingest/incremental-1pct/time-over-full`` and ``.../bytes-over-full``; beside them the same with 1 % late events drawn from the
whole period, which change old sessions, and the time of compacting the two layers.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import row

from maple.artifacts import Place, point
from maple.cluster_ray import start_local, stop_local
from maple.data.compact import compact
from maple.data.presets import load_source
from maple.data.simulate import simulate, write
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.hashing import rng

USERS, ITEMS, DAYS = 22_000, 5_000, 120  # about 4.5 million events
COMMAND = "python benchmarks/data.py --only incremental"
REPEATS = 3


def run(scratch: Path, users: int = USERS) -> list[dict[str, Any]]:
    """The rows of this part."""
    start_local(object_store_bytes=512 << 20, dashboard=False)
    try:
        from maple.data.ingest_ray import append, ingest

        small = write(simulate(1, num_users=300), scratch / "small")
        source, root = load_source(str(small))
        ingest(source, root, Place.at(scratch / "warm"))  # Ray's workers are up and have imported everything
        folder = write(simulate(3, num_users=users, num_items=ITEMS, days=DAYS), scratch / "shop")
        events = pq.read_table(folder / "events.parquet").sort_by("at")
        (folder / "events.parquet").unlink()
        rows = []
        for name, late in (("", False), ("-late", True)):
            first, second = _cut(events, late)
            pq.write_table(first, folder / "part-0.parquet", compression="zstd")
            pq.write_table(second, folder / "part-1.parquet", compression="zstd")
            home = Place.at(scratch / f"home{name}")
            base = ingest(_source(folder, "part-0.parquet"), Place.at(folder), home)
            whole_time, whole = _timed(lambda: ingest(_source(folder, "part-*.parquet"), Place.at(folder), Place.at(scratch / "whole")))

            def grow(home: Place = home, base: Snapshot = base) -> Snapshot:
                point(home, "snapshot", base.name)
                return append(_source(folder, "part-*.parquet"), Place.at(folder), home)

            append_time, child = _timed(grow)
            assert child.num_events == whole.num_events, "both have the same events"
            rows += _rows(name, append_time, whole_time, child, whole, second.num_rows)
            if not late:
                started = time.perf_counter()
                compact(home)
                about = f"the full ingestion in s; {whole.num_events:,} events, 2 layers, one process"
                rows.append(row("data/compact/time-over-full", time.perf_counter() - started, "s", about, whole_time, COMMAND))
            shutil.rmtree(scratch / "whole")
        return rows
    finally:
        stop_local()


def _rows(name: str, append_time: float, whole_time: float, child: Snapshot, whole: Snapshot, batch: int) -> list[dict[str, Any]]:
    about = f"{'late events of all times' if name else 'the last events'}, {batch:,} of {whole.num_events:,}"
    prefix = f"data/ingest/incremental-1pct{name}"
    size, whole_size = (_bytes(Path(snapshot.folder.path)) for snapshot in (child, whole))
    return [
        row(f"{prefix}/seconds", append_time, "s", f"full ingestion, Ray warm, s; {about}", whole_time, COMMAND),
        row(f"{prefix}/time-over-full", append_time / whole_time, "ratio", about, None, COMMAND),
        row(f"{prefix}/bytes", size, "bytes", f"bytes of the full snapshot; {about}", whole_size, COMMAND),
        row(f"{prefix}/bytes-over-full", size / whole_size, "ratio", about, None, COMMAND),
    ]


def _cut(events: pa.Table, late: bool) -> tuple[pa.Table, pa.Table]:
    """All but 1 % of the rows, and that 1 %: the last ones, or some of all times."""
    rows = events.num_rows
    second = np.zeros(rows, np.bool_)
    if late:
        second[rng(0, "late").choice(rows, rows // 100, replace=False)] = True
    else:
        second[-(rows // 100) :] = True
    return events.filter(pa.array(~second)), events.filter(pa.array(second))


def _source(folder: Path, path: str) -> SourceConfig:
    plain = load_source(str(folder))[0].plain()
    plain["events"]["path"] = path
    return SourceConfig.parse(plain, "benchmark")


def _timed(work: Callable[[], Snapshot]) -> tuple[float, Snapshot]:
    """The median time of some runs, and what the last one made."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        made = work()
        times.append(time.perf_counter() - started)
    return float(np.median(times)), made


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
