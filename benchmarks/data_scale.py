"""Ingestion and features of simulated shops of 1, 3 and 10 million events: time per row, rows per second, memory, and polars.

Items and days are the same at every size, users grow; a bucket has the same number of rows. Every size runs in a process of its own,
and every step on a fresh local Ray of two processors, after both steps on a tiny shop. Memory is the proportional set size (PSS) of that process
and all its descendants, Ray's included, sampled five times a second; the object store is small and preallocated, so it counts the same
at every size. polars gets two threads and the clean events of the same snapshot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def on_fresh_ray(tiny: Path, home: Path, step: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """A step on a Ray of its own, after both steps on a tiny shop: no step's memory hides behind what an earlier one left."""
    from maple.cluster_ray import start_local, stop_local

    start_local(num_cpus=2, object_store_bytes=STORE_BYTES, dashboard=False, test=True)
    try:
        built(ingested(tiny, home, 5_000), home)
        return measured(step)
    finally:
        stop_local()


def one_size(scratch: Path, events: int, against_polars: bool) -> dict[str, Any]:
    """Everything of one size, in this process."""
    os.environ["RAY_preallocate_plasma"] = "1"  # noqa: SIM112  # Ray's name for it
    from maple.data.ingest import ROWS_PER_BUCKET
    from maple.features.spec import FeatureSpec

    tiny, home = scratch / "tiny", scratch / "home"
    simulate_shop(tiny, 40_000)
    snapshot, ingest = on_fresh_ray(tiny, scratch / "tiny-1", lambda: ingested(scratch / "shop", home, ROWS_PER_BUCKET))
    features, build = on_fresh_ray(tiny, scratch / "tiny-2", lambda: built(snapshot, home))
    out: dict[str, Any] = {"rows": snapshot.num_events, "buckets": snapshot.num_buckets, "ingest": ingest, "features": build}
    if against_polars:
        start = time.perf_counter()
        timeline = features.timeline()  # features of items are read from their states; polars writes them out
        timeline.at(timeline.items(), timeline.ticks)
        out["item_features"] = time.perf_counter() - start
        out["polars"] = polars_seconds(snapshot, scratch / "polars")
        out["views"], out["all_views"] = len(polars_features.COVERED), len(FeatureSpec().views)
    return out


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
    """All sizes, each in its own process; the rows of the table."""
    found: dict[str, dict[str, Any]] = {}
    for name, events in SIZES.items():
        folder = scratch / name
        folder.mkdir()
        for step in (["simulate"], ["measure", "polars" if name == "10M" else "alone"]):
            command = [sys.executable, __file__, *step, str(folder), str(events)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return rows_of(found)


def rows_of(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of measurements by size."""
    rows = []
    small, large = found["1M"], found["10M"]
    for step in ("ingest", "features"):
        for name, each in found.items():
            took = each[step]
            about = f"{each['rows']:,} events in {each['buckets']} buckets on two processors"
            rows.append(row(f"data/{step}/rows-per-second/{name}", each["rows"] / took["seconds"], "rows/s", about, None, COMMAND))
            about = f"PSS of all processes, {took['idle']:.0f} MB of them before the step"
            rows.append(row(f"data/{step}/peak-memory/{name}", took["peak"], "MB", about, None, COMMAND))
        each_row = [1e6 * size[step]["seconds"] / size["rows"] for size in (large, small)]
        about = f"{each_row[0]:.2f} against {each_row[1]:.2f} microseconds a row"
        rows.append(row(f"data/{step}/time-per-row/10M-over-1M", each_row[0] / each_row[1], "ratio", about, None, COMMAND))
        peaks = [size[step]["peak"] for size in (large, small)]
        about = f"{peaks[0]:.0f} against {peaks[1]:.0f} MB"
        rows.append(row(f"data/{step}/peak-memory/10M-over-1M", peaks[0] / peaks[1], "ratio", about, None, COMMAND))
        above = [size[step]["peak"] - size[step]["idle"] for size in (large, small)]
        about = f"{above[0]:.0f} against {above[1]:.0f} MB more than before the step"
        rows.append(row(f"data/{step}/memory-above-idle/10M-over-1M", above[0] / max(above[1], 1.0), "ratio", about, None, COMMAND))
    mine = large["features"]["seconds"] + large["item_features"]
    views = f"{large['views']} of {large['all_views']} views"
    about = f"{mine:.1f} s against {large['polars']:.1f} s of one polars process with two threads; {views}"
    rows.append(row("data/features/time-over-polars/10M", mine / large["polars"], "ratio", about, None, COMMAND))
    return rows


if __name__ == "__main__":
    target = Path(sys.argv[-2])
    if sys.argv[1] == "simulate":
        simulate_shop(target / "shop", int(sys.argv[-1]))
    else:
        print(json.dumps(one_size(target, int(sys.argv[-1]), sys.argv[2] == "polars")))
