"""Compaction: the layers of a snapshot become one base again, bucket by bucket, without the rows of deleted users.

The content stays what it is, and so does its digest: features and tunings made of the layers go with the base. Readers keep what they
opened, since nothing is removed here (see ``purge``). A bucket that has outgrown the limit is split in two, four, eight ...
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import FileEntry, Place, latest, read_file, seal, write_file
from maple.data import etl
from maple.data.drafts import draft, lead, new_folder, pointing, sweep, tidy
from maple.data.history import known_files, reconsidered
from maple.data.ingest import few
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
    write_index,
    write_part,
    write_table,
)  # fmt: skip
from maple.data.page import page
from maple.data.report import FILE, TableReport, ValidationReport, table_report
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.errors import ArtifactError

MAX_LAYERS = 8
MAX_SHARE = 0.25  # of the base's bytes that the layers over it may have

Progress = Callable[[str], None]


def due(snapshot: Snapshot) -> str | None:
    """Why a snapshot should be compacted, None where it need not be."""
    sizes = snapshot.stack.num_bytes
    if len(sizes) - 1 > MAX_LAYERS:
        return f"{len(sizes) - 1} layers lie over the base"
    share = sum(sizes[1:]) / max(sizes[0], 1)
    return f"the layers over the base have {share:.0%} of its bytes" if share > MAX_SHARE else None


def compact(home: Place, name: str | None = None, say: Progress | None = None) -> Snapshot:
    """One base of a snapshot's layers (default: the latest, and then the result is the latest); itself where there is nothing to do.

    Memory: one bucket. What was appended meanwhile is laid over the new base, unless its buckets were split: then compact again.
    """
    with _alone(home):
        sweep(home)
        snapshot = Snapshot.open(home, name)
        buckets = etl.num_buckets_for(snapshot.num_events, int(snapshot.manifest.meta["rows_per_bucket"]))
        buckets = max(buckets, snapshot.num_buckets)
        if not snapshot.below and not snapshot.hides and buckets == snapshot.num_buckets:
            return snapshot
        if say is not None:
            say(f"{len(snapshot.below) + 1} layer(s) of {snapshot.name} into {buckets} bucket(s)")
        folder = new_folder(home)
        with draft(folder):
            manifest_meta, entries = _rewritten(snapshot, folder, buckets)
            tidy(folder, [entry.name for entry in entries])
            with pointing(home):
                manifest = seal(folder, KIND, manifest_meta, entries)
                made = Snapshot(folder, manifest, (), snapshot.tombstones)
                if name is None or latest(home, "snapshot") == snapshot.name:
                    _follow(home, snapshot, made)
        return Snapshot.open(home, folder.name)


def _rewritten(snapshot: Snapshot, folder: Place, buckets: int) -> tuple[dict[str, Any], list[FileEntry]]:
    """Write everything of a snapshot into a folder; the meta of its manifest and the files."""
    stack, source = snapshot.stack, SourceConfig.parse(snapshot.manifest.meta["source"], f"{snapshot.folder.uri}/manifest.json")
    entries: list[FileEntry] = []
    events, examples = TableReport(), None
    for bucket in range(snapshot.num_buckets):
        clean, aside = snapshot.bucket(bucket), stack.quarantine(bucket)
        values = stack.gross(bucket)
        aside = None if aside is None else snapshot.tombstones.keep(aside)
        to_clean = None if clean is None else etl.bucket_of(clean["user_id"], buckets)
        to_aside = None if aside is None else _places(aside, bucket, snapshot.num_buckets, buckets)
        for part in range(bucket, buckets, snapshot.num_buckets):
            rows = None if clean is None else clean.filter(pa.array(to_clean == part))
            late = None if aside is None else aside.filter(pa.array(to_aside == part))
            made, report = _part(folder, part, rows, late, values, source)
            entries += made
            examples = examples if late is None or late.num_rows == 0 else few(late if examples is None else joined([examples, late]))
            events = TableReport.merge([events, report])
    facts = stack.facts()
    users, edges = snapshot.users(), snapshot.identities()
    tables = {
        ITEMS_FILE: snapshot.items(), FACTS_FILE: etl.merge_facts(facts) if facts else None, USERS_FILE: users, IDENTITIES_FILE: edges,
        CATALOGUE_FILE: stack.newest(CATALOGUE_FILE, "item_id"),
    }  # fmt: skip
    for kind in ("items", "users"):
        name = f"quarantine/{kind}.parquet"
        layers = [layer.table(name) for layer in stack.layers if layer.has(name)]
        tables[name] = snapshot.tombstones.keep(_each_once(joined(layers))) if layers else None
    entries += [write_table(folder, name, table) for name, table in tables.items() if table is not None]
    whole = _report(snapshot.whole_report(), events)
    entries.append(write_file(folder, REPORT_FILE, json.dumps(whole.plain()).encode()))
    entries.append(write_file(folder, PAGE_FILE, page(whole, None, examples)))
    kept = ("source", "rows_per_bucket", "targets", "signals")
    meta = {name: snapshot.manifest.meta[name] for name in kept}
    meta |= {"num_buckets": buckets, "files": known_files(snapshot), "content": snapshot.digest, "compacts": snapshot.name}
    if snapshot.tombstones:
        meta["tombstones"] = snapshot.tombstones.digest
    return meta, entries


def _each_once(rows: pa.Table) -> pa.Table:
    """Rows set aside, each once: every append reads the tables beside the events again."""
    places = {json.dumps(row, default=str, sort_keys=True): place for place, row in reversed(list(enumerate(rows.to_pylist())))}
    return rows.take(pa.array(sorted(places.values()), pa.int64()))


def _part(
    folder: Place, bucket: int, rows: pa.Table | None, late: pa.Table | None, values: pa.Table | None, source: SourceConfig
) -> tuple[list[FileEntry], TableReport]:
    """Write one bucket of the new base; its files and what its rows are like."""
    out: list[FileEntry] = []
    ids: list[pa.Array] = []
    nobody = pa.table({"reason": pa.array([], pa.string()), FILE: pa.array([], pa.string())})
    report = TableReport()
    if rows is not None and rows.num_rows:
        out.append(write_part(folder, "events", bucket, rows))
        ids += rows["event_id"].chunks
        report = table_report(rows, nobody, {})
        here = None if values is None else values.filter(pc.is_in(values["event_id"], value_set=rows["event_id"].combine_chunks()))
        if here is not None and here.num_rows:
            out.append(write_part(folder, "gross", bucket, here))
    if late is not None and late.num_rows:
        out.append(write_part(folder, "quarantine", bucket, late))
        ids += late.filter(pc.is_in(late["reason"], value_set=pa.array(reconsidered(source), pa.string())))["event_id"].chunks
        reasons = pc.value_counts(late["reason"].combine_chunks())
        counts = dict(zip(reasons.field("values").to_pylist(), reasons.field("counts").to_pylist(), strict=True))
        report = TableReport.merge([report, TableReport(rows_in=late.num_rows, rows_quarantined=late.num_rows, reasons=counts)])
    if ids:
        out.append(write_index(folder, bucket, pa.chunked_array(ids, pa.string())))
    return out, report


def _places(aside: pa.Table, bucket: int, before: int, now: int) -> npt.NDArray[np.int64]:
    """The new bucket of each row set aside: that of its user, or of its number where it has none."""
    out = np.asarray(aside["row"].fill_null(0)).astype(np.int64) % now
    has_user = np.asarray(pc.is_valid(aside["user_id"]))
    out[has_user] = etl.bucket_of(aside["user_id"].filter(pa.array(has_user)), now)
    return np.where(out % before == bucket, out, bucket)


def _report(whole: ValidationReport, events: TableReport) -> ValidationReport:
    """The report of all layers, with what is there now: rows that are neither clean nor set aside any more are those of deleted users."""
    told = whole.events
    left = told.rows_in - told.rows_known - events.rows_clean - events.rows_quarantined
    return replace(
        whole,
        events=replace(
            events, rows_in=told.rows_in, rules=told.rules, files=told.files, rows_known=told.rows_known, rows_deleted=max(left, 0)
        ),
    )


def _follow(home: Place, snapshot: Snapshot, made: Snapshot) -> None:
    """Make the new base the latest, with what was laid over the old layers meanwhile; called while nobody else points."""
    now = Snapshot.open(home)
    layers = now.stack.layers
    above = layers[len(snapshot.stack.layers) :]
    if [layer.folder.path for layer in layers[: len(snapshot.stack.layers)]] != [layer.folder.path for layer in snapshot.stack.layers]:
        return  # somebody ingested everything anew, or went back
    if above and made.num_buckets != snapshot.num_buckets:
        return
    below = made.name, made.manifest.digest
    for layer in above:
        folder = new_folder(home)
        with draft(folder):
            for entry in layer.manifest.files.values():
                write_file(folder, entry.name, read_file(layer.folder, layer.manifest, entry.name), entry.rows)
            meta = {**layer.manifest.meta, "parent": {"name": below[0], "digest": below[1]}}
            manifest = seal(folder, KIND, meta, list(layer.manifest.files.values()))
        below = folder.name, manifest.digest
    lead(home, below[0])


@contextmanager
def _alone(home: Place) -> Iterator[None]:
    """One compaction of a home at a time; ``ArtifactError`` where another one runs. On object stores nothing is held."""
    folder = home / "snapshots"
    if folder.local is None or not folder.exists():
        yield
        return
    with open(folder.local / ".compacting", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                f"another compaction of {home.uri} is running; wait for it, `maple snapshots list` shows its result"
            ) from None
        yield
