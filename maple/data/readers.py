"""Reading a source's files as streams of Arrow tables in Maple's columns: bounded batches, no pickle, no guessing.

A value that cannot be read does not stop anything: its row carries the text in ``_unreadable`` and is quarantined later.
A file that cannot be read at all, a missing column or an unsafe Parquet file is a ``DataError``.
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from maple.artifacts import Place
from maple.data.shape import empty, shape
from maple.data.sources import TableSource
from maple.data.report import FILE, ROW, UNREADABLE
from maple.errors import DataError, MapleError, unknown_name

BATCH_ROWS = 131_072
BATCH_BYTES = 8 << 20
FRAGMENT_ROWS = 1_000_000
MAX_LINE = 1 << 20
LISTED = 20

#: Raw batches: the needed source columns, their record numbers, and the records that have no columns as (number, text).
Raw: TypeAlias = tuple[pa.Table, "np.ndarray[Any, Any]", list[tuple[int, str]]]


@dataclass(frozen=True)
class Fragment:
    """What one task reads: a file, or some row groups of a Parquet file.

    ``label`` is how rows name it; ``first`` the record number of its first row.
    """

    label: str
    place: Place
    groups: tuple[int, ...] | None = None
    first: int = 0


def fragments(table: TableSource, root: Place) -> list[Fragment]:
    """The fragments of a table in a fixed order.

    Parquet files are checked here; ``DataError`` for missing, empty, unsafe or corrupt files.
    """
    out: list[Fragment] = []
    for label, place in files(table, root):
        if table.format_of(label) != "parquet":
            _check_columns(table, columns_of(place, table), label)
            out.append(Fragment(label, place))
            continue
        file = open_parquet(place, label)
        _check_columns(table, file.schema_arrow.names, label)
        groups: list[int] = []
        first = rows = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if groups and rows + size > FRAGMENT_ROWS:
                out.append(Fragment(label, place, tuple(groups), first))
                first, rows, groups = first + rows, 0, []
            groups.append(group)
            rows += size
        out.append(Fragment(label, place, tuple(groups), first))
    return out


def read_fragment(table: TableSource, schema: pa.Schema, fragment: Fragment) -> Iterator[pa.Table]:
    """A fragment as tables of about ``BATCH_ROWS`` rows at most: Maple's columns, then ``_unreadable``, ``_file`` and ``_row``."""
    try:
        for raw, numbers, broken in _raw(table, fragment):
            part = shape(raw, table, schema, fragment.label)
            if broken:
                lost = empty(table, schema, raw.schema, fragment.label, len(broken))
                texts = [f"line: {text[:200]}" for _, text in broken]
                part = pa.concat_tables(
                    [part, lost.set_column(lost.column_names.index(UNREADABLE), UNREADABLE, pa.array(texts, pa.string()))]
                )
            rows = np.concatenate([numbers, np.array([number for number, _ in broken], np.int64)])
            label = pa.DictionaryArray.from_arrays(pa.array(np.zeros(part.num_rows, np.int32)), pa.array([fragment.label]))
            yield part.append_column(FILE, label.cast(pa.string())).append_column(ROW, pa.array(rows, pa.int64()))
    except MapleError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"{fragment.label} is not {table.encoding} text ({error.reason}); declare its `encoding:`, for example latin-1"
        ) from None
    except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
        hint = "declare its `encoding:`, for example latin-1" if "UTF8" in str(error) else "the file may be damaged or of another format"
        raise DataError(f"{fragment.label} cannot be read: {_brief(error)}; {hint}") from None


def batches(table: TableSource, schema: pa.Schema, root: Place) -> Iterator[pa.Table]:
    """All rows of a table, streaming, in a fixed order."""
    for fragment in fragments(table, root):
        yield from read_fragment(table, schema, fragment)


def common_schema(table: TableSource, schema: pa.Schema, found: Sequence[Fragment]) -> pa.Schema:
    """The schema that every fragment's tables have; ``DataError`` where files of one table disagree on a kept column."""
    agreed: pa.Schema | None = None
    first = ""
    for fragment in {fragment.label: fragment for fragment in found}.values():
        raw = pa.schema([(name, pa.string()) for name in table.needed])
        if table.format_of(fragment.label) == "parquet":
            stored = open_parquet(fragment.place, fragment.label).schema_arrow
            raw = pa.schema([stored.field(name) for name in table.needed])
        here = empty(table, schema, raw, fragment.label, 0).schema.append(pa.field(FILE, pa.string())).append(pa.field(ROW, pa.int64()))
        if agreed is None:
            agreed, first = here, fragment.label
        for one, other in zip(agreed, here, strict=True):
            if one.type != other.type:
                raise DataError(
                    f"column {one.name!r} is {one.type} in {first} but {other.type} in {fragment.label}; "
                    "write the files with one type, or declare `types:`"
                )
    assert agreed is not None, "a table has at least one file"
    return agreed


def count_rows(table: TableSource, found: Sequence[Fragment]) -> int:
    """About how many rows the fragments hold: exact for Parquet, lines for text. Depends on the files only."""
    total = 0
    for fragment in found:
        if fragment.groups is not None:
            metadata = open_parquet(fragment.place, fragment.label).metadata
            total += sum(metadata.row_group(group).num_rows for group in fragment.groups)
        else:
            with fragment.place.fs.open_input_stream(fragment.place.path) as stream:
                while chunk := stream.read(BATCH_BYTES):
                    total += chunk.count(b"\n")
    return total


def files(table: TableSource, root: Place) -> list[tuple[str, Place]]:
    """Label and place of every file of a table, sorted within each path; ``DataError`` where a path matches nothing or a file is empty."""
    out: list[tuple[str, Place]] = []
    for path in table.paths:
        place = Place.at(path) if "://" in path else root / path
        if any(sign in path for sign in "*?["):
            at = place.path
            base = at[: re.search(r"[*?\[]", at).start()].rsplit("/", 1)[0]  # type: ignore[union-attr]
            listed = place.fs.get_file_info(pafs.FileSelector(base, recursive="/" in at[len(base) + 1 :], allow_not_found=True))
            found = sorted(info.path for info in listed if info.type == pafs.FileType.File and fnmatch.fnmatchcase(info.path, at))
            if not found:
                raise DataError(f"no file matches {path!r} in {root.uri}; check `path:` in the source YAML")
            out += [(name[len(base) + 1 :], Place(place.fs, name)) for name in found]
        else:
            out.append((path, place))
    for label, place in out:
        info = place.fs.get_file_info(place.path)
        if info.type != pafs.FileType.File:
            raise DataError(f"the file {label} does not exist in {root.uri}; check `path:` in the source YAML{_present(place)}")
        if info.size == 0:
            raise DataError(f"{label} in {root.uri} is empty; export it again, or remove it from `path:`")
    return out


def columns_of(place: Place, table: TableSource | None = None) -> list[str]:
    """The column names of a file, without reading its rows; ``[]`` where it has no header. For advice and checks."""
    table = table or TableSource(path=place.name)
    kind = table.format_of(place.name)
    if table.header:
        return list(table.header)
    if kind == "parquet":
        return [str(name) for name in open_parquet(place, place.name).schema_arrow.names]
    with place.fs.open_input_stream(place.path) as stream:
        head = bytes(stream.read(MAX_LINE))
    line = head.split(b"\n", 1)[0].rstrip(b"\r")
    try:
        text = line.decode("utf-8-sig" if table.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else table.encoding)
    except UnicodeDecodeError:
        raise DataError(f"{place.name} is not {table.encoding} text; declare its `encoding:`, for example latin-1") from None
    if kind == "jsonl":
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{place.name}: the first line is not a JSON object; jsonl has one object a line") from None
        return [str(name) for name in record] if isinstance(record, dict) else []
    if kind == "dat":
        return [] if table.delimiter is None and "::" in text else text.split(table.delimiter or "::")
    if kind == "atomic":
        return [name.split(":", 1)[0] for name in text.split(table.delimiter or "\t")]
    return next(csv.reader([text], delimiter=_delimiter(table, kind)), [])


def open_parquet(place: Place, label: str) -> pq.ParquetFile:
    """A Parquet file whose footer declares no extension types (loading those may run code); ``DataError`` if corrupt or unsafe."""
    try:
        with place.fs.open_input_file(place.path) as handle:
            footer = _footer(handle)
        if _has_extension(footer):
            raise DataError(
                f"{label} declares Arrow extension types (such as tensors); Maple refuses them because reading one can run code. "
                "Write the file again with plain columns (numbers, text, times, lists of those)."
            )
        return pq.ParquetFile(place.fs.open_input_file(place.path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{label} is not a readable Parquet file ({_brief(error)}); it may be cut off or damaged: write it again") from None


def _footer(handle: pa.NativeFile) -> bytes:
    size = handle.size()
    if size < 12:
        raise OSError("too short")
    handle.seek(size - 8)
    tail = bytes(handle.read(8))
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > size - 12:
        raise OSError("its end is not that of a Parquet file")
    handle.seek(size - 8 - length)
    return bytes(handle.read(length))


def _has_extension(footer: bytes) -> bool:
    marks = (b"ARROW:extension", b"ray.data.")
    if any(mark in footer for mark in marks):
        return True
    for run in re.finditer(
        rb"[A-Za-z0-9+/=]{48,}", footer
    ):  # the Arrow schema is stored as base64; its start may be preceded by a length byte
        text = run.group().rstrip(b"=")
        for shift in range(4):
            part = text[shift:]
            plain = base64.b64decode(part[: len(part) // 4 * 4])
            if any(mark in plain for mark in marks):
                return True
    return False


def _check_columns(table: TableSource, present: Sequence[str], label: str) -> None:
    for name in table.needed:
        if name not in present:
            listed = (
                unknown_name("column", name, present) if len(present) <= LISTED else unknown_name("column", name, present)[:600] + " ..."
            )
            raise DataError(f"{label}: {listed} Correct the source YAML.")


def _raw(table: TableSource, fragment: Fragment) -> Iterator[Raw]:
    kind = table.format_of(fragment.label)
    if kind == "parquet":
        yield from _parquet(table, fragment)
    elif kind in ("csv", "tsv"):
        yield from _csv(table, fragment, kind)
    elif kind == "jsonl":
        yield from _jsonl(table, fragment)
    else:
        yield from _split(
            table, fragment, table.delimiter or ("\t" if kind == "atomic" else "::"), skip=kind == "atomic" or not table.header
        )


def _parquet(table: TableSource, fragment: Fragment) -> Iterator[Raw]:
    file = open_parquet(fragment.place, fragment.label)
    start = fragment.first
    for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=list(fragment.groups or ()), columns=table.needed, use_threads=False):
        part = pa.Table.from_batches([batch]).replace_schema_metadata(None).select(table.needed)
        yield part, np.arange(start, start + part.num_rows), []
        start += part.num_rows


def _csv(table: TableSource, fragment: Fragment, kind: str) -> Iterator[Raw]:
    broken: list[tuple[int, str]] = []
    heading = 0 if table.header else 1

    def keep_broken(row: Any) -> str:
        broken.append((row.number - 1 - heading, row.text))
        return "skip"

    with fragment.place.fs.open_input_stream(fragment.place.path) as stream:
        reader = pacsv.open_csv(
            stream,
            read_options=pacsv.ReadOptions(
                use_threads=False, block_size=BATCH_BYTES, encoding=table.encoding, column_names=list(table.header) or None
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=_delimiter(table, kind), newlines_in_values=True, invalid_row_handler=keep_broken
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.string() for name in table.needed}, include_columns=table.needed,
                strings_can_be_null=True, null_values=list(table.nulls),
            ),
        )  # fmt: skip
        start = done = 0
        for batch in reader:
            skip = {number for number, _ in broken}
            numbers = np.arange(start, start + batch.num_rows + len(skip))
            numbers = numbers[~np.isin(numbers, np.fromiter(skip, np.int64, len(skip)))][: batch.num_rows] if skip else numbers
            start = int(numbers[-1]) + 1 if len(numbers) else start
            fresh, done = broken[done:], len(broken)
            yield pa.Table.from_batches([batch]), numbers, fresh
        if broken[done:]:
            yield pa.table({name: pa.array([], pa.string()) for name in table.needed}), np.empty(0, np.int64), broken[done:]


def _lines(fragment: Fragment, encoding: str) -> Iterator[list[str]]:
    with fragment.place.fs.open_input_stream(fragment.place.path) as stream:
        text = io.TextIOWrapper(io.BufferedReader(stream, BATCH_BYTES), "utf-8-sig" if encoding == "utf-8" else encoding, newline=None)
        while found := text.readlines(BATCH_BYTES):
            yield [line.rstrip("\n") for line in found]


def _split(table: TableSource, fragment: Fragment, delimiter: str, skip: bool) -> Iterator[Raw]:
    names = columns_of(fragment.place, table)
    start = -1 if skip else 0
    for lines in _lines(fragment, table.encoding):
        everything = pa.array(lines, pa.string())
        parts = pc.split_pattern(everything, delimiter)
        sizes = np.asarray(pc.list_value_length(parts))
        numbers = np.arange(start, start + len(lines))
        filled = np.asarray(pc.greater(pc.binary_length(everything), 0).to_numpy(zero_copy_only=False)) & (numbers >= 0)
        good = filled & (sizes == len(names))
        bad = np.flatnonzero(filled & ~good)
        kept = parts.filter(pa.array(good))
        columns = {name: _nulled(pc.list_element(kept, names.index(name)), table.nulls) for name in table.needed}
        yield pa.table(columns), numbers[good], [(int(numbers[place]), lines[place]) for place in bad]
        start += len(lines)


def _jsonl(table: TableSource, fragment: Fragment) -> Iterator[Raw]:
    start = 0
    for lines in _lines(fragment, table.encoding):
        columns: dict[str, list[str | None]] = {name: [] for name in table.needed}
        numbers: list[int] = []
        broken: list[tuple[int, str]] = []
        for number, line in enumerate(lines, start):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                broken.append((number, line))
                continue
            numbers.append(number)
            for name, column in columns.items():
                value = record.get(name)
                column.append(None if value is None or value in table.nulls else value if isinstance(value, str) else json.dumps(value))
        arrays = {name: _encodable(column) for name, column in columns.items()}
        yield pa.table(arrays), np.array(numbers, np.int64), broken
        start += len(lines)


def _encodable(column: list[str | None]) -> pa.Array:
    try:
        return pa.array(column, pa.string())
    except UnicodeEncodeError:  # a lone surrogate written as an escape: replaced, as its bytes cannot exist in UTF-8
        return pa.array([None if text is None else text.encode("utf-8", "replace").decode() for text in column], pa.string())


def _nulled(column: pa.Array, nulls: Sequence[str]) -> pa.Array:
    return pc.if_else(pc.is_in(column, value_set=pa.array(nulls, pa.string())), None, column)


def _delimiter(table: TableSource, kind: str) -> str:
    return table.delimiter or ("\t" if kind == "tsv" else ",")


def _present(place: Place) -> str:
    folder = Place(place.fs, place.path.rsplit("/", 1)[0])
    names = [child.name for child in folder.children()][:LISTED]
    return f"; the folder has: {', '.join(names)}" if names else ""


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
