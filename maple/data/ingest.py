"""The steps of an ingestion as plain functions: plan, judge a fragment, finish a bucket, publish; and all of them in one process.

``ingest_ray`` maps the same functions over a cluster. Nothing is published before everything passed: the manifest is last.
"""

from __future__ import annotations

import io
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maple.artifacts import FileEntry, Place, point, seal, write_file
from maple.data import etl
from maple.data.behaviour import judge_users, names_of
from maple.data.checks import DUPLICATE, run_checks, stop_on_errors
from maple.data.fragments import Fragment
from maple.data.report import FILE, ROW, UNREADABLE, TableReport, ValidationReport, table_report
from maple.data.snapshot import ITEMS_FILE, KIND, REPORT_FILE, USERS_FILE, Snapshot, events_file, quarantine_file, write_table
from maple.data.sources import SourceConfig, TableSource
from maple.data.tables import RuleBook, Tables
from maple.data.validate import complete, quarantined_rows, rule_counts, validate_events
from maple.errors import ConfigError
from maple.schema import EVENTS, ITEMS, USERS, conform

REASON, FIRED, BUCKET = "_reason", "_fired", "_bucket"
ROWS_PER_BUCKET = 250_000
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that the tasks of one ingestion share."""

    source: SourceConfig
    tables: Tables  # of events
    rules: RuleBook
    catalogue: pa.Table | None  # item_id and price, where a rule asks for them
    num_buckets: int
    now: int  # microseconds
    folder: Place  # the snapshot in the making

    @property
    def fragments(self) -> tuple[Fragment, ...]:
        """What the tasks read, one each."""
        return self.tables.fragments


@dataclass(frozen=True, eq=False)
class BucketResult:
    """What one finished bucket hands to the publisher: the files it wrote, its part of the report, its facts about items."""

    bucket: int
    files: tuple[FileEntry, ...]
    report: TableReport
    facts: pa.Table

    def row(self) -> pa.Table:
        """One row of plain values, to travel between processes."""
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, self.facts.schema) as writer:
            writer.write_table(self.facts)
        files = [vars(entry) for entry in self.files]
        return pa.table(
            {"bucket": [self.bucket], "files": [json.dumps(files)], "report": [json.dumps(self.report.plain())], "facts": [sink.getvalue()]}
        )

    @staticmethod
    def of(row: dict[str, object]) -> BucketResult:
        """The result again, from a row."""
        files = tuple(FileEntry(**entry) for entry in json.loads(str(row["files"])))
        facts = pa.ipc.open_stream(row["facts"]).read_all()
        return BucketResult(int(str(row["bucket"])), files, TableReport.from_plain(json.loads(str(row["report"]))), facts)


@dataclass(frozen=True, eq=False)
class SideTable:
    """A validated item or user table, its quarantined rows and its report."""

    clean: pa.Table
    quarantined: pa.Table
    report: TableReport


def side_table(table: TableSource, schema: pa.Schema, root: Place, key: str) -> SideTable:
    """Read and validate an item or user table (they fit in memory: a catalogue, not a log)."""
    tables = Tables.open((table,), schema, root)
    rows = pa.concat_tables([tables.schema.empty_table(), *tables.batches()])  # a file may have a header and no rows
    found = validate_events(rows, complete(table.rules, (key,), events=False))
    clean = found.clean.sort_by(key)
    plain = clean.select([name for name in clean.column_names if not name.startswith("_")])
    return SideTable(
        conform(plain, schema, f"the {key} table"), tidy_quarantine(found.quarantined), table_report(clean, found.quarantined, found.counts)
    )


def plan(
    source: SourceConfig, root: Place, home: Place, *, rows_per_bucket: int, catalogue: pa.Table | None, now: int | None = None
) -> Plan:
    """Check the event files and decide fragments, rules and buckets; raises before anything is written."""
    tables = Tables.open(source.events, EVENTS, root)
    rules = RuleBook.of(tables, ids=("user_id", "item_id"), events=True)
    asking = [name for name, rule in rules.by_name.items() if rule.kind == "in_catalogue" or getattr(rule, "against", "") == "catalogue"]
    if asking and catalogue is None:
        raise ConfigError(f"the rule `{asking[0]}` needs an item table; declare `items:` in the source or remove the rule")
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    buckets = etl.num_buckets_for(tables.num_rows, rows_per_bucket)
    moment = int(time.time() * 1e6) if now is None else now
    return Plan(source, tables, rules, catalogue if asking else None, buckets, moment, home / "snapshots" / name)


def judged_schema(plan: Plan) -> pa.Schema:
    """The schema of what ``judged_rows`` yields."""
    extra = ((REASON, pa.int16()), (FIRED, pa.int64()), (BUCKET, pa.int32()))
    return pa.schema([*plan.tables.schema, *(pa.field(name, kind) for name, kind in extra)])


def judged_rows(plan: Plan, fragment: Fragment) -> Iterator[pa.Table]:
    """A fragment's rows with what the rules said of each (``_reason``, ``_fired``) and the bucket it belongs to."""
    for rows in plan.tables.read(fragment):
        found = plan.rules.judge(fragment.table, rows, catalogue=plan.catalogue, now=plan.now)
        bucket = np.asarray(found.table[ROW]) % plan.num_buckets  # rows without a user: anywhere, but the same place always
        has_user = pc.is_valid(found.table["user_id"]).combine_chunks()
        bucket[np.asarray(has_user.to_numpy(zero_copy_only=False))] = etl.bucket_of(
            found.table["user_id"].filter(has_user), plan.num_buckets
        )
        table = found.table.append_column(REASON, pa.array(found.reason))
        yield table.append_column(FIRED, pa.array(found.fired)).append_column(BUCKET, pa.array(bucket.astype(np.int32)))


def finish_bucket(plan: Plan, bucket: int, rows: pa.Table) -> BucketResult:
    """All rows of one bucket made final and written: ids, duplicates, times, sessions, order. The order of ``rows`` does not matter."""
    source = plan.source
    names = plan.rules.names
    reason, fired = np.array(rows[REASON]), np.asarray(rows[FIRED])
    counts = rule_counts(fired, names)
    good = pa.array(reason < 0)
    clean = etl.with_event_ids(rows.filter(good).combine_chunks())
    quarantined = [quarantined_rows(rows, reason, names)]
    if source.duplicates == "keep":
        clean = etl.numbered(clean)
    else:
        first = etl.first_of_each(clean)
        again = clean.filter(pa.array(~first))
        quarantined.append(again.append_column("reason", pa.repeat(DUPLICATE, again.num_rows)))
        counts[DUPLICATE] = again.num_rows
        clean = clean.filter(pa.array(first))
    if source.order_clock is not None:
        clean = etl.spread_orders(clean, source.order_clock)
    if source.session_gap_minutes is not None:
        clean = etl.sessionise(clean, source.session_gap_minutes)
    behaved = judge_users(clean, source.behaviour)
    clean, counts = behaved.clean, counts | behaved.counts
    quarantined.append(behaved.quarantined)
    clean = etl.in_order(clean)
    aside = pa.concat_tables(quarantined).sort_by([(FILE, "ascending"), (ROW, "ascending")])
    report = table_report(clean, aside, counts)
    assert report.rows_in == rows.num_rows, "rows in = clean + quarantined"
    files = [write_table(plan.folder, events_file(bucket), etl.stored_events(clean, source.transient))] if clean.num_rows else []
    if aside.num_rows:
        files.append(write_table(plan.folder, quarantine_file(bucket), tidy_quarantine(aside)))
    return BucketResult(bucket, tuple(files), report, etl.item_facts(clean, source.items_from_events, source.targets))


def tidy_quarantine(table: pa.Table) -> pa.Table:
    """Quarantined rows as they are stored: the columns as they came, then reason, file, row and the unreadable text."""
    kept = [name for name in table.column_names if not name.startswith("_") and name != "reason"]
    extra = {"reason": table["reason"], "file": table[FILE], "row": table[ROW], "unreadable": table[UNREADABLE]}
    return pa.table({**{name: table[name] for name in kept}, **{name: column for name, column in extra.items() if name not in kept}})


def publish(plan: Plan, home: Place, results: Iterable[BucketResult], items: SideTable | None, users: SideTable | None) -> Snapshot:
    """Judge the whole, write the tables and the report, seal, and make it the latest.

    On an error nothing is published and the files are removed.
    """
    source = plan.source
    done = sorted(results, key=lambda result: result.bucket)
    events = TableReport.merge(result.report for result in done)
    facts = etl.merge_facts([result.facts for result in done]) if done else None
    sold = 0 if facts is None else pc.count_distinct(facts["item_id"]).as_py()
    report = ValidationReport(source.name, events, sold, None if items is None else items.report, None if users is None else users.report)
    rules = {**plan.rules.by_name, **dict(zip(names_of(source.behaviour), source.behaviour, strict=True))}
    findings = run_checks(source.checks, report, rules=rules, max_quarantined_share=source.max_quarantined_share, now=plan.now)
    stop_on_errors(findings, f"source {source.name!r}", _example(plan, done))  # nothing is published, so the message shows what was wrong
    report = replace(report, findings=findings)
    assert facts is not None, "there are clean rows"
    table = etl.item_table(facts, source.items_from_events, None if items is None else items.clean)
    files = [entry for result in done for entry in result.files]
    files.append(write_table(plan.folder, ITEMS_FILE, table))
    if users is not None:
        files.append(write_table(plan.folder, USERS_FILE, users.clean))
    for name, side in (("items", items), ("users", users)):
        if side is not None and side.quarantined.num_rows:
            files.append(write_table(plan.folder, f"quarantine/{name}.parquet", side.quarantined))
    files.append(write_file(plan.folder, REPORT_FILE, json.dumps(report.plain(), indent=1).encode()))
    meta = {"source": source.plain(), "num_buckets": plan.num_buckets, "targets": list(source.targets), "signals": dict(source.signals)}
    manifest = seal(plan.folder, KIND, meta, files)
    point(home, "snapshot", plan.folder.name)
    return Snapshot(plan.folder, manifest)


def _example(plan: Plan, results: Sequence[BucketResult]) -> str:
    """The first row in quarantine for the most frequent reason, in words; empty where there is none."""
    reasons = TableReport.merge(result.report for result in results).reasons
    main = max(reasons, key=lambda name: reasons[name], default=None)
    found: list[dict[str, object]] = []
    for name in [entry.name for result in results for entry in result.files if entry.name.startswith("quarantine/")]:
        table = pq.read_table(pa.BufferReader((plan.folder / name).read()))
        found += table.filter(pc.equal(table["reason"], main)).slice(0, 1).to_pylist()
    if not found:
        return ""
    row = min(found, key=lambda row: (str(row["file"]), int(str(row["row"]))))
    told = {name: value for name, value in row.items() if value is not None and name not in ("reason", "file", "row", "unreadable")}
    cells = row["unreadable"] or ", ".join(f"{name}={value}" for name, value in told.items())
    return f" For example, {main} in row {int(str(row['row'])) + 1} of {row['file']}: {str(cells)[:300]}"


def side_tables(source: SourceConfig, root: Place) -> tuple[SideTable | None, SideTable | None]:
    """The validated item and user tables, None where the source has none."""
    items = None if source.items is None else side_table(source.items, ITEMS, root, "item_id")
    users = None if source.users is None else side_table(source.users, USERS, root, "user_id")
    return items, users


def ingest_local(
    source: SourceConfig, root: Place, home: Place, *, rows_per_bucket: int = ROWS_PER_BUCKET, now: int | None = None
) -> Snapshot:
    """The whole ingestion in this process, for tables that fit in memory; the same snapshot, digest for digest, as on a cluster."""
    items, users = side_tables(source, root)
    todo = plan(source, root, home, rows_per_bucket=rows_per_bucket, catalogue=None if items is None else prices(items.clean), now=now)
    try:
        parts = [part for fragment in todo.fragments for part in judged_rows(todo, fragment)]
        rows = pa.concat_tables([judged_schema(todo).empty_table(), *parts])
        bucket = np.asarray(rows[BUCKET])
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(todo.num_buckets + 1))
        results = [
            finish_bucket(todo, number, rows.take(pa.array(order[start:stop])))
            for number, (start, stop) in enumerate(itertools.pairwise(edges))
            if stop > start
        ]
        return publish(todo, home, results, items, users)
    except BaseException:
        todo.folder.delete()
        raise


def prices(items: pa.Table) -> pa.Table:
    """What rules may ask of the catalogue."""
    return items.select(["item_id", "price"])
