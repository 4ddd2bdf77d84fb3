"""The second half of an ingestion, bucket by bucket: judged rows become final events. In a new snapshot, or over what a parent has.

An append gives what one ingestion of everything would give: rows that the parent has are recognised by event id, and what depends on a
user's other rows (sessions, rules about users, returns) is made again for the users with news; only rows that differ are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import FileEntry, arrow_bytes
from maple.data import etl
from maple.data.behaviour import judge_users
from maple.data.checks import DUPLICATE
from maple.data.history import changed, continued, held, reconsidered, same_rows
from maple.data.identity import SOURCE_USER
from maple.data.layers import gross_file, id_hashes, joined, quarantine_file, void_file, void_table, write_events, write_index, write_table
from maple.data.plan import FIRED, REASON, Moves, Plan
from maple.data.report import FILE, ROW, UNREADABLE, TableReport, count_values, table_report
from maple.data.validate import quarantined_rows, rule_counts

CONFLICT = "conflict"  # the reason of a row whose event id the parent has with another content: the first to arrive counts


@dataclass(frozen=True, eq=False)
class BucketResult:
    """What one finished bucket hands to the publisher: the files it wrote, its part of the report, the earlier events it voids."""

    bucket: int
    files: tuple[FileEntry, ...]
    report: TableReport
    voided: int = 0

    def plain(self) -> dict[str, Any]:
        """JSON-ready values, to travel between processes."""
        return {**vars(self), "files": [vars(entry) for entry in self.files], "report": self.report.plain()}

    @staticmethod
    def of(plain: dict[str, Any]) -> BucketResult:
        """The inverse of ``plain``."""
        files = tuple(FileEntry(**entry) for entry in plain["files"])
        return BucketResult(plain["bucket"], files, TableReport.from_plain(plain["report"]), plain["voided"])


@dataclass(frozen=True, eq=False)
class Sorted:
    """Judged rows sorted out: events with distinct ids, rows that are set aside with a ``reason``, how often each rule fired."""

    events: pa.Table
    aside: tuple[pa.Table, ...]
    counts: dict[str, int]
    known: int = 0


def finish_bucket(plan: Plan, bucket: int, rows: pa.Table | None) -> BucketResult | None:
    """All judged rows of one bucket made final and written; None where there is nothing to do. The order of ``rows`` does not matter."""
    if plan.parent is not None:
        return _over(plan, bucket, rows)
    return None if rows is None or rows.num_rows == 0 else _first(plan, bucket, rows)


def _first(plan: Plan, bucket: int, rows: pa.Table) -> BucketResult:
    found = _sorted_out(plan, rows)
    events = found.events
    if plan.source.order_clock is not None:
        events = etl.spread_orders(events, plan.source.order_clock)
    _write_facts(plan, bucket, events)
    clean, late, counts = _by_user(plan, events)
    clean = etl.stored_events(clean, plan.source.transient)
    aside = pa.concat_tables([*found.aside, late])
    report = table_report(clean, aside, found.counts | counts)
    assert report.rows_in == rows.num_rows, "rows in = clean + quarantined"
    return BucketResult(bucket, tuple(_write(plan, bucket, clean, aside, events["event_id"], events)), _by_file(report, rows))


def _over(plan: Plan, bucket: int, rows: pa.Table | None) -> BucketResult | None:
    moves = None if plan.moves is None else plan.moves.of(bucket, plan.num_buckets)
    moved = None if moves is None or moves.rows.num_rows == 0 else moves.rows
    found = None if rows is None or rows.num_rows == 0 else _sorted_out(plan, rows, bucket, moved)
    news = None if found is None or found.events.num_rows == 0 else found.events
    arrived = [table for table in (news, moved) if table is not None]
    aside = list(found.aside) if found is not None else []
    again = _again(plan, bucket, arrived, moves) if arrived or (moves is not None and len(moves.users)) else None
    if found is None and again is None:
        return None
    files = []
    if news is not None:
        _write_facts(plan, bucket, news)
    fresh: list[pa.Table] = []
    if again is not None:
        aside.append(again.aside)
        if news is not None:
            ids = news["event_id"].combine_chunks()
            fresh = [table.filter(pc.is_in(table["event_id"], value_set=ids)) for table in (again.clean, again.late)]
        if again.void.num_rows:
            files.append(write_table(plan.folder, void_file(bucket), again.void))
    ids = pa.chunked_array([chunk for table in arrived for chunk in table["event_id"].chunks], pa.string())
    written = None if again is None else again.written
    files += _write(plan, bucket, written, joined(aside), ids, None if again is None else again.accepted)
    report = TableReport()
    if rows is not None and found is not None:
        nothing = found.events.slice(0, 0)
        clean, late = fresh or (etl.stored_events(_sessions(plan, nothing), plan.source.transient), None)
        report = table_report(
            clean, joined([*found.aside, *([] if late is None else [late])]), found.counts | ({} if again is None else again.counts)
        )
        report = replace(_by_file(report, rows), rows_in=report.rows_in + found.known, rows_known=found.known)
        assert report.rows_in == rows.num_rows, "rows in = clean + quarantined + known"
    return BucketResult(bucket, tuple(files), report, 0 if again is None else again.gone)


@dataclass(frozen=True, eq=False)
class Again:
    """The users of a bucket with news, made again: all they have now, and how it differs from what the parent has."""

    accepted: pa.Table
    clean: pa.Table  # as stored
    late: pa.Table  # rows set aside because of their user's others
    counts: dict[str, int]
    written: pa.Table  # of ``clean``: new or different
    aside: pa.Table  # of ``late``: new
    void: pa.Table
    gone: int  # events of the parent that are void


def _again(plan: Plan, bucket: int, arrived: Sequence[pa.Table], moves: Moves | None) -> Again:
    source, parent = plan.source, plan.parent
    assert parent is not None, "there is something to lie over"
    users = [pc.unique(table["user_id"]) for table in arrived] + ([] if moves is None else [moves.users])
    since = None
    if not reconsidered(source) and moves is None:  # then only sessions depend on other rows: those that the first new row may belong to
        first = min(int(pc.min(table["timestamp"].cast(pa.int64())).as_py()) for table in arrived)
        since = first - int((source.session_gap_minutes or 0.0) * 60_000_000) - 1
    before = held(parent, bucket, pc.unique(pa.concat_arrays(users)), source, since)
    staying = before.accepted
    if moves is not None and SOURCE_USER in staying.column_names:
        leaving = pc.is_in(pc.coalesce(staying[SOURCE_USER], staying["user_id"]), value_set=moves.ids)
        staying = staying.filter(pc.invert(leaving))
    accepted = joined([staying, *arrived])
    clean, late, counts = _by_user(plan, accepted)
    if since is not None:
        clean = continued(clean, before.clean)
    clean = etl.stored_events(clean, source.transient)
    written, gone = changed(before.clean, clean)
    aside, back = changed(before.aside, late, ("event_id", "reason"))
    void = pa.concat_tables([void_table(gone["event_id"]), void_table(back["event_id"], back["reason"])])
    return Again(accepted, clean, late, counts, written, aside, void, gone.num_rows)


def _sorted_out(plan: Plan, rows: pa.Table, bucket: int | None = None, moved: pa.Table | None = None) -> Sorted:
    """Rows by the verdict of the rules, events with ids, and without those seen before; over a parent if ``bucket`` is given."""
    names = plan.rules.names
    reason, fired = np.array(rows[REASON]), np.asarray(rows[FIRED])
    counts = rule_counts(fired, names)
    aside = [quarantined_rows(rows, reason, names)]
    events = _with_ids(rows.filter(pa.array(reason < 0)).combine_chunks())
    known = 0
    if plan.parent is not None and bucket is not None:
        same, other = same_rows(plan.parent, bucket, events, plan.source, moved)
        aside.append(_with_reason(events.filter(pa.array(other)), CONFLICT))
        counts[CONFLICT], known = int(other.sum()), int(same.sum())
        events = events.filter(pa.array(~(same | other)))
    if plan.source.duplicates == "keep":
        return Sorted(etl.numbered(events), tuple(aside), counts, known)
    first = etl.first_of_each(events)
    aside.append(_with_reason(events.filter(pa.array(~first)), DUPLICATE))
    counts[DUPLICATE] = int((~first).sum())
    return Sorted(events.filter(pa.array(first)), tuple(aside), counts, known)


def _with_ids(events: pa.Table) -> pa.Table:
    """Events with ids; those made of content are made of the user id that came, so that stitching does not change them."""
    if SOURCE_USER not in events.column_names:
        return etl.with_event_ids(events)
    place = events.column_names.index("user_id")
    named = etl.with_event_ids(events.set_column(place, "user_id", events[SOURCE_USER]).drop_columns([SOURCE_USER]))
    return events.set_column(events.column_names.index("event_id"), "event_id", named["event_id"])


def _by_user(plan: Plan, events: pa.Table) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """What a row becomes depending on its user's others: events by time, rows set aside with a ``reason``, how often each rule fired."""
    behaved = judge_users(_sessions(plan, events), plan.source.behaviour)
    clean, counts = behaved.clean, dict(behaved.counts)
    aside = [behaved.quarantined]
    if plan.source.returns == "net":
        clean, netted = etl.net_returns(clean, plan.source.returns_days)
        aside.append(_with_reason(netted, etl.NETTED))
        counts[etl.NETTED] = netted.num_rows
    return etl.in_order(clean), pa.concat_tables(aside), counts


def _sessions(plan: Plan, events: pa.Table) -> pa.Table:
    gap = plan.source.session_gap_minutes
    return events if gap is None else etl.sessionise(events, gap)


def _write(
    plan: Plan, bucket: int, clean: pa.Table | None, aside: pa.Table, ids: pa.ChunkedArray, accepted: pa.Table | None
) -> list[FileEntry]:
    files = []
    if clean is not None and clean.num_rows:
        files.append(write_events(plan.folder, bucket, clean))
        gross = _gross(clean, accepted) if plan.source.returns == "net" and accepted is not None else None
        if gross is not None and gross.num_rows:
            files.append(write_table(plan.folder, gross_file(bucket), gross))
    if len(ids):
        files.append(write_index(plan.folder, bucket, id_hashes(ids)))
    if aside.num_rows:
        aside = aside.sort_by([(FILE, "ascending"), (ROW, "ascending")])
        files.append(write_table(plan.folder, quarantine_file(bucket), tidy_quarantine(aside)))
    return files


def _gross(clean: pa.Table, accepted: pa.Table) -> pa.Table:
    """The values as they came of the events whose value is another now."""
    came = accepted.take(pc.index_in(clean["event_id"], value_set=accepted["event_id"].combine_chunks()))["value"]
    same = pc.fill_null(pc.equal(came, clean["value"]), False)
    both = pc.and_(pc.is_null(came), pc.is_null(clean["value"]))
    return pa.table({"event_id": clean["event_id"], "value": came}).filter(pc.invert(pc.or_(same, both))).sort_by("event_id")


def _by_file(report: TableReport, rows: pa.Table) -> TableReport:
    """The report with the number of rows that came from each file."""
    return replace(report, files=count_values(rows[FILE]))


def _write_facts(plan: Plan, bucket: int, events: pa.Table) -> None:
    """What events say of items; from every event with a place of its own, whatever becomes of it, so that facts only ever add up."""
    if events.num_rows:
        plan.facts_place(bucket).write(arrow_bytes(etl.item_facts(events, plan.source.items_from_events, plan.source.targets)))


def _with_reason(table: pa.Table, reason: str) -> pa.Table:
    return table.append_column("reason", pa.repeat(reason, table.num_rows))


def tidy_quarantine(table: pa.Table) -> pa.Table:
    """Quarantined rows as they are stored: the columns as they came, then reason, file, row and the unreadable text."""
    kept = [name for name in table.column_names if not name.startswith("_") and name != "reason"]
    extra = {"reason": table["reason"], "file": table[FILE], "row": table[ROW], "unreadable": table[UNREADABLE]}
    return pa.table({**{name: table[name] for name in kept}, **{name: column for name, column in extra.items() if name not in kept}})
