"""The second half of an ingestion: the judged rows of a bucket become final events, a report, and facts of items.

``extend`` does the same over what a parent has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import FileEntry, arrow_bytes
from maple.data import etl
from maple.data.behaviour import judge_users
from maple.data.checks import DUPLICATE, NETTED
from maple.data.history import row_keys
from maple.data.identity import SOURCE_USER
from maple.data.layers import write_index, write_part
from maple.data.plan import FIRED, REASON, Plan
from maple.data.report import FILE, ROW, UNREADABLE, TableReport, count_values, table_report
from maple.data.validate import quarantined_rows, rule_counts


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
class Judged:
    """Judged rows sorted out: the good ones with event ids, those that are set aside with a ``reason``, how often each rule fired."""

    good: pa.Table
    aside: pa.Table
    counts: dict[str, int]


def finish_bucket(plan: Plan, bucket: int, rows: pa.Table) -> BucketResult:
    """All judged rows of one bucket of a new snapshot made final and written. The order of ``rows`` does not matter."""
    found = sorted_out(plan, rows)
    aside, counts = [found.aside], found.counts
    if plan.source.duplicates == "keep":
        events = etl.numbered(found.good)
    else:
        events, again = distinct(found.good)
        aside.append(again)
        counts[DUPLICATE] = again.num_rows
    if plan.source.order_clock is not None:
        events = etl.spread_orders(events, plan.source.order_clock)
    write_facts(plan, bucket, events)
    clean, late, more = by_user(plan, events)
    stored = etl.stored_events(clean, plan.source.transient)
    set_aside = pa.concat_tables([*aside, late])
    report = replace(table_report(stored, set_aside, counts | more), files=count_values(rows[FILE]))
    assert report.rows_in == rows.num_rows, "rows in = clean + quarantined"
    files = []
    if stored.num_rows:
        files.append(write_part(plan.folder, "events", bucket, stored))
    if events.num_rows:
        files.append(write_index(plan.folder, bucket, events["event_id"]))
    if set_aside.num_rows:
        files.append(write_part(plan.folder, "quarantine", bucket, tidy_quarantine(set_aside)))
    changed_values = gross(stored, events) if plan.source.returns == "net" else None
    if changed_values is not None and changed_values.num_rows:
        files.append(write_part(plan.folder, "gross", bucket, changed_values))
    return BucketResult(bucket, tuple(files), report)


def sorted_out(plan: Plan, rows: pa.Table) -> Judged:
    """Judged rows by the verdict of the rules."""
    names = plan.rules.names
    reason, fired = np.array(rows[REASON]), np.asarray(rows[FIRED])
    good = _with_ids(rows.filter(pa.array(reason < 0)).combine_chunks())
    return Judged(good, quarantined_rows(rows, reason, names), rule_counts(fired, names))


def distinct(events: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The first event of each id by file and row, and the others, as duplicates."""
    first = etl.first_of_each(events)
    return events.filter(pa.array(first)), with_reason(events.filter(pa.array(~first)), DUPLICATE)


def by_user(plan: Plan, events: pa.Table) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """What a row becomes depending on its user's others: events by time, rows set aside with a ``reason``, how often each rule fired."""
    gap = plan.source.session_gap_minutes
    behaved = judge_users(events if gap is None else etl.sessionise(events, gap), plan.source.behaviour)
    clean, counts = behaved.clean, dict(behaved.counts)
    aside = [behaved.quarantined]
    if plan.source.returns == "net":
        clean, netted = etl.net_returns(clean, plan.source.returns_days)
        aside.append(with_reason(netted, NETTED))
        counts[NETTED] = netted.num_rows
    return etl.in_order(clean), pa.concat_tables(aside), counts


def gross(stored: pa.Table, accepted: pa.Table) -> pa.Table:
    """The values as they came of the events whose value is another now, by event id."""
    came = accepted.take(pc.index_in(row_keys(stored), value_set=row_keys(accepted)))["value"]
    same = pc.fill_null(pc.equal(came, stored["value"]), False)
    both = pc.and_(pc.is_null(came), pc.is_null(stored["value"]))
    return pa.table({"event_id": stored["event_id"], "value": came}).filter(pc.invert(pc.or_(same, both))).sort_by("event_id")


def write_facts(plan: Plan, bucket: int, events: pa.Table) -> None:
    """What events say of items; from every event with an id of its own, whatever becomes of it, so that facts only ever add up."""
    if events.num_rows:
        plan.facts_place(bucket).write(arrow_bytes(etl.item_facts(events, plan.source.items_from_events, plan.source.targets)))


def with_reason(table: pa.Table, reason: str) -> pa.Table:
    """The rows with a ``reason``."""
    return table.append_column("reason", pa.repeat(reason, table.num_rows))


def tidy_quarantine(table: pa.Table) -> pa.Table:
    """Quarantined rows as they are stored: the columns as they came, then reason, file, row and the unreadable text."""
    table = table.sort_by([(FILE, "ascending"), (ROW, "ascending")])
    kept = [name for name in table.column_names if not name.startswith("_") and name != "reason"]
    extra = {"reason": table["reason"], "file": table[FILE], "row": table[ROW], "unreadable": table[UNREADABLE]}
    return pa.table({**{name: table[name] for name in kept}, **{name: column for name, column in extra.items() if name not in kept}})


def _with_ids(events: pa.Table) -> pa.Table:
    """Events with ids; those made of content are made of the user id that came, so that stitching does not change them."""
    if SOURCE_USER not in events.column_names:
        return etl.with_event_ids(events)
    place = events.column_names.index("user_id")
    named = etl.with_event_ids(events.set_column(place, "user_id", events[SOURCE_USER]).drop_columns([SOURCE_USER]))
    return events.set_column(events.column_names.index("event_id"), "event_id", named["event_id"])
