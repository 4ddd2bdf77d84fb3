"""The offline feature build over a Ray cluster: one task per bucket of users, then one per shard of items.

Only plain functions of ``build`` run inside; a task reads and writes its files itself, and the driver sees names and digests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data

from maple.artifacts import FileEntry, Place, scratch
from maple.data.snapshot import Snapshot
from maple.errors import ArtifactError, MapleError
from maple.features.build import FeatureArtifact, Made, Plan, Progress, build_bucket, build_shard, finished, plan, publish
from maple.features.content import NO_CONTENT, ItemContent
from maple.features.spec import FeatureSpec

_ROW = pa.schema(
    [
        ("files", pa.list_(pa.struct([("name", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64()), ("rows", pa.int64())]))),
        ("items", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


def build(
    snapshot: Snapshot,
    spec: FeatureSpec,
    home: Place,
    progress: Progress | None = None,
    content: Mapping[str, ItemContent] = NO_CONTENT,
) -> FeatureArtifact:
    """Make the features of a snapshot under ``home/features`` and point ``latest`` to them. Ray must be running.

    ``content``: item vectors by name, in the order of the snapshot's item table, as the spec's ``content`` announces. A task needs memory
    for one bucket. What was built before from the same snapshot and spec is found, not built again.
    """
    say = progress or (lambda line: None)
    todo = plan(snapshot, spec, home)
    done = finished(todo, home)
    if done is not None:
        say(f"features {done.name} are built already")
        return done
    say(f"building {len(spec.columns)} features of {len(spec.views)} views over {snapshot.num_buckets} bucket(s)")
    with scratch(todo.folder):
        shared = ray.put(todo)  # once, not with every task
        rows = _map(shared, build_bucket, "bucket", snapshot.num_buckets)
        made = publish(todo, home, rows + _map(shared, build_shard, "shard of items", todo.num_shards), content)
    say(f"{made.num_rows:,} feature rows in {made.name}")
    return made


def _map(shared: ray.ObjectRef, task: Callable[[Plan, int], Made], what: str, count: int) -> list[Made]:
    """The task for every number below ``count``; the first error is raised here."""

    def work(batch: pa.Table) -> pa.Table:
        here: Plan = ray.get(shared)
        rows: list[dict[str, Any]] = []
        for number in batch["number"].to_pylist():
            try:
                made = task(here, number)
                rows.append({"files": [vars(entry) for entry in made.files], "items": made.items})
            except MapleError as error:  # travels as a row: raised here, Ray would log its traceback and wrap its message
                rows.append({"error": f"{what} {number}: {error}"})
        return pa.Table.from_pylist(rows, schema=_ROW)

    numbers = pa.table({"number": range(count)})
    tasks = ray.data.from_arrow([numbers.slice(place, 1) for place in range(count)])
    found = []
    for row in tasks.map_batches(work, batch_size=1, batch_format="pyarrow", zero_copy_batch=True).take_all():
        if row["error"]:
            raise ArtifactError(row["error"])
        found.append(Made(tuple(FileEntry(**entry) for entry in row["files"]), tuple(row["items"])))
    return found
