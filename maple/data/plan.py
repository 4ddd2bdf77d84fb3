"""What every task of an ingestion shares, and its first half: reading a fragment, judging its rows, and handing them to their buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import Place
from maple.data import etl
from maple.data.fragments import Fragment
from maple.data.identity import SOURCE_USER, Stitching
from maple.data.report import ROW
from maple.data.shuffle import gather, scatter
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.data.tables import RuleBook, Tables
from maple.data.tombstones import NONE, Tombstones

REASON, FIRED, BUCKET = "_reason", "_fired", "_bucket"
SCRATCH = "scratch"


@dataclass(frozen=True, eq=False)
class Moves:
    """Events of a parent that go to other users, because ids were stitched anew.

    ``ids``: the source ids whose canonical id changed. ``users``: the canonical ids that lose or gain events. ``rows``: the moving events
    as they were accepted, under their new users.
    """

    ids: pa.Array
    users: pa.Array
    rows: pa.Table

    def of(self, buckets: Sequence[int], num_buckets: int) -> Moves:
        """What concerns some buckets: their users, and the events that come to them."""
        users = self.users.filter(pa.array(np.isin(etl.bucket_of(self.users, num_buckets), buckets)))
        return Moves(self.ids, users, self.rows.filter(pc.is_in(self.rows["user_id"], value_set=users)))


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that the tasks of one ingestion share."""

    source: SourceConfig
    tables: Tables | None  # of the events to read; None where there is nothing to read
    rules: RuleBook
    catalogue: pa.Table | None  # item_id and price, where a rule asks for them
    num_buckets: int
    rows_per_bucket: int
    now: int  # microseconds
    folder: Place  # the snapshot in the making
    files: Mapping[str, str] = field(default_factory=dict)  # the event files that are read, with their fingerprints
    parent: Snapshot | None = None  # what an append lies over
    stitching: Stitching | None = None
    moves: Moves | None = None
    together: bool = False  # whether all buckets are done at once: few rows
    tombstones: Tombstones = NONE

    @property
    def fragments(self) -> tuple[Fragment, ...]:
        """What the tasks read, one each."""
        return () if self.tables is None else self.tables.fragments

    @property
    def scratch(self) -> Place:
        """Where intermediate files lie; removed before the end."""
        return self.folder / SCRATCH

    def rows_place(self, fragment: int) -> Place:
        """Where the judged rows of a fragment lie in between."""
        return self.scratch / f"rows-{fragment:05d}.arrow"

    def facts_place(self, bucket: int) -> Place:
        """Where what a bucket's new events say of items lies in between."""
        return self.scratch / f"facts-{bucket:05d}.arrow"


@dataclass(frozen=True)
class Read:
    """How many rows of a fragment went on, and how many were dropped because their users are deleted."""

    rows: int
    deleted: int


def judged_schema(plan: Plan) -> pa.Schema:
    """The schema of what ``judged_rows`` yields."""
    assert plan.tables is not None, "there is something to read"
    extra = [] if plan.stitching is None else [(SOURCE_USER, pa.string())]
    extra += [(REASON, pa.int16()), (FIRED, pa.int64()), (BUCKET, pa.int32())]
    return pa.schema([*plan.tables.schema, *(pa.field(name, kind) for name, kind in extra)])


def judged_rows(plan: Plan, fragment: Fragment) -> Iterator[pa.Table]:
    """A fragment's rows with what the rules said of each (``_reason``, ``_fired``) and the bucket it belongs to.

    Where ids are stitched, ``user_id`` is the canonical one and ``source_user_id`` the one that came.
    """
    assert plan.tables is not None, "there is something to read"
    for rows in plan.tables.read(fragment):
        found = plan.rules.judge(fragment.table, rows, catalogue=plan.catalogue, now=plan.now)
        table = found.table
        if plan.stitching is not None:
            table = stitched(table.append_column(SOURCE_USER, table["user_id"]), plan.stitching)
        bucket = np.asarray(table[ROW]) % plan.num_buckets  # rows without a user: anywhere, but the same place always
        has_user = pc.is_valid(table["user_id"]).combine_chunks()
        bucket[np.asarray(has_user.to_numpy(zero_copy_only=False))] = etl.bucket_of(table["user_id"].filter(has_user), plan.num_buckets)
        table = table.append_column(REASON, pa.array(found.reason))
        yield table.append_column(FIRED, pa.array(found.fired)).append_column(BUCKET, pa.array(bucket.astype(np.int32)))


def stitched(table: pa.Table, stitching: Stitching) -> pa.Table:
    """The table with the canonical id of each ``source_user_id`` as its user."""
    return table.set_column(table.column_names.index("user_id"), "user_id", stitching.apply(table[SOURCE_USER]))


def read(plan: Plan, number: int) -> Read:
    """Judge one fragment and write its rows by bucket; rows of deleted users go no further than here. Memory: about a bucket."""
    deleted = 0

    def kept() -> Iterator[pa.Table]:
        nonlocal deleted
        for rows in judged_rows(plan, plan.fragments[number]):
            left = plan.tombstones.keep(rows)
            deleted += rows.num_rows - left.num_rows
            yield left

    rows = scatter(plan.rows_place(number), judged_schema(plan), kept(), BUCKET, plan.num_buckets, plan.rows_per_bucket)
    return Read(rows, deleted)


def rows_of(plan: Plan, buckets: Sequence[int]) -> pa.Table | None:
    """The judged rows of some buckets, of all fragments; None where nothing was read."""
    if plan.tables is None:
        return None
    schema = judged_schema(plan)
    places = [plan.rows_place(number) for number in range(len(plan.fragments))]
    return pa.concat_tables([gather(places, schema, bucket, plan.num_buckets) for bucket in buckets])
