"""The layers of a snapshot: a base and the deltas over it, read as one. Which files a layer has, and how several of them become a bucket.

A delta holds only rows: new ones, and rows that replace or remove earlier ones, which its *void* names by event id. Every layer has a hash
index of its event ids per bucket (8 bytes a row), so that an append knows what came before without reading it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maple.artifacts import FileEntry, Manifest, Place, arrow_bytes, parquet_bytes, read_file, write_file
from maple.data.etl import in_order
from maple.errors import ArtifactError, unknown_name
from maple.hashing import mix64

KIND = "snapshot"
ITEMS_FILE, USERS_FILE, REPORT_FILE, PAGE_FILE = "items.parquet", "users.parquet", "report.json", "report.html"
#: What the item table was made of, so that a later layer can make it again: the catalogue as the source gives it, and the events' facts.
CATALOGUE_FILE, FACTS_FILE = "catalogue.parquet", "facts.parquet"
IDENTITIES_FILE = "identities.parquet"  # the edges that the users were stitched by
GROUP_ROWS = 32_768  # of a bucket's events: what has to be read to know the end of it

UInt64: TypeAlias = npt.NDArray[np.uint64]
Bool: TypeAlias = npt.NDArray[np.bool_]

_STEP = np.uint64(0x9E3779B97F4A7C15)


def events_file(bucket: int) -> str:
    """Where a bucket's clean events lie."""
    return f"events/bucket={bucket:05d}/part.parquet"


def quarantine_file(bucket: int) -> str:
    """Where the rows of a bucket that were set aside lie."""
    return f"quarantine/bucket={bucket:05d}/part.parquet"


def index_file(bucket: int) -> str:
    """Where the sorted hashes of the event ids that a layer brought to a bucket lie."""
    return f"index/bucket={bucket:05d}/part.arrow"


def void_file(bucket: int) -> str:
    """Where the ids of earlier events that a layer replaces or removes lie; with a ``reason``, those of rows in quarantine."""
    return f"void/bucket={bucket:05d}/part.parquet"


def gross_file(bucket: int) -> str:
    """Where the values of events as they came lie, by event id, for those that returns changed."""
    return f"gross/bucket={bucket:05d}/part.parquet"


@dataclass(frozen=True)
class Layer:
    """One folder of a snapshot. Every read checks the digest of the file it reads."""

    folder: Place
    manifest: Manifest

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    @property
    def num_events(self) -> int:
        """By how many clean events this layer changes the number: those it brings, less the earlier ones it replaces or removes."""
        brought = sum(entry.rows or 0 for name, entry in self.manifest.files.items() if name.startswith("events/"))
        return brought - int(self.manifest.meta.get("voided", 0))

    def table(self, name: str, columns: Sequence[str] | None = None, since: int | None = None) -> pa.Table:
        """A Parquet file, or those of the columns that it has; with ``since`` (microseconds) only row groups that reach that time."""
        file = self._open(name)
        names = file.schema_arrow.names
        wanted = None if columns is None else [column for column in columns if column in names]
        if since is None:
            return file.read(columns=wanted)
        place = names.index("timestamp")
        groups = range(file.metadata.num_row_groups)
        late = [group for group in groups if file.metadata.row_group(group).column(place).statistics.max_raw >= since]
        return file.read_row_groups(late, columns=wanted)

    def schema(self, name: str) -> pa.Schema:
        """The schema of a Parquet file."""
        return self._open(name).schema_arrow

    def hashes(self, bucket: int) -> UInt64:
        """The sorted hashes of the event ids that this layer brought to a bucket."""
        if not self.has(index_file(bucket)):
            return np.empty(0, np.uint64)
        data = read_file(self.folder, self.manifest, index_file(bucket))
        return np.asarray(pa.ipc.open_file(pa.BufferReader(data)).read_all()["hash"])

    def voided(self, bucket: int) -> pa.Table | None:
        """The rows of earlier layers that this one replaces or removes: event_id, reason."""
        return self.table(void_file(bucket)) if self.has(void_file(bucket)) else None

    def _open(self, name: str) -> pq.ParquetFile:
        return pq.ParquetFile(pa.BufferReader(read_file(self.folder, self.manifest, name)))


@dataclass(frozen=True)
class Stack:
    """The layers of a snapshot, the base first."""

    layers: tuple[Layer, ...]

    @property
    def top(self) -> Layer:
        return self.layers[-1]

    def events(self, bucket: int, columns: Sequence[str] | None = None, since: int | None = None) -> pa.Table | None:
        """A bucket's clean events by (timestamp, event_id), None where it has none; with ``since`` at least those from there on."""
        name = events_file(bucket)
        holders = [layer for layer in self.layers if layer.has(name)]
        if not holders:
            return None
        extra = [column for column in ("event_id", "timestamp") if len(holders) > 1 or self.has_void(bucket)]
        wanted = None if columns is None else list(dict.fromkeys([*columns, *extra]))
        parts: list[pa.Table] = []
        gone: list[pa.Array] = []
        for layer in reversed(self.layers):
            if layer.has(name):
                part = layer.table(name, wanted, since)
                parts.append(without(part, gone))
            void = layer.voided(bucket)
            if void is not None:
                gone += void.filter(pc.is_null(void["reason"]))["event_id"].chunks
        table = merged(parts[::-1])
        if columns is None:
            return table
        for column in columns:
            if column not in table.column_names:
                raise ArtifactError(f"{self.top.folder.uri}/{name}: {unknown_name('column', column, self.schema(bucket).names)}")
        return table.select(list(columns))

    def quarantine(self, bucket: int) -> pa.Table | None:
        """The rows of a bucket that are set aside, the oldest layer's first; None where there are none."""
        name = quarantine_file(bucket)
        parts: list[pa.Table] = []
        gone: list[pa.Table] = []
        for layer in reversed(self.layers):
            if layer.has(name):
                parts.append(_without_pairs(layer.table(name), gone))
            void = layer.voided(bucket)
            if void is not None:
                gone.append(void.filter(pc.is_valid(void["reason"])))
        return joined(parts[::-1]) if parts else None

    def known(self, bucket: int, hashes: UInt64) -> Bool:
        """Which hashes of event ids some layer brought to the bucket, bool[N]: those ids may be known, the others are not."""
        out = np.zeros(len(hashes), np.bool_)
        for layer in self.layers:
            there = layer.hashes(bucket)
            if len(there):
                place = np.minimum(np.searchsorted(there, hashes), len(there) - 1)
                out |= there[place] == hashes
        return out

    def newest(self, name: str, key: str) -> pa.Table | None:
        """A table of every layer that has it, rows of later layers in place of those with the same key, by key; None without one."""
        parts = [layer.table(name) for layer in self.layers if layer.has(name)]
        return upsert(parts, key) if parts else None

    def last(self, name: str) -> pa.Table | None:
        """A table of the uppermost layer that has it."""
        return next((layer.table(name) for layer in reversed(self.layers) if layer.has(name)), None)

    def gross(self, bucket: int) -> pa.Table | None:
        """The values of a bucket's events as they came, where returns changed them: event_id, value; None where they changed none."""
        return self.newest(gross_file(bucket), "event_id")

    def facts(self) -> list[pa.Table]:
        """What the events of each layer say of items."""
        return [layer.table(FACTS_FILE) for layer in self.layers if layer.has(FACTS_FILE)]

    def has_void(self, bucket: int) -> bool:
        return any(layer.has(void_file(bucket)) for layer in self.layers)

    def schema(self, bucket: int | None = None) -> pa.Schema:
        """The columns of the events, those of a bucket or of any."""
        schemas = []
        for layer in self.layers:
            files = [name for name in layer.manifest.files if name.startswith("events/")]
            name = files[0] if bucket is None and files else events_file(bucket or 0)
            if layer.has(name):
                schemas.append(layer.schema(name))
        return pa.unify_schemas(schemas)

    @property
    def num_events(self) -> int:
        """Clean events of all layers, tombstones aside."""
        return sum(layer.num_events for layer in self.layers)

    @property
    def num_bytes(self) -> list[int]:
        """The size of each layer's files."""
        return [sum(entry.bytes for entry in layer.manifest.files.values()) for layer in self.layers]


def merged(parts: Sequence[pa.Table]) -> pa.Table:
    """Tables that are each sorted by (timestamp, event_id) as one that is."""
    whole = joined(parts)
    if len(parts) == 1 or "timestamp" not in whole.column_names:
        return whole
    times = np.asarray(whole["timestamp"].cast(pa.int64()))
    edges = np.cumsum([0, *(part.num_rows for part in parts)])
    if all(start == 0 or stop == start or times[start - 1] < times[start] for start, stop in itertools.pairwise(edges.tolist())):
        return whole
    order = np.argsort(times, kind="stable")
    part = np.repeat(np.arange(len(parts)), np.diff(edges))[order]
    starts = np.flatnonzero(np.diff(times[order], prepend=times.min() - 1))
    mixed = np.minimum.reduceat(part, starts) != np.maximum.reduceat(part, starts)  # equal times from several parts
    ties = np.flatnonzero(np.repeat(mixed, np.diff(np.append(starts, len(order)))))
    if len(ties):
        some = whole.select(["event_id", "timestamp"]).take(pa.array(order[ties]))
        order[ties] = np.asarray(in_order(some.append_column("_at", pa.array(order[ties])))["_at"])
    return whole.take(pa.array(order))


def upsert(parts: Sequence[pa.Table], key: str) -> pa.Table:
    """Tables with a key as one by key, where a later row takes the place of an earlier one."""
    whole = joined(parts)
    if len(parts) == 1:
        return whole
    codes = np.asarray(whole[key].combine_chunks().dictionary_encode().indices)
    _, last = np.unique(codes[::-1], return_index=True)
    return whole.take(pa.array(np.sort(len(codes) - 1 - last))).sort_by(key)


def joined(parts: Sequence[pa.Table]) -> pa.Table:
    """Tables one after the other; a column that some of them lack is null there."""
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts, promote_options="default")


def without(table: pa.Table, ids: Iterable[pa.Array]) -> pa.Table:
    """The rows whose event id is not among ``ids``."""
    gone = pa.chunked_array(list(ids), pa.string())
    if len(gone) == 0 or table.num_rows == 0:
        return table
    return table.filter(pc.invert(pc.is_in(table["event_id"], value_set=gone.combine_chunks())))


def _without_pairs(table: pa.Table, gone: Sequence[pa.Table]) -> pa.Table:
    void = pa.concat_tables(gone) if gone else None
    if void is None or void.num_rows == 0:
        return table

    def pair(rows: pa.Table) -> Any:
        return pc.binary_join_element_wise(rows["reason"], rows["event_id"], "\n").combine_chunks()

    return table.filter(pc.invert(pc.fill_null(pc.is_in(pair(table), value_set=pair(void)), False)))


# -- the hash index -----------------------------------------------------------------------------------------------------


def id_hashes(ids: pa.Array | pa.ChunkedArray) -> UInt64:
    """A 64-bit hash of each text, uint64[N], eight bytes at a time over all rows at once; no text is null."""
    column = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    _, offsets, data = column.buffers()
    rows = len(column)
    if rows == 0:
        return np.empty(0, np.uint64)
    edges = np.frombuffer(offsets, np.int32)[column.offset : column.offset + rows + 1].astype(np.int64)
    raw = np.zeros(edges[-1] - edges[0] + 8, np.uint8)
    if data is not None:
        raw[:-8] = np.frombuffer(data, np.uint8)[edges[0] : edges[-1]]
    edges -= edges[0]
    words = np.ndarray((len(raw) - 7,), np.dtype("<u8"), raw.data, strides=(1,))  # the eight bytes from each byte on
    size = np.diff(edges)
    with np.errstate(over="ignore"):
        out = mix64(size.astype(np.uint64) + _STEP)
        for start in range(0, int(size.max()), 8):
            left = np.clip(size - start, 0, 8).astype(np.uint64)
            mask = np.where(left == 8, ~np.uint64(0), (np.uint64(1) << (left % np.uint64(8) * np.uint64(8))) - np.uint64(1))
            word = words[np.minimum(edges[:-1] + start, edges[-1])] & mask
            out = np.where(left > 0, mix64((out ^ word) + _STEP), out)
    return out


# -- writing --------------------------------------------------------------------------------------------------------------


def write_table(folder: Place, name: str, table: pa.Table, group_rows: int | None = None) -> FileEntry:
    """Write one table of a layer that is not sealed yet."""
    return write_file(folder, name, parquet_bytes(table.combine_chunks().replace_schema_metadata(None), group_rows), table.num_rows)


def write_events(folder: Place, bucket: int, events: pa.Table) -> FileEntry:
    """Write a bucket's events, in small row groups in order of time."""
    return write_table(folder, events_file(bucket), events, GROUP_ROWS)


def write_index(folder: Place, bucket: int, hashes: UInt64) -> FileEntry:
    """Write the index of the event ids that a layer brings to a bucket."""
    return write_file(folder, index_file(bucket), arrow_bytes(pa.table({"hash": np.sort(hashes)})), len(hashes))


def void_table(ids: pa.Array | pa.ChunkedArray, reasons: pa.Array | pa.ChunkedArray | None = None) -> pa.Table:
    """Event ids of earlier clean rows, or of rows that were set aside with these reasons, as a void's rows."""
    return pa.table({"event_id": ids, "reason": pa.nulls(len(ids), pa.string()) if reasons is None else reasons})
