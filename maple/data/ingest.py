"""An ingestion: plan, read and judge fragments, finish buckets, publish; new, or appended to what there is. Here: all of it in one process.

``ingest_ray`` runs the same tasks over a cluster. Nothing is published before everything passed: the manifest is last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maple.artifacts import FileEntry, Place, manifest_of, seal, write_file
from maple.data import etl
from maple.data.behaviour import names_of
from maple.data.checks import run_checks, stop_on_errors
from maple.data.drafts import draft, lead, new_folder, pointing, sweep, tidy
from maple.data.extend import extend_buckets
from maple.data.files import files
from maple.data.finish import BucketResult, finish_bucket, tidy_quarantine
from maple.data.fragments import CHUNK
from maple.data.history import changed, known_files, moves
from maple.data.identity import Stitching, read_identities
from maple.data.layers import (
    CATALOGUE_FILE,
    FACTS_FILE,
    IDENTITIES_FILE,
    ITEMS_FILE,
    KIND,
    PAGE_FILE,
    REPORT_FILE,
    USERS_FILE,
    joined,
    left_file,
    write_table,
)  # fmt: skip
from maple.data.page import page
from maple.data.plan import Plan, read, rows_of
from maple.data.report import TableReport, ValidationReport, table_report
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig, TableSource
from maple.data.tables import RuleBook, Tables
from maple.data.tombstones import Tombstones
from maple.data.validate import complete, validate_events
from maple.errors import ArtifactError, ConfigError, DataError
from maple.hashing import combine, sha256
from maple.schema import EVENTS, ITEMS, USERS, conform

ROWS_PER_BUCKET = 250_000
HASHED = 64 << 20  # bytes of a file whose fingerprint is that of its whole content
SAMPLE, SAMPLES = 65_536, 64  # bytes, and places, that the fingerprint of a larger one is made of
EXAMPLES = 3  # rows in quarantine that a report shows, per reason
Progress = Callable[[str], None]
Task: TypeAlias = Callable[[Plan, int], str]
#: Runs a task for the numbers 0 ... count - 1 in any order; the answers (JSON), in any order.
Runner: TypeAlias = Callable[[Plan, Task, int], Iterable[str]]


@dataclass(frozen=True, eq=False)
class SideTable:
    """A validated item or user table, its quarantined rows and its report."""

    clean: pa.Table
    quarantined: pa.Table
    report: TableReport


@dataclass(frozen=True, eq=False)
class Sides:
    """The validated tables beside the events, None where the source has none. ``identities``: clean edges."""

    items: SideTable | None
    users: SideTable | None
    identities: pa.Table | None = None


@dataclass(frozen=True, eq=False)
class Assessed:
    """What a whole ingestion comes to, before anything of the whole is written: the report with its findings, what it was compared with."""

    report: ValidationReport
    before: ValidationReport | None
    examples: pa.Table  # rows in quarantine, a few per reason
    entries: list[FileEntry]
    voided: int
    facts: pa.Table | None


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


def side_tables(source: SourceConfig, root: Place, tombstones: Tombstones) -> Sides:
    """The side tables of a source; the user table without the users who are to be forgotten."""
    items = None if source.items is None else side_table(source.items, ITEMS, root, "item_id")
    users = None if source.users is None else side_table(source.users, USERS, root, "user_id")
    if users is not None:
        users = replace(users, clean=tombstones.keep(users.clean), quarantined=tombstones.keep(users.quarantined))
    return Sides(items, users, None if source.identities is None else read_identities(source.identities, root).clean)


def ingest_local(
    source: SourceConfig, root: Place, home: Place, *, rows_per_bucket: int = ROWS_PER_BUCKET, now: int | None = None
) -> Snapshot:
    """The whole ingestion in this process; the same snapshot, digest for digest, as on a cluster."""
    return ingested(source, root, home, in_process, rows_per_bucket=rows_per_bucket, now=now)


def append_local(source: SourceConfig, root: Place, home: Place, *, parent: Snapshot | None = None, now: int | None = None) -> Snapshot:
    """``ingest_ray.append`` in this process."""
    return appended(source, root, home, in_process, parent=parent, now=now)


def restitch(home: Place, edges: pa.Table, say: Progress | None = None) -> Snapshot:
    """The latest snapshot with ids stitched by other edges (device_id, user_id), over it: only the events of ids that change users move.

    The old edges again give the old tables again. A source with an identity table of its own stitches by that at the next append.
    """
    parent = Snapshot.open(home)
    source = SourceConfig.parse(parent.manifest.meta["source"], f"{parent.folder.uri}/manifest.json")
    _check_same(parent, source)
    sides, stitching = Sides(None, None, edges), Stitching.of(edges)
    todo = Plan(
        source, None, RuleBook((), ()), None, parent.num_buckets, int(parent.manifest.meta["rows_per_bucket"]), int(time.time() * 1e6),
        new_folder(home), parent=parent, stitching=stitching, moves=moves(parent, stitching, source), tombstones=Tombstones.of(home),
        together=True,
    )  # fmt: skip
    return made(todo, home, in_process, sides, say)


def dry_run(source: SourceConfig, root: Place, home: Place, *, now: int | None = None) -> Assessed:
    """What an ingestion would report, in this process; nothing is published and nothing stays."""
    sides = side_tables(source, root, Tombstones.of(home))
    todo = plan(source, root, home, sides, rows_per_bucket=ROWS_PER_BUCKET, now=now)
    with draft(todo.folder):
        found = _assessed(todo, home, in_process, sides)
    todo.folder.delete()
    return found


def in_process(todo: Plan, task: Task, count: int) -> Iterator[str]:
    """Runs the tasks one after the other."""
    return (task(todo, number) for number in range(count))


def ingested(
    source: SourceConfig, root: Place, home: Place, run: Runner, *, rows_per_bucket: int, now: int | None = None,
    say: Progress | None = None,
) -> Snapshot:  # fmt: skip
    """An ingestion of everything, its tasks run by ``run``."""
    sides = side_tables(source, root, Tombstones.of(home))
    todo = plan(source, root, home, sides, rows_per_bucket=rows_per_bucket, now=now)
    return made(todo, home, run, sides, say)


def appended(
    source: SourceConfig, root: Place, home: Place, run: Runner, *, parent: Snapshot | None = None, now: int | None = None,
    say: Progress | None = None,
) -> Snapshot:  # fmt: skip
    """An ingestion of what the parent (default: the latest) has not read, its tasks run by ``run``; the parent where that is nothing.

    A batch that fits into a bucket is always done in this process.
    """
    parent = Snapshot.open(home) if parent is None else parent
    _check_same(parent, source)
    sides = side_tables(source, root, Tombstones.of(home))
    todo = plan(source, root, home, sides, rows_per_bucket=int(parent.manifest.meta["rows_per_bucket"]), now=now, parent=parent)
    if not todo.fragments and todo.moves is None and not any(table.num_rows for _, table in _side_news(parent, sides)):
        if say is not None:
            say(f"nothing new: {parent.name} has read every file")
        return parent
    small = todo.tables is None or todo.tables.num_rows <= todo.rows_per_bucket
    return made(replace(todo, together=small), home, in_process if small else run, sides, say)


def plan(
    source: SourceConfig, root: Place, home: Place, sides: Sides, *, rows_per_bucket: int, now: int | None = None,
    parent: Snapshot | None = None,
) -> Plan:  # fmt: skip
    """Check the event files (over a parent: new ones) and decide fragments, rules and buckets; raises before anything is written."""
    already = {} if parent is None else known_files(parent)
    wanted: list[TableSource] = []
    new: dict[str, str] = {}
    for table in source.events:
        listed = {label: fingerprint(place) for label, place in files(table, root)}
        unread = {label: mark for label, mark in listed.items() if already.get(label) != mark}
        new |= unread
        if parent is None or len(unread) == len(listed):
            wanted.append(table)
        elif unread:
            wanted.append(table.with_(path=[_literal(label) for label in unread]))
    tables = Tables.open(wanted, EVENTS, root) if wanted else None
    profile = None if parent is None else parent.whole_report().events.profile
    rules = RuleBook((), ()) if tables is None else RuleBook.of(tables, ids=("user_id", "item_id"), events=True, parent=profile)
    asking = [name for name, rule in rules.by_name.items() if rule.kind == "in_catalogue" or getattr(rule, "against", "") == "catalogue"]
    catalogue = _catalogue(parent, sides)
    if asking and catalogue is None:
        raise ConfigError(f"the rule `{asking[0]}` needs an item table; declare `items:` in the source or remove the rule")
    if parent is not None and tables is not None:
        _check_types(parent, tables)
    buckets = etl.num_buckets_for(0 if tables is None else tables.num_rows, rows_per_bucket) if parent is None else parent.num_buckets
    edges = sides.identities if source.identities is not None or parent is None else parent.identities()
    stitching = None if edges is None else Stitching.of(edges)
    return Plan(
        source, tables, rules, catalogue.select(["item_id", "price"]) if asking and catalogue is not None else None, buckets,
        rows_per_bucket, int(time.time() * 1e6) if now is None else now, new_folder(home), files=new, parent=parent, stitching=stitching,
        moves=None if parent is None or stitching is None else moves(parent, stitching, source), tombstones=Tombstones.of(home),
    )  # fmt: skip


def made(todo: Plan, home: Place, run: Runner, sides: Sides, say: Progress | None = None) -> Snapshot:
    """A snapshot by its plan; on any error nothing is published and the half-made folder is removed."""
    sweep(home)
    if say is not None:
        say(f"reading {len(todo.fragments)} fragment(s) of {todo.source.name!r} into {todo.num_buckets} bucket(s)")
    with draft(todo.folder):
        found = _assessed(todo, home, run, sides)
        snapshot = publish(todo, home, found, sides)
    if say is not None:
        for line in found.report.lines():
            say(line)
    return snapshot


def publish(todo: Plan, home: Place, found: Assessed, sides: Sides) -> Snapshot:
    """Write the tables and the report, seal, and make it the latest; ``DataError`` before that where a finding is an error."""
    source, parent = todo.source, todo.parent
    stop_on_errors(found.report.findings, f"source {source.name!r}", _example(found))
    entries = [*found.entries, *_tables(todo, found.facts, sides)]
    meta: dict[str, Any] = {
        "source": source.plain(), "num_buckets": todo.num_buckets, "rows_per_bucket": todo.rows_per_bucket,
        "targets": list(source.targets), "signals": dict(source.signals), "files": dict(todo.files),
    }  # fmt: skip
    if todo.tombstones:
        meta["tombstones"] = todo.tombstones.digest
    if parent is not None:
        meta |= {"parent": {"digest": parent.digest}, "voided": found.voided}
    # The report tells what the data was compared with; it is no part of the content.
    meta["content"] = manifest_of(KIND, meta, {entry.name: entry for entry in entries}).digest
    entries.append(write_file(todo.folder, REPORT_FILE, json.dumps(found.report.plain()).encode()))
    entries.append(write_file(todo.folder, PAGE_FILE, page(found.report, found.before, found.examples)))
    tidy(todo.folder, [entry.name for entry in entries])
    with pointing(home):
        if parent is not None:
            parent = _latest_like(home, parent)
            meta["parent"] = {"name": parent.name, "digest": parent.manifest.digest}
        manifest = seal(todo.folder, KIND, meta, entries)
        lead(home, todo.folder.name)
    return Snapshot(todo.folder, manifest, () if parent is None else parent.stack.layers, todo.tombstones)


def fingerprint(place: Place) -> str:
    """Tells whether a file is the one that was read: its content up to ``HASHED`` bytes; of a larger one its size and samples.

    An edit of a larger file that leaves its size, end and samples is not seen: give a corrected export another name.
    """
    size = int(place.fs.get_file_info(place.path).size)
    if size <= HASHED:
        hashed = hashlib.blake2b(digest_size=16)
        with place.fs.open_input_file(place.path) as file:
            while part := bytes(file.read(CHUNK)):
                hashed.update(part)
        return combine([str(size), hashed.hexdigest()])[:24]
    with place.fs.open_input_file(place.path) as file:
        starts = (*(size * part // SAMPLES for part in range(SAMPLES)), size - SAMPLE)
        return combine([str(size), *(sha256(bytes(file.read_at(SAMPLE, start))) for start in starts)])[:24]


# -- the steps ----------------------------------------------------------------------------------------------------------


def _read(todo: Plan, number: int) -> str:
    return json.dumps(vars(read(todo, number)))


def _finish(todo: Plan, bucket: int) -> str:
    rows = rows_of(todo, [bucket])
    if todo.parent is not None:
        result = extend_buckets(todo, [bucket], rows)
    else:
        result = None if rows is None or rows.num_rows == 0 else finish_bucket(todo, bucket, rows)
    return "" if result is None else json.dumps(result.plain())


def _finish_together(todo: Plan, _: int) -> str:
    every = range(todo.num_buckets)
    result = extend_buckets(todo, every, rows_of(todo, every))
    return "" if result is None else json.dumps(result.plain())


def _assessed(todo: Plan, home: Place, run: Runner, sides: Sides) -> Assessed:
    """Run the tasks, and judge the whole. Holds one merged report, the names of files, and the facts of items: nothing grows with rows."""
    source = todo.source
    deleted = sum(json.loads(answer)["deleted"] for answer in run(todo, _read, len(todo.fragments)))
    entries: list[FileEntry] = []
    events, voided = TableReport(), 0
    for answer in run(todo, _finish_together, 1) if todo.together else run(todo, _finish, todo.num_buckets):
        if answer:
            result = BucketResult.of(json.loads(answer))
            entries += result.files
            events, voided = TableReport.merge([events, result.report]), voided + result.voided
    events = replace(events, rows_in=events.rows_in + deleted, rows_deleted=deleted)
    facts = _facts(todo)
    items, users = (None if side is None else side.report for side in (sides.items, sides.users))
    previous = todo.parent or _previous(home, source)
    before = None if previous is None else previous.whole_report()
    report = ValidationReport(
        source.name, events, 0 if facts is None else pc.count_distinct(facts["item_id"]).as_py(), items, users,
        parent="" if previous is None else previous.name, file_columns={} if todo.tables is None else todo.tables.file_columns(),
    )  # fmt: skip
    examples = _examples(todo, entries)
    if todo.tables is not None:
        rules = {**todo.rules.by_name, **dict(zip(names_of(source.behaviour), source.behaviour, strict=True))}
        limit = source.max_quarantined_share
        found = run_checks(
            source.checks, report, before, rules=rules, max_quarantined_share=limit, now=todo.now, append=todo.parent is not None,
            examples={row["reason"]: f"row {row['row'] + 1} of {row['file']}" for row in reversed(examples.to_pylist())},
        )  # fmt: skip
        report = replace(report, findings=found)
    return Assessed(report, before, examples, entries, voided, facts)


def _previous(home: Place, source: SourceConfig) -> Snapshot | None:
    """The latest snapshot, if it is of the same source and can be read."""
    try:
        found = Snapshot.open(home)
    except ArtifactError:
        return None
    return found if found.manifest.meta["source"]["name"] == source.name else None


def _facts(todo: Plan) -> pa.Table | None:
    """What the new events of all buckets say of items; None where there are none. Grows with items and their prices, not with events."""
    parts: list[pa.Table] = []
    for place in (todo.facts_place(bucket) for bucket in range(todo.num_buckets)):
        if place.exists():
            parts.append(pa.ipc.open_file(pa.BufferReader(place.read())).read_all())
        if len(parts) >= 16:
            parts = [etl.merge_facts(parts)]
    return etl.merge_facts(parts) if parts else None


def _tables(todo: Plan, facts: pa.Table | None, sides: Sides) -> list[FileEntry]:
    """The tables beside the events: whole ones, or over a parent the rows that are new or different."""
    folder, parent = todo.folder, todo.parent
    everything = etl.merge_facts([*([] if parent is None else parent.stack.facts()), *([] if facts is None else [facts])])
    items = etl.item_table(everything, todo.source.items_from_events, _catalogue(parent, sides))
    parts: list[tuple[str, pa.Table | None]] = [
        *(_news(ITEMS_FILE, "item_id", None if parent is None else parent.items(), items)),
        (FACTS_FILE, facts),
    ]
    parts += _side_news(parent, sides)
    for name, side in (("items", sides.items), ("users", sides.users)):
        parts.append((f"quarantine/{name}.parquet", None if side is None or not side.quarantined.num_rows else side.quarantined))
    edges = None if sides.identities is None else sides.identities.sort_by([("device_id", "ascending"), ("user_id", "ascending")])
    if edges is not None:
        edges = edges.filter(pa.array(~(todo.tombstones.covers(edges["device_id"]) | todo.tombstones.covers(edges["user_id"]))))
        if parent is None or parent.identities() != edges:
            parts.append((IDENTITIES_FILE, edges))
    said = {IDENTITIES_FILE}  # no edges at all says something: that nobody is stitched any more
    return [
        write_table(folder, name, table)
        for name, table in parts
        if table is not None and (table.num_rows or parent is None or name in said)
    ]


def _catalogue(parent: Snapshot | None, sides: Sides) -> pa.Table | None:
    """The catalogue as the source gives it; the parent's where that has none."""
    if sides.items is not None:
        return sides.items.clean
    return None if parent is None else parent.stack.newest(CATALOGUE_FILE, "item_id")


def _side_news(parent: Snapshot | None, sides: Sides) -> list[tuple[str, pa.Table]]:
    """The catalogue and the users as they are written: whole, or over a parent what is different."""
    out: list[tuple[str, pa.Table]] = []
    if sides.items is not None:
        before = None if parent is None else parent.stack.newest(CATALOGUE_FILE, "item_id")
        out += _news(CATALOGUE_FILE, "item_id", before, sides.items.clean)
    if sides.users is not None:
        out += _news(USERS_FILE, "user_id", None if parent is None else parent.users(), sides.users.clean)
    return out


def _news(name: str, key: str, before: pa.Table | None, now: pa.Table) -> list[tuple[str, pa.Table]]:
    """A table as it is written: whole, or over what was there the rows that are new or different, and the keys of those that left."""
    if before is None:
        return [(name, now)]
    gone = before.filter(pc.invert(pc.is_in(before[key], value_set=now[key].combine_chunks()))).select([key])
    return [(name, changed(before, now, (key,))[0]), *([(left_file(name), gone)] if gone.num_rows else [])]


def _check_same(parent: Snapshot, source: SourceConfig) -> None:
    """``ConfigError`` where rows can only be ingested together, or where the parent's were made by other settings."""
    if source.order_clock is not None:
        raise ConfigError("events without a clock (`unit: order`) are spread over time together and cannot be appended; ingest everything")
    if source.duplicates == "keep":
        raise ConfigError("with `duplicates: keep` a row that comes again cannot be told from a new one; ingest everything, without append")
    before, now = parent.manifest.meta["source"], source.plain()
    for name in ("name", "duplicates", "session_gap_minutes", "behaviour", "returns", "returns_days", "items_from_events", "targets"):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"`{name}` is {now.get(name)!r}, but {parent.name} was made with {before.get(name)!r}; its rows would not agree with "
                "new ones. Ingest everything again, or keep the setting."
            )


def _check_types(parent: Snapshot, tables: Tables) -> None:
    """``DataError`` where a column of new files has another type than in the parent."""
    stored = parent.stack.schema()
    for column in tables.schema:
        if column.name in stored.names and stored.field(column.name).type != column.type:
            raise DataError(
                f"column {column.name!r} is {stored.field(column.name).type} in {parent.name} but {column.type} in the new files "
                f"({', '.join(sorted({fragment.label for fragment in tables.fragments})[:3])}); write the files with one type, declare "
                "`types:`, or ingest everything again"
            )


def _latest_like(home: Place, parent: Snapshot) -> Snapshot:
    """What to lie over: the latest snapshot, if it is still the parent or a compaction of it; else ``ArtifactError``.

    What an append writes depends on the rows that its parent holds and the buckets they are in, not on the files: those of a parent that
    was compacted and purged meanwhile are not asked for.
    """
    found = Snapshot.open(home)
    if found.name != parent.name and (found.digest, found.num_buckets) != (parent.digest, parent.num_buckets):
        raise ArtifactError(
            f"{found.name} became the latest snapshot while rows were appended to {parent.name}; nothing was published. Append again: "
            "it reads what is missing there."
        )
    return found


def _literal(path: str) -> str:
    """A path as a pattern that matches nothing else."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in path)


def _examples(todo: Plan, entries: Iterable[FileEntry]) -> pa.Table:
    """The first rows in quarantine of every reason, by file and row."""
    found: pa.Table | None = None
    for entry in entries:
        if entry.name.startswith("quarantine/"):
            table = few(pq.read_table(pa.BufferReader((todo.folder / entry.name).read())))
            found = table if found is None else few(joined([found, table]))
    return pa.table({"reason": pa.array([], pa.string())}) if found is None else found


def few(table: pa.Table) -> pa.Table:
    """The first rows of every reason, by file and row."""
    table = table.sort_by([(name, "ascending") for name in ("reason", "file", "row")])
    reason = np.asarray(table["reason"].combine_chunks().dictionary_encode().indices)
    starts = np.flatnonzero(np.diff(reason, prepend=-1))
    place = np.arange(len(reason)) - np.repeat(starts, np.diff(np.append(starts, len(reason))))
    return table.filter(pa.array(place < EXAMPLES))


def _example(found: Assessed) -> str:
    """The first rows in quarantine for what is an error, in words; empty where no row is to blame."""
    reasons, wrong = found.report.events.reasons, {finding.check for finding in found.report.findings if finding.severity == "error"}
    named = [name for name in reasons if name in wrong]
    if not named and "quarantined" in wrong and reasons:
        named = [max(reasons, key=lambda name: reasons[name])]
    told = ""
    for name in named[:EXAMPLES]:
        rows = [row for row in found.examples.to_pylist() if row["reason"] == name]
        for row in rows[:1]:
            known = {key: value for key, value in row.items() if value is not None and key not in ("reason", "file", "row", "unreadable")}
            cells = row["unreadable"] or ", ".join(f"{key}={value}" for key, value in known.items())
            told += f" For example, {name} in row {row['row'] + 1} of {row['file']}: {str(cells)[:300]}"
        if rows[1:]:
            told += " (also " + ", ".join(f"row {row['row'] + 1} of {row['file']}" for row in rows[1:]) + ")"
    return told
