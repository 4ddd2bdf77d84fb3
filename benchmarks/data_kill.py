"""Killing the driver of an ingestion with its feature build at random moments, and its workers: is anything half-made ever visible?

Rows: ``data/kill-etl/partial-outputs`` (artifacts that a reader finds and that are not whole, over all kills), what a re-run gives, and the
same for killed workers. Only processes of the cluster that this benchmark starts are killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from harness import row

from maple.artifacts import MANIFEST, Place, open_manifest, verify
from maple.cluster_ray import LocalCluster, attach, start_local, stop_local
from maple.data.presets import load_source
from maple.data.simulate import simulate, write
from maple.data.snapshot import Snapshot, names
from maple.errors import MapleError
from maple.features.build import FeatureArtifact
from maple.features.spec import FeatureSpec
from maple.hashing import rng

COMMAND = "python benchmarks/data.py --only kill"
ROWS_PER_BUCKET = 20_000


@dataclass(frozen=True)
class Killed:
    """What killing showed: visible things that are not whole, unfinished folders after the re-run, whether the re-run is the clean run."""

    kills: int
    partial: int
    left: int
    equal: bool
    rows: int
    clean_rows: int


def run(scratch: Path, kills: int = 10, users: int = 2_500) -> list[dict[str, Any]]:
    """The rows of this part."""
    cluster = start_local(object_store_bytes=300 << 20, dashboard=False)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        shop = write(simulate(7, num_users=users), scratch / "shop")
        drivers = kill_drivers(shop, scratch, kills)
        workers = kill_workers(shop, scratch, cluster, max(kills // 2, 1))
    finally:
        stop_local()
        del os.environ["RAY_ADDRESS"]
    return [
        row("data/kill-etl/partial-outputs", drivers.partial, "artifacts", f"{drivers.kills} SIGKILLs of the driver", None, COMMAND),
        row("data/kill-etl/rerun-equal", float(drivers.equal), "1 = yes", "digests of a run that nobody killed", None, COMMAND),
        row("data/kill-etl/leftovers", drivers.left, "folders", "unfinished, after the re-run", None, COMMAND),
        row("data/kill-workers/partial-outputs", workers.partial, "artifacts", f"{workers.kills} workers killed", None, COMMAND),
        row("data/kill-workers/result-equal", float(workers.equal), "1 = yes", "digests of a run that nobody killed", None, COMMAND),
    ]


def kill_drivers(shop: Path, scratch: Path, kills: int) -> Killed:
    """Kill the driver at random moments of its run, one after the other in one home; then let it finish there.

    A driver that is through before its moment does not count: its home is finished, and the next kill starts another one.
    """
    clean, seconds = _clean(shop, scratch)
    draw = rng(1, "kill")
    partial = done = homes = 0
    home = scratch / "killed-0"
    for _ in range(4 * kills):
        if done == kills:
            break
        driver, started = _driver(shop, home), time.monotonic()
        try:
            driver.wait(float(draw.uniform(0.15, 1.0)) * seconds)
            seconds, homes = min(seconds, time.monotonic() - started), homes + 1
            partial += _partial(home, clean)
            home = scratch / f"killed-{homes}"
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            done += 1
            partial += _partial(home, clean)
    assert _driver(shop, home).wait() == 0, "the re-run finishes"
    found = _digests(home)
    left = sum(not (home / "snapshots" / name / MANIFEST).exists() for name in names(Place.at(home)))
    return Killed(done, partial, left, found == clean, _rows(home), _rows(scratch / "clean"))


def kill_workers(shop: Path, scratch: Path, cluster: LocalCluster, kills: int) -> Killed:
    """Kill workers of the cluster while they work on an ingestion; each run has to end as if nothing had happened."""
    clean, seconds = _clean(shop, scratch)
    draw = rng(2, "kill")
    partial = done = 0
    equal, rows = True, 0
    for number in range(kills):
        home = scratch / f"worker-{number}"
        driver = _driver(shop, home)
        time.sleep(float(draw.uniform(0.3, 0.9)) * seconds)
        while driver.poll() is None:
            busy = _workers(cluster)
            if busy:
                busy[int(draw.integers(len(busy)))].kill()
                done += 1
                break
            time.sleep(0.02)
        equal &= driver.wait() == 0 and _digests(home) == clean
        partial += _partial(home, clean)
        rows = _rows(home)
    return Killed(done, partial, 0, equal, rows, _rows(scratch / "clean"))


def _workers(cluster: LocalCluster) -> list[psutil.Process]:
    """Processes of the cluster that run a task right now."""
    assert cluster.process is not None, "the cluster is this benchmark's own"
    out = []
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and "IDLE" not in title and "Map" in title:
            out.append(process)
    return out


def _clean(shop: Path, scratch: Path) -> tuple[tuple[str, str], float]:
    """The digests of a run that nobody kills, and how long a driver takes, Ray warm."""
    home = scratch / "clean"
    if not home.exists():
        assert _driver(shop, scratch / "warm").wait() == 0
        started = time.monotonic()
        assert _driver(shop, home).wait() == 0
        (home / "seconds.json").write_text(json.dumps(time.monotonic() - started))
    return _digests(home), float(json.loads((home / "seconds.json").read_text()))


def _driver(shop: Path, home: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, str(shop), str(home)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _drive(shop: str, home: str) -> None:
    attach()
    from maple.data.ingest_ray import ingest
    from maple.features.build_ray import build

    source, root = load_source(shop)
    build(ingest(source, root, Place.at(home), rows_per_bucket=ROWS_PER_BUCKET), FeatureSpec(), Place.at(home))


def _digests(home: Path) -> tuple[str, str]:
    place = Place.at(home)
    return Snapshot.open(place).digest, FeatureArtifact.open(place).digest


def _rows(home: Path) -> int:
    return Snapshot.open(Place.at(home)).num_events


def _partial(home: Path, clean: tuple[str, str]) -> int:
    """How many things a reader finds that are not whole: files that differ from their manifest, pointers to nothing, another content."""
    wrong = 0
    for kind, folder, digest in (("snapshot", "snapshots", clean[0]), ("features", "features", clean[1])):
        for child in (Place.at(home) / folder).children():
            if "." in child.name or not (child / MANIFEST).exists():
                continue
            try:
                manifest = open_manifest(child, kind)
                verify(child, manifest)
                found = Snapshot.open(Place.at(home), child.name).digest if kind == "snapshot" else manifest.digest
                wrong += found != digest
            except MapleError:
                wrong += 1
        pointer = home / folder / "latest.json"
        if pointer.exists():
            wrong += not (home / folder / json.loads(pointer.read_text())["name"] / MANIFEST).exists()
    return wrong


if __name__ == "__main__":
    _drive(*sys.argv[1:])
