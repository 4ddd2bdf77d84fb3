"""An ingestion over a Ray cluster: read and judge fragments in parallel, one shuffle by user bucket, finish each bucket where it is.

Only plain functions of ``ingest`` run inside; the driver sees one small row per bucket, never events.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from maple.artifacts import Place
from maple.data.ingest import (
    BUCKET,
    FIRED,
    REASON,
    ROWS_PER_BUCKET,
    BucketResult,
    Plan,
    Progress,
    finish_bucket,
    judged_rows,
    judged_schema,
    plan,
    prices,
    publish,
    side_tables,
)
from maple.data.report import UNREADABLE
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.errors import ConfigError, DataError, MapleError

FAILED = -2  # the reason of a row that carries an error
NOTHING = -3  # the reason of a row that only says that a fragment had none: Ray forgets the columns of a data set without rows


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
    say = progress or (lambda line: None)
    items, users = side_tables(source, root)
    catalogue = None if items is None else prices(items.clean)
    todo = plan(source, root, home, rows_per_bucket=rows_per_bucket, catalogue=catalogue, now=now)
    say(f"reading {len(todo.fragments)} fragment(s) of {source.name!r} into {todo.num_buckets} bucket(s)")
    try:
        results = [BucketResult.of(row) for row in _rows(todo)]
        say(f"finished {len(results)} bucket(s); writing the manifest")
        done = publish(todo, home, results, items, users)
    except BaseException:
        todo.folder.delete()
        raise
    for line in done.report().lines():
        say(line)
    return done


def _rows(todo: Plan) -> list[dict[str, Any]]:
    shared = ray.put(todo)  # once, not with every task: it may hold a catalogue of ids

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        here: Plan = ray.get(shared)
        for number in batch["fragment"].to_pylist():
            rows = 0
            try:
                for part in judged_rows(here, here.fragments[number]):
                    rows += part.num_rows
                    yield part
            except MapleError as error:  # travels as a row: raised here, Ray would log its traceback and wrap its message
                yield _mark(here, FAILED, _told(error))
            else:
                if rows == 0:
                    yield _mark(here, NOTHING, None)

    def finish(group: pa.Table) -> pa.Table:
        here: Plan = ray.get(shared)
        failed = group.filter(pc.equal(group[REASON], FAILED))
        if failed.num_rows:
            return pa.table({"error": [failed[UNREADABLE][0].as_py()]})
        try:
            rows = group.filter(pc.not_equal(group[REASON], NOTHING))
            return finish_bucket(here, group[BUCKET][0].as_py(), rows).row()
        except MapleError as error:
            return pa.table({"error": [_told(error)]})

    numbers = pa.table({"fragment": list(range(len(todo.fragments)))})
    tasks = ray.data.from_arrow([numbers.slice(place, 1) for place in range(numbers.num_rows)])
    rows = tasks.map_batches(read, batch_size=1, batch_format="pyarrow", zero_copy_batch=True)
    done = rows.groupby(BUCKET, num_partitions=todo.num_buckets).map_groups(finish, batch_format="pyarrow")
    found = list(done.take_all())
    for row in found:
        if row.get("error"):
            kind, _, message = row["error"].partition("|")
            raise (ConfigError if kind == ConfigError.__name__ else DataError)(message)
    return found


def _told(error: MapleError) -> str:
    return f"{type(error).__name__}|{error}"


def _mark(here: Plan, reason: int, text: str | None) -> pa.Table:
    """One row of the shape of judged rows that is no event but says something of a fragment."""
    schema = judged_schema(here)
    told: dict[str, object] = {UNREADABLE: text, REASON: reason, FIRED: 0, BUCKET: 0}
    return pa.table([pa.array([told.get(field.name)], field.type) for field in schema], schema=schema)
