"""An ingestion over a Ray cluster: a task per fragment, then a task per bucket; between them lie files, in the snapshot's scratch folder.

Only plain functions of ``ingest`` run inside; the driver sees a few small answers per task, never events. A worker that dies repeats its
task, and a task that is done again replaces its files.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray
import ray.data

from maple.artifacts import Place
from maple.data.ingest import ROWS_PER_BUCKET, Progress, Task, appended, ingested
from maple.data.plan import Plan
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.errors import ConfigError, DataError, MapleError


def ingest(
    source: SourceConfig,
    root: Place,
    home: Place,
    *,
    rows_per_bucket: int = ROWS_PER_BUCKET,
    progress: Progress | None = None,
    now: int | None = None,
) -> Snapshot:
    """Make a snapshot of a source under ``home/snapshots`` and point ``latest`` to it. Ray must be running.

    ``rows_per_bucket`` bounds the memory of one task. ``now`` (microseconds) is the moment that rules about the future mean; default: now.
    On any error nothing is published and the half-made folder is removed.
    """
    return ingested(source, root, home, on_ray, rows_per_bucket=rows_per_bucket, now=now, say=progress)


def append(
    source: SourceConfig,
    root: Place,
    home: Place,
    *,
    parent: Snapshot | None = None,
    progress: Progress | None = None,
    now: int | None = None,
) -> Snapshot:
    """Add what the event files have that a parent (default: the latest snapshot) has not read: a snapshot that lies over it.

    The result is that of one ingestion of everything: events are told apart by their ids, so a file may come again or overlap; late events
    land in their place; items and users are brought up to date. The parent itself where there is nothing new. A small batch is done in
    this process; only a larger one needs Ray. Errors as in ``ingest``, and a ``ConfigError`` where the source does not go with the parent.
    """
    return appended(source, root, home, on_ray, parent=parent, now=now, say=progress)


def on_ray(todo: Plan, task: Task, count: int) -> Iterator[str]:
    """Runs the tasks on the cluster."""
    if count == 0:
        return
    shared = ray.put(todo)  # once, not with every task: it may hold a catalogue of ids

    def work(batch: pa.Table) -> pa.Table:
        here: Plan = ray.get(shared)
        try:
            return pa.table({"answer": [task(here, number) for number in batch["number"].to_pylist()], "error": [""]})
        except MapleError as error:  # travels as a value: raised here, Ray would log its traceback and wrap its message
            return pa.table({"answer": [""], "error": [f"{type(error).__name__}|{error}"]})

    numbers = pa.table({"number": list(range(count))})
    tasks = ray.data.from_arrow([numbers.slice(place, 1) for place in range(count)])
    for row in tasks.map_batches(work, batch_size=1, batch_format="pyarrow", zero_copy_batch=True).iter_rows():
        if row["error"]:
            kind, _, message = row["error"].partition("|")
            raise (ConfigError if kind == ConfigError.__name__ else DataError)(message)
        yield row["answer"]
