"""Ingestion and features of simulated shops of 1, 3 and 10 million events: time per row, rows per second, memory, and polars.

Items and days are the same at every size, users grow; a bucket has the same number of rows. Every step of every size runs in a process
of its own on a fresh local Ray of two processors, after both steps on a tiny shop, so that no step's memory hides behind what an earlier
one left. Memory is the proportional set size (PSS) of that process and all its descendants, Ray's included, sampled five times a second;
the object store is small and preallocated, so it counts the same at every size. polars gets two threads and the clean events of the same
snapshot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import polars_features
import psutil
from harness import row

SIZES = {"1M": 1_000_000, "3M": 3_000_000, "10M": 10_000_000}
EVENTS_PER_USER = 207.5  # of a simulated shop of 120 days
ITEMS, DAYS = 5_000, 120
STORE_BYTES = 200 << 20
COMMAND = "python benchmarks/data.py --only scale"
Result = TypeVar("Result")


class Memory:
    """The largest PSS of this process and its descendants while it watches, in MB."""

    def __init__(self) -> None:
        self.idle = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> float:
        me = psutil.Process()
        total = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        return total / 2**20


def measured(step: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """A step's result, its seconds and its memory."""
    with Memory() as memory:
        start = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "peak": memory.peak, "idle": memory.idle}


def simulate_shop(folder: Path, events: int) -> None:
    """Write a shop's files, about ``events`` of them clean."""
    from maple.data.simulate import simulate, write

    write(simulate(1, num_users=round(events / EVENTS_PER_USER), num_items=ITEMS, days=DAYS), folder)


def ingested(shop: Path, home: Path, rows_per_bucket: int) -> Any:
    """The snapshot of a shop."""
    from maple.artifacts import Place
    from maple.config import read_yaml
    from maple.data.ingest_ray import ingest
    from maple.data.sources import SourceConfig

    source = SourceConfig.parse(read_yaml(shop / "source.yaml"), str(shop))
    return ingest(source, Place.at(shop), Place.at(home), rows_per_bucket=rows_per_bucket)


def built(snapshot: Any, home: Path) -> Any:
    """The features of a snapshot."""
    from maple.artifacts import Place
    from maple.features.build_ray import build
    from maple.features.spec import FeatureSpec

    return build(snapshot, FeatureSpec(views=polars_features.COVERED), Place.at(home))


def warm(scratch: Path) -> None:
    """A local Ray that has done both steps on a tiny shop."""
    os.environ["RAY_preallocate_plasma"] = "1"  # noqa: SIM112  # Ray's name for it
    from maple.cluster_ray import start_local

    start_local(num_cpus=2, object_store_bytes=STORE_BYTES, dashboard=False, test=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        simulate_shop(Path(folder) / "shop", 40_000)
        built(ingested(Path(folder) / "shop", Path(folder), 5_000), Path(folder))


def measure(step: str, scratch: Path) -> dict[str, Any]:
    """One step of one size, in this process: ``ingest``, ``features`` (of that snapshot) or ``polars`` (the same features)."""
    from maple.artifacts import Place
    from maple.cluster_ray import stop_local
    from maple.data.ingest import ROWS_PER_BUCKET
    from maple.data.snapshot import Snapshot
    from maple.features.build import FeatureArtifact

    home = scratch / "home"
    if step == "polars":
        start = time.perf_counter()
        timeline = FeatureArtifact.open(Place.at(home)).timeline()  # features of items are read from states; polars writes them out
        timeline.at(timeline.items(), timeline.ticks)
        reading = time.perf_counter() - start
        return {"item_features": reading, "seconds": polars_seconds(Snapshot.open(Place.at(home)), scratch / "polars")}
    warm(scratch)
    try:
        if step == "ingest":
            snapshot, took = measured(lambda: ingested(scratch / "shop", home, ROWS_PER_BUCKET))
        else:
            snapshot = Snapshot.open(Place.at(home))
            _, took = measured(lambda: built(snapshot, home))
    finally:
        stop_local()
    return {"rows": snapshot.num_events, "buckets": snapshot.num_buckets, **took}


def polars_seconds(snapshot: Any, folder: Path) -> float:
    """Seconds that one polars process takes for the same features of the same rows, without its start."""
    import pyarrow.parquet as pq

    folder.mkdir()
    columns = ["event_id", "user_id", "item_id", "event", "timestamp", "value", "price"]
    for bucket in range(snapshot.num_buckets):
        pq.write_table(snapshot.events([bucket], columns), folder / f"events-{bucket:05d}.parquet", compression="zstd")
    pq.write_table(snapshot.items(), folder / "known.parquet")
    command = [sys.executable, polars_features.__file__, str(folder / "events-*.parquet"), str(folder / "known.parquet"), str(folder)]
    done = subprocess.run(command, env={**os.environ, "POLARS_MAX_THREADS": "2"}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def run(scratch: Path) -> list[dict[str, Any]]:
    """All steps of all sizes, each in its own process; the rows of the table."""
    found: dict[str, dict[str, Any]] = {}
    for name, events in SIZES.items():
        folder = scratch / name
        folder.mkdir()
        subprocess.run([sys.executable, __file__, "simulate", str(folder), str(events)], check=True)
        found[name] = {}
        for step in ("ingest", "features", *(["polars"] if name == "10M" else [])):
            done = subprocess.run([sys.executable, __file__, step, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
            found[name][step] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name} {step}: {json.dumps(found[name][step])}", flush=True)
    return rows_of(found)


def rows_of(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of measurements by size and step."""
    from maple.features.spec import FeatureSpec

    rows = []
    for step in ("ingest", "features"):
        small, large = found["1M"][step], found["10M"][step]
        for name, size in found.items():
            took = size[step]
            about = f"{took['rows']:,} events in {took['buckets']} buckets on two processors"
            rows.append(row(f"data/{step}/rows-per-second/{name}", took["rows"] / took["seconds"], "rows/s", about, None, COMMAND))
            about = f"PSS of all processes, {took['idle']:.0f} MB of them before the step"
            rows.append(row(f"data/{step}/peak-memory/{name}", took["peak"], "MB", about, None, COMMAND))
        slow, fast = (1e6 * each["seconds"] / each["rows"] for each in (large, small))
        about = f"{slow:.2f} against {fast:.2f} microseconds a row"
        rows.append(row(f"data/{step}/time-per-row/10M-over-1M", slow / fast, "ratio", about, None, COMMAND))
        about = f"{large['peak']:.0f} against {small['peak']:.0f} MB"
        rows.append(row(f"data/{step}/peak-memory/10M-over-1M", large["peak"] / small["peak"], "ratio", about, None, COMMAND))
        more, less = (each["peak"] - each["idle"] for each in (large, small))
        about = f"{more:.0f} against {less:.0f} MB more than before the step"
        rows.append(row(f"data/{step}/memory-above-idle/10M-over-1M", more / max(less, 1.0), "ratio", about, None, COMMAND))
    theirs = found["10M"]["polars"]
    mine = found["10M"]["features"]["seconds"] + theirs["item_features"]
    views = f"{len(polars_features.COVERED)} of {len(FeatureSpec().views)} views"
    about = f"{mine:.1f} s against {theirs['seconds']:.1f} s of one polars process with two threads; {views}"
    rows.append(row("data/features/time-over-polars/10M", mine / theirs["seconds"], "ratio", about, None, COMMAND))
    return rows


if __name__ == "__main__":
    if sys.argv[1] == "simulate":
        simulate_shop(Path(sys.argv[2]) / "shop", int(sys.argv[3]))
    else:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
