"""The offline feature build over a Ray cluster: one task per bucket of users, then the reduce on the driver.

Only plain functions of ``build`` run inside; a task reads and writes its bucket itself, and the driver sees names and digests.
"""

from __future__ import annotations

import pyarrow as pa
import ray
import ray.data

from maple.artifacts import FileEntry, Place
from maple.data.snapshot import Snapshot
from maple.errors import ArtifactError, MapleError
from maple.features.build import FeatureArtifact, Plan, Progress, build_bucket, finished, plan, publish
from maple.features.spec import FeatureSpec

_ROW = pa.schema([("name", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64()), ("rows", pa.int64()), ("error", pa.string())])


def build(snapshot: Snapshot, spec: FeatureSpec, home: Place, progress: Progress | None = None) -> FeatureArtifact:
    """Make the features of a snapshot under ``home/features`` and point ``latest`` to them. Ray must be running.

    A task needs memory for one bucket. What was built before from the same snapshot and spec is found, not built again.
    """
    say = progress or (lambda line: None)
    todo = plan(snapshot, spec, home)
    done = finished(todo, home)
    if done is not None:
        say(f"features {done.name} are built already")
        return done
    say(f"building {len(spec.columns)} features of {len(spec.views)} views over {snapshot.num_buckets} bucket(s)")
    try:
        made = publish(todo, home, _entries(todo))
    except BaseException:
        todo.folder.delete()
        raise
    say(f"{made.num_rows:,} feature rows in {made.name}")
    return made


def _entries(todo: Plan) -> list[FileEntry]:
    shared = ray.put(todo)

    def work(batch: pa.Table) -> pa.Table:
        here: Plan = ray.get(shared)
        rows = []
        for bucket in batch["bucket"].to_pylist():
            try:
                rows += [{"name": entry.name, **entry.plain(), "error": None} for entry in build_bucket(here, bucket)]
            except MapleError as error:  # travels as a row: raised here, Ray would log its traceback and wrap its message
                rows.append({"error": f"bucket {bucket}: {error}"})
        return pa.Table.from_pylist(rows, schema=_ROW)

    numbers = pa.table({"bucket": list(range(todo.snapshot.num_buckets))})
    tasks = ray.data.from_arrow([numbers.slice(place, 1) for place in range(numbers.num_rows)])
    entries = []
    for row in tasks.map_batches(work, batch_size=1, batch_format="pyarrow", zero_copy_batch=True).take_all():
        if row["error"]:
            raise ArtifactError(row["error"])
        entries.append(FileEntry(row["name"], row["sha256"], row["bytes"], row["rows"]))
    return entries
