"""Faults 45 and 46 of the matrix: the driver of an ingestion is killed, and a worker of it."""

from __future__ import annotations

import os
from pathlib import Path

from data_kill import Killed, kill_drivers, kill_workers
from faults import Outcome

from maple.cluster_ray import start_local, stop_local
from maple.data.simulate import simulate, write

KILLS = 10


def fault_45(scratch: Path) -> Outcome:
    """SIGKILL of the driver of ingestion and feature build at ten random moments: no partial output is visible, a re-run is a clean run."""
    found = _killed(scratch, workers=False)
    return Outcome(
        found.partial == 0 and found.equal and found.left == 0,
        "0 partial outputs visible; the re-run's digests equal those of a clean run; nothing is left over",
        f"{found.kills} kills: {found.partial} partial outputs, digests equal: {found.equal}, {found.left} left over",
    )


def fault_46(scratch: Path) -> Outcome:
    """Workers killed in the middle of a task: the task is done again, no row twice; rows and checksums are those of a clean run."""
    found = _killed(scratch, workers=True)
    return Outcome(
        found.kills > 0 and found.partial == 0 and found.equal and found.rows == found.clean_rows,
        "row count and digests equal those of a clean run",
        f"{found.kills} workers killed: {found.rows:,} rows of {found.clean_rows:,}, digests equal: {found.equal}",
    )


def _killed(scratch: Path, workers: bool) -> Killed:
    cluster = start_local(object_store_bytes=300 << 20, dashboard=False)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        shop = write(simulate(7, num_users=2_500), scratch / "shop")
        return kill_workers(shop, scratch, cluster, KILLS // 2) if workers else kill_drivers(shop, scratch, KILLS)
    finally:
        stop_local()
        del os.environ["RAY_ADDRESS"]
