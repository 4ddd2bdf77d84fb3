"""Buckets of a snapshot over a parent: new rows among those that are there, written as what differs.

An append gives what one ingestion of everything would give: rows that the parent has are recognised by event id, and what depends on a
user's other rows (sessions, rules about users, returns) is made again for the users with news; only rows that differ are written. A small
batch goes through all buckets at once, into one file of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import FileEntry
from maple.data import etl
from maple.data.checks import DUPLICATE
from maple.data.finish import BucketResult, by_user, distinct, gross, sorted_out, tidy_quarantine, with_reason, write_facts
from maple.data.history import (
    CONFLICT,
    EVENT,
    Held,
    changed,
    continued,
    held,
    known_files,
    nothing_held,
    reconsidered,
    same_aside,
    same_rows,
)  # fmt: skip
from maple.data.identity import SOURCE_USER
from maple.data.layers import Kind, joined, void_table, write_index, write_packed, write_part
from maple.data.plan import BUCKET, Moves, Plan
from maple.data.report import FILE, TableReport, count_values, table_report
from maple.data.snapshot import Snapshot

NEWS = "_news"

Int32 = npt.NDArray[np.int32]


def extend_buckets(plan: Plan, buckets: Sequence[int], rows: pa.Table | None) -> BucketResult | None:
    """The judged rows of some buckets over what the parent has there; None where there is nothing to do."""
    moves = None if plan.moves is None else plan.moves.of(buckets, plan.num_buckets)
    moved = None if moves is None or moves.rows.num_rows == 0 else moves.rows
    found = None if rows is None or rows.num_rows == 0 else _news(plan, rows, moved)
    news = None if found is None or found.events.num_rows == 0 else found.events
    if found is None and (moves is None or len(moves.users) == 0):
        return None
    out = _Writer(plan, buckets)
    report, gone = TableReport(), 0
    aside = [] if found is None else [found.aside]
    places = [] if found is None else [np.asarray(found.aside[BUCKET], np.int32)]
    if news is not None or (moves is not None and len(moves.users)):
        again = _again(plan, buckets, news, moved, moves)
        aside.append(again.aside)
        places.append(out.of(again.aside))
        gone = again.gone.num_rows
        out.write("events", again.written, out.of(again.written))
        if plan.source.returns == "net":
            values = gross(again.written, again.accepted)
            owners = again.written.take(pc.index_in(values["event_id"], value_set=again.written["event_id"].combine_chunks()))
            out.write("gross", values, out.of(owners))
        void = pa.concat_tables([void_table(again.gone["event_id"]), void_table(again.back["event_id"], again.back["reason"])])
        out.write("void", void, np.concatenate([out.of(again.gone), out.of(again.back)]))
    else:
        again = None
    arrived = [table["event_id"] for table in (news, moved) if table is not None]
    if arrived:
        out.index(pa.chunked_array([chunk for column in arrived for chunk in column.chunks], pa.string()))
    if news is not None:
        write_facts(plan, buckets[0], news)
    if aside:
        table = joined([part.drop_columns([name for name in (BUCKET, NEWS) if name in part.column_names]) for part in aside])
        table = table.append_column(BUCKET, pa.array(np.concatenate(places)))
        order = tidy_quarantine(table.append_column("bucket", table[BUCKET]))
        out.write("quarantine", order.drop_columns(["bucket"]), np.asarray(order["bucket"], np.int32))
    if rows is not None and found is not None:
        fresh = (found.events, found.aside) if again is None else (again.fresh, joined([found.aside, again.fresh_late]))
        counts = found.counts | ({} if again is None else again.counts)
        clean = etl.stored_events(fresh[0], plan.source.transient)
        report = replace(table_report(clean, fresh[1], counts), files=count_values(rows[FILE]))
        report = replace(report, rows_in=report.rows_in + found.known, rows_known=found.known)
        assert report.rows_in == rows.num_rows, "rows in = clean + quarantined + known"
    return BucketResult(buckets[0], tuple(out.files), report, gone)


@dataclass(frozen=True, eq=False)
class _News:
    """New rows: events that the parent does not have, rows set aside with a ``reason``, how often rules fired, how many are known."""

    events: pa.Table
    aside: pa.Table
    counts: dict[str, int]
    known: int


@dataclass(frozen=True, eq=False)
class _Again:
    """Users with news, made again: all that they have now, and how it differs from what the parent has."""

    accepted: pa.Table
    written: pa.Table  # events, as stored, that are new or different
    gone: pa.Table  # events of the parent that are void
    aside: pa.Table  # rows set aside because of their user's others that were not
    back: pa.Table  # rows of the parent's quarantine that are void
    fresh: pa.Table  # what the new rows became: events ...
    fresh_late: pa.Table  # ... and rows set aside
    counts: dict[str, int]


class _Writer:
    """Writes tables of a layer: of one bucket to its part, of several into packed files."""

    def __init__(self, plan: Plan, buckets: Sequence[int]) -> None:
        self.plan, self.buckets = plan, buckets
        self.files: list[FileEntry] = []

    def of(self, table: pa.Table) -> Int32:
        """The bucket of each row, by its user."""
        if len(self.buckets) == 1:
            return np.full(table.num_rows, self.buckets[0], np.int32)
        return etl.bucket_of(table["user_id"], self.plan.num_buckets)

    def write(self, kind: Kind, table: pa.Table, buckets: Int32) -> None:
        """Write rows, each for its bucket; nothing where there are none."""
        if table.num_rows == 0:
            return
        if len(self.buckets) == 1:
            self.files.append(write_part(self.plan.folder, kind, self.buckets[0], table))
        else:
            self.files.append(write_packed(self.plan.folder, kind, table, buckets))

    def index(self, ids: pa.ChunkedArray) -> None:
        """Write the hash index."""
        self.files.append(write_index(self.plan.folder, self.buckets[0] if len(self.buckets) == 1 else None, ids))


def _news(plan: Plan, rows: pa.Table, moved: pa.Table | None) -> _News:
    assert plan.parent is not None, "there is something to lie over"
    found = sorted_out(plan, rows)
    same, other = same_rows(plan.parent, found.good, np.asarray(found.good[BUCKET]), plan.source, moved)
    conflicts = with_reason(found.good.filter(pa.array(other)), CONFLICT)
    events = found.good.filter(pa.array(~(same | other)))
    kept, again = distinct(events)
    if again.num_rows and pc.count_distinct(events[BUCKET]).as_py() > 1:  # an id may stand for events in several buckets
        parts = [distinct(events.filter(pc.equal(events[BUCKET], bucket))) for bucket in pc.unique(events[BUCKET]).to_pylist()]
        kept, again = (pa.concat_tables(tables) for tables in zip(*parts, strict=True))
    counts = found.counts | {CONFLICT: conflicts.num_rows, DUPLICATE: again.num_rows}
    aside = pa.concat_tables([found.aside, conflicts, again])
    before = _aside_before(plan.parent, aside)
    return _News(kept, aside.filter(pa.array(~before)), counts, int(same.sum()) + int(before.sum()))


def _aside_before(parent: Snapshot, aside: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows the parent set aside already, bool[N]: those of a file that is read again because it grew."""
    out = np.zeros(aside.num_rows, np.bool_)
    buckets = np.asarray(aside[BUCKET])
    possible = np.asarray(pc.is_in(aside[FILE], value_set=pa.array(list(known_files(parent)), pa.string())))
    for bucket in np.unique(buckets[possible]).tolist():
        place = np.flatnonzero(possible & (buckets == bucket))
        late = tidy_quarantine(aside.take(pa.array(place)).append_column("place", pa.array(place)))
        out[np.asarray(late["place"])] = same_aside(parent, late.drop_columns(["place"]), bucket)
    return out


def _again(plan: Plan, buckets: Sequence[int], news: pa.Table | None, moved: pa.Table | None, moves: Moves | None) -> _Again:
    before = _before(plan, buckets, news, moved, moves)
    staying = before.accepted
    if moves is not None:
        source_ids = pc.coalesce(staying[SOURCE_USER], staying["user_id"]) if SOURCE_USER in staying.column_names else staying["user_id"]
        staying = staying.filter(pc.invert(pc.is_in(source_ids, value_set=moves.ids)))
    parts = [] if staying.num_rows == 0 else [staying]
    parts += [] if moved is None else [moved]
    if news is not None:
        parts.append(news.append_column(NEWS, pa.repeat(True, news.num_rows)))
    accepted = joined(parts) if parts else staying
    if NEWS not in accepted.column_names:
        accepted = accepted.append_column(NEWS, pa.nulls(accepted.num_rows, pa.bool_()))
    clean, late, counts = by_user(plan, accepted)
    if before.since is not None:
        clean = continued(clean, before.clean)
    stored = etl.stored_events(clean, plan.source.transient)
    written, gone = changed(before.clean, stored)
    aside, back = changed(before.aside, late, (*EVENT, "reason"))
    fresh, fresh_late = (table.filter(pc.is_valid(table[NEWS])) for table in (clean, late))
    return _Again(accepted, written, gone, aside, back, fresh, fresh_late, counts)


def _before(plan: Plan, buckets: Sequence[int], news: pa.Table | None, moved: pa.Table | None, moves: Moves | None) -> Held:
    """What the parent has of the users with news: everything where a rule looks at whole users, else what sessions depend on."""
    parent, source = plan.parent, plan.source
    assert parent is not None, "there is something to lie over"
    if reconsidered(source) or moves is not None:
        users = [table["user_id"].chunks for table in (news, moved) if table is not None] + [[] if moves is None else [moves.users]]
        return held(
            parent, buckets, pc.unique(pa.chunked_array([chunk for chunks in users for chunk in chunks], pa.string())), source, None
        )
    assert news is not None, "rows have come"
    alone = news.filter(pc.is_null(news["session_id"]))  # rows that say what session they belong to change no other
    if source.session_gap_minutes is None or alone.num_rows == 0:
        return nothing_held(parent)
    first = int(pc.min(alone["timestamp"].cast(pa.int64())).as_py())
    since = first - int(source.session_gap_minutes * 60_000_000) - 1
    return held(parent, buckets, pc.unique(alone["user_id"]), source, since)
