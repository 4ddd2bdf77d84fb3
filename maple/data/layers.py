"""The layers of a snapshot: a base and the deltas over it, read as one. Which files a layer has, and how several of them become a bucket.

A delta holds only rows: new ones, and rows that replace or remove earlier ones, which its *void* names by event id. Every layer has a hash
index of its event ids per bucket (8 bytes a row), so that an append knows what came before without reading it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

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


Kind: TypeAlias = Literal["events", "quarantine", "index", "void", "gross"]


def part_file(kind: Kind, bucket: int) -> str:
    """Where a bucket's part of a layer lies.

    ``events``: clean events. ``quarantine``: rows set aside. ``index``: the sorted hashes of the event ids that the layer brings. ``void``:
    ids of earlier events that it replaces or removes, with a ``reason`` those of rows in quarantine. ``gross``: values as they came, by
    event id, of events whose value returns changed.
    """
    return f"{kind}/bucket={bucket:05d}/part.{'arrow' if kind == 'index' else 'parquet'}"


def left_file(name: str) -> str:
    """Where a layer keeps the keys of rows of a table in the layers below that are no longer in it: an item that left the catalogue."""
    return f"left/{name}"


def packed_file(kind: Kind) -> str:
    """Where a small layer keeps all buckets in one file: a row group each, in the order that the metadata ``buckets`` says."""
    return f"{kind}/packed.{'arrow' if kind == 'index' else 'parquet'}"


def events_file(bucket: int) -> str:
    """Where the clean events of a bucket lie in a base."""
    return part_file("events", bucket)


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

    def table(self, name: str) -> pa.Table:
        """A whole Parquet file."""
        return self._open(name).read()

    def part(self, kind: Kind, bucket: int, columns: Sequence[str] | None = None, since: int | None = None) -> pa.Table | None:
        """What the layer has for a bucket, None where it has nothing: those of the columns that there are.

        With ``since`` (microseconds) only row groups that reach that time.
        """
        packed = self.has(packed_file(kind))
        if not packed and not self.has(part_file(kind, bucket)):
            return None
        file = self._open(packed_file(kind) if packed else part_file(kind, bucket))
        names = file.schema_arrow.names
        groups = list(range(file.metadata.num_row_groups))
        if packed:
            buckets = json.loads(file.metadata.metadata[b"buckets"])
            groups = [group for group in groups if buckets[group] == bucket]
            if not groups:
                return None
        if since is not None:
            place = names.index("timestamp")
            groups = [group for group in groups if file.metadata.row_group(group).column(place).statistics.max_raw >= since]
        wanted = None if columns is None else [column for column in columns if column in names]
        return file.read_row_groups(groups, columns=wanted).replace_schema_metadata(None)

    def schema(self) -> pa.Schema | None:
        """The columns of the layer's events, None where it has none."""
        name = next((name for name in self.manifest.files if name.startswith("events/")), None)
        return None if name is None else self._open(name).schema_arrow.remove_metadata()

    def may_have(self, name: str, hashes: UInt64) -> Bool:
        """Which hashes of event ids are in an index, bool[N]; none where the layer has no such file."""
        if not self.has(name):
            return np.zeros(len(hashes), np.bool_)
        data = read_file(self.folder, self.manifest, name)
        there = np.asarray(pa.ipc.open_file(pa.BufferReader(data)).read_all()["hash"])
        place = np.minimum(np.searchsorted(there, hashes), len(there) - 1)
        return np.asarray(there[place] == hashes)

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
        extra = ("event_id", "timestamp") if len(self.layers) > 1 else ()
        wanted = None if columns is None else list(dict.fromkeys([*columns, *extra]))
        parts: list[pa.Table] = []
        gone: list[pa.Array] = []
        for layer in reversed(self.layers):
            part = layer.part("events", bucket, wanted, since)
            if part is not None:
                parts.append(_without(part, gone))
            void = layer.part("void", bucket)
            if void is not None:
                gone += void.filter(pc.is_null(void["reason"]))["event_id"].chunks
        if not parts:
            return None
        table = merged(parts[::-1])
        if columns is None:
            return table
        for column in columns:
            if column not in table.column_names:
                known = self.schema().names
                if column not in known:
                    raise ArtifactError(f"{self.top.folder.uri}/{events_file(bucket)}: {unknown_name('column', column, known)}")
                table = table.append_column(column, pa.nulls(table.num_rows, self.schema().field(column).type))
        return table.select(list(columns))

    def quarantine(self, bucket: int) -> pa.Table | None:
        """The rows of a bucket that are set aside, the oldest layer's first; None where there are none."""
        parts: list[pa.Table] = []
        gone: list[pa.Table] = []
        for layer in reversed(self.layers):
            part = layer.part("quarantine", bucket)
            if part is not None:
                parts.append(_without_pairs(part, gone))
            void = layer.part("void", bucket)
            if void is not None:
                gone.append(void.filter(pc.is_valid(void["reason"])))
        return joined(parts[::-1]) if parts else None

    def gross(self, bucket: int) -> pa.Table | None:
        """The values of a bucket's events as they came, where returns changed them: event_id, value; None where they changed none."""
        parts = [part for layer in self.layers if (part := layer.part("gross", bucket)) is not None]
        return upsert(parts, "event_id") if parts else None

    def may_have(self, buckets: npt.NDArray[np.int32], hashes: UInt64) -> Bool:
        """Which event ids, by bucket and hash, some layer brought, bool[N]: those may be known, the others are not."""
        out = np.zeros(len(hashes), np.bool_)
        for layer in self.layers:
            if layer.has(packed_file("index")):
                out |= layer.may_have(packed_file("index"), hashes)
                continue
            for bucket in np.unique(buckets).tolist():
                here = buckets == bucket
                out[here] |= layer.may_have(part_file("index", bucket), hashes[here])
        return out

    def newest(self, name: str, key: str) -> pa.Table | None:
        """A table of every layer that has it, by key; None without one.

        Rows of later layers are in place of those with the same key, and without those that left (see ``left_file``).
        """
        parts: list[pa.Table] = []
        gone: list[pa.Array] = []
        for layer in reversed(self.layers):
            if layer.has(name):
                part = layer.table(name)
                parts.append(part.filter(pc.invert(pc.is_in(part[key], value_set=pa.chunked_array(gone, pa.string()).combine_chunks()))))
            if layer.has(left_file(name)):
                gone += layer.table(left_file(name))[key].chunks
        return upsert(parts[::-1], key) if parts else None

    def last(self, name: str) -> pa.Table | None:
        """A table of the uppermost layer that has it."""
        return next((layer.table(name) for layer in reversed(self.layers) if layer.has(name)), None)

    def facts(self) -> list[pa.Table]:
        """What the events of each layer say of items."""
        return [layer.table(FACTS_FILE) for layer in self.layers if layer.has(FACTS_FILE)]

    def schema(self) -> pa.Schema:
        """The columns of the events."""
        return pa.unify_schemas([schema for layer in self.layers if (schema := layer.schema()) is not None])

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


def _without(table: pa.Table, ids: Iterable[pa.Array]) -> pa.Table:
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


def write_part(folder: Place, kind: Kind, bucket: int, table: pa.Table) -> FileEntry:
    """Write a bucket's part of a layer; events in small row groups, in order of time."""
    return write_table(folder, part_file(kind, bucket), table, GROUP_ROWS if kind == "events" else None)


def write_packed(folder: Place, kind: Kind, table: pa.Table, buckets: npt.NDArray[np.int32]) -> FileEntry:
    """Write the parts of several buckets into one file; ``buckets`` says where each row belongs. The order within a bucket stays."""
    order = np.argsort(buckets, kind="stable")
    present, starts = np.unique(buckets[order], return_index=True)
    schema = table.schema.with_metadata({b"buckets": json.dumps(present.tolist()).encode()})
    table = table.take(pa.array(order)).cast(schema)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for start, stop in itertools.pairwise([*starts.tolist(), len(order)]):
            writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
    return write_file(folder, packed_file(kind), bytes(sink.getvalue().to_pybytes()), table.num_rows)


def write_index(folder: Place, bucket: int | None, ids: pa.Array | pa.ChunkedArray) -> FileEntry:
    """Write the hashes of the event ids that a layer brings to a bucket, or to all of them (None)."""
    name = packed_file("index") if bucket is None else part_file("index", bucket)
    return write_file(folder, name, arrow_bytes(pa.table({"hash": np.sort(id_hashes(ids))})), len(ids))


def void_table(ids: pa.Array | pa.ChunkedArray, reasons: pa.Array | pa.ChunkedArray | None = None) -> pa.Table:
    """Event ids of earlier clean rows, or of rows that were set aside with these reasons, as a void's rows."""
    return pa.table({"event_id": ids, "reason": pa.nulls(len(ids), pa.string()) if reasons is None else reasons})
