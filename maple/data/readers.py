"""Reading a fragment's rows as streams of Arrow tables in the files' own columns: bounded batches, no pickle, no guessing.

Text stays text. A record that has no columns to read is given back with its number, to be quarantined later; a file that cannot be read
at all is a ``DataError``.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from maple.data.files import MAX_LINE, columns_of, delimiter_of, open_parquet
from maple.data.fragments import Fragment, check_growth
from maple.data.sources import LIST_MARK, FileSource
from maple.errors import DataError

BATCH_ROWS = 131_072
BATCH_BYTES = 8 << 20
CELL_BYTES = 64 << 20  # of decoded text in one batch of Parquet

#: Raw batches: the needed columns, their record numbers, and the records that have no columns as (number, text).
Raw: TypeAlias = tuple[pa.Table, npt.NDArray[np.int64], list[tuple[int, str]]]


def raw_batches(table: FileSource, needed: Sequence[str], fragment: Fragment) -> Iterator[Raw]:
    """The needed columns of a fragment in batches of about ``BATCH_ROWS`` rows at most."""
    kind = table.format_of(fragment.label)
    if kind == "parquet":
        yield from _parquet(needed, fragment)
    elif kind in ("csv", "tsv"):
        yield from _csv(table, needed, fragment, kind)
    elif kind == "jsonl":
        yield from _jsonl(table, needed, fragment)
    elif kind == "lists":
        yield from _pairs(table, needed, fragment)
    else:
        delimiter = table.delimiter or ("\t" if kind == "atomic" else "::")
        yield from _split(table, needed, fragment, delimiter, heading=kind == "atomic" or not table.header)


def raw_schema(table: FileSource, needed: Sequence[str], fragment: Fragment) -> pa.Schema:
    """The types in which ``raw_batches`` gives the columns of a fragment's file."""
    kind = table.format_of(fragment.label)
    if kind == "parquet":
        stored = open_parquet(fragment.place, fragment.label).schema_arrow
        return pa.schema([(name, _whole_type(stored.field(name).type)) for name in needed])
    return pa.schema([(name, pa.int64() if kind == "lists" and name == "place" else pa.string()) for name in needed])


def _parquet(needed: Sequence[str], fragment: Fragment) -> Iterator[Raw]:
    file = open_parquet(fragment.place, fragment.label)
    names, groups = file.schema_arrow, list(fragment.groups or ())
    texts = [name for name in needed if _is_text(_whole_type(names.field(name).type))]
    if _repeats_long(open_parquet(fragment.place, fragment.label, texts), groups, texts):
        file = open_parquet(fragment.place, fragment.label, texts)
    metadata = [file.metadata.row_group(group) for group in groups]
    per_row = sum(group.total_byte_size for group in metadata) // max(1, sum(group.num_rows for group in metadata))
    bytes_on_disk = fragment.place.fs.get_file_info(fragment.place.path).size
    decoded = 0
    at, stop = -fragment.skip, fragment.rows
    rows = max(1, min(BATCH_ROWS, CELL_BYTES // max(1, per_row)))
    for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=list(dict.fromkeys(needed)), use_threads=False):
        low, high = max(0, -at), min(batch.num_rows, stop - at)
        if low < high:
            for start, part in _decoded(pa.Table.from_batches([batch.slice(low, high - low)]).select(needed), names, fragment.label):
                decoded += part.nbytes
                check_growth(decoded, bytes_on_disk, fragment.label)
                begin = fragment.first + at + low + start
                yield part, np.arange(begin, begin + part.num_rows), []
        at += batch.num_rows
        if at >= stop:
            break


def _repeats_long(file: pq.ParquetFile, groups: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether some text is long and has a code: a small file may repeat it in every row, so that it must be decoded in slices.

    ``file`` reads the texts as codes; the first row of a group brings the whole dictionary.
    """
    if not texts:
        return False
    for group in groups:
        for batch in itertools.islice(file.iter_batches(batch_size=1, row_groups=[group], columns=list(texts), use_threads=False), 1):
            for column in batch.columns:
                longest = pc.max(pc.binary_length(column.dictionary)).as_py() if pa.types.is_dictionary(column.type) else 0
                if (longest or 0) * BATCH_ROWS > CELL_BYTES:
                    return True
    return False


def _whole_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column without codes."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _decoded(batch: pa.Table, stored: pa.Schema, label: str) -> Iterator[tuple[int, pa.Table]]:
    """The batch with its dictionaries decoded, in slices of at most ``CELL_BYTES`` of text, and where each starts."""
    size = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and _is_text(column.type.value_type):
            whole = column.combine_chunks()
            length = pc.binary_length(whole.dictionary).cast(pa.int64())
            size += np.asarray(pc.fill_null(length.take(whole.indices), 0))
    if size.max(initial=0) > CELL_BYTES:
        raise DataError(f"{label} has a row with more than {CELL_BYTES >> 20} MiB of text; the file may be damaged")
    schema = pa.schema([(name, _whole_type(stored.field(name).type)) for name in batch.column_names])
    cut = np.flatnonzero(np.diff(np.cumsum(size) // CELL_BYTES, prepend=0))
    edges = [0, *(int(place) for place in cut if place), batch.num_rows]
    for start, stop in itertools.pairwise(edges):
        yield start, batch.slice(start, stop - start).cast(schema).replace_schema_metadata(None)


def _csv(table: FileSource, needed: Sequence[str], fragment: Fragment, kind: str) -> Iterator[Raw]:
    if fragment.stop is not None and fragment.rows == 0:  # a header or blank lines alone, which Arrow refuses
        return
    broken: list[tuple[int, str]] = []
    heading = 1 if fragment.start == 0 and not table.header else 0
    names = list(table.header) or (columns_of(fragment.place, table) if fragment.start else None)

    def keep_broken(row: Any) -> str:
        broken.append((fragment.first + row.number - 1 - heading, row.text))
        return "skip"

    with _stream(fragment) as stream:
        reader = pacsv.open_csv(
            stream,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=MAX_LINE, encoding=table.encoding, column_names=names),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter_of(table, kind), newlines_in_values=fragment.stop is None, invalid_row_handler=keep_broken
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.string() for name in needed}, include_columns=list(needed),
                strings_can_be_null=True, null_values=list(table.nulls),
            ),
        )  # fmt: skip
        start, done = fragment.first, 0
        ahead: list[int] = []  # numbers of broken records that may lie between the rows to come
        for batch in reader:
            fresh, done = broken[done:], len(broken)
            ahead = [number for number in (*ahead, *(number for number, _ in fresh)) if number >= start]
            numbers = np.arange(start, start + batch.num_rows + len(ahead))
            numbers = numbers[~np.isin(numbers, np.array(ahead, np.int64))][: batch.num_rows]
            start = int(numbers[-1]) + 1 if len(numbers) else start
            part = pa.Table.from_batches([batch])
            for low in range(0, max(part.num_rows, 1), BATCH_ROWS):
                yield part.slice(low, BATCH_ROWS), numbers[low : low + BATCH_ROWS], fresh if low == 0 else []
        if broken[done:]:
            yield pa.table({name: pa.array([], pa.string()) for name in needed}), np.empty(0, np.int64), broken[done:]


def _lines(fragment: Fragment, encoding: str) -> Iterator[list[str]]:
    """The lines of a fragment in batches, whatever ends them; ``DataError`` for one that never ends."""
    name = "utf-8-sig" if fragment.start == 0 and codecs.lookup(encoding).name == "utf-8" else encoding
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(name)(), translate=True)
    rest = ""
    with _stream(fragment) as stream:
        while chunk := bytes(stream.read(BATCH_BYTES)):
            *lines, rest = (rest + decoder.decode(chunk)).split("\n")
            if len(rest) > MAX_LINE:
                raise DataError(f"{fragment.label} has a line of more than {MAX_LINE >> 20} MiB; the file may be damaged")
            yield lines
    if rest := rest + decoder.decode(b"", final=True):
        yield rest.removesuffix("\n").split("\n")


def _split(table: FileSource, needed: Sequence[str], fragment: Fragment, delimiter: str, heading: bool) -> Iterator[Raw]:
    names = columns_of(fragment.place, table)
    start = fragment.first - (1 if heading and fragment.start == 0 else 0)
    for lines in _lines(fragment, table.encoding):
        everything = pa.array(lines, pa.string())
        parts = pc.split_pattern(everything, delimiter)
        sizes = np.asarray(pc.list_value_length(parts))
        numbers = np.arange(start, start + len(lines))
        filled = np.asarray(pc.greater(pc.binary_length(everything), 0).to_numpy(zero_copy_only=False)) & (numbers >= 0)
        good = filled & (sizes == len(names))
        bad = np.flatnonzero(filled & ~good)
        kept = parts.filter(pa.array(good))
        columns = {name: _nulled(pc.list_element(kept, names.index(name)), table.nulls) for name in needed}
        yield pa.table(columns), numbers[good], [(int(numbers[place]), lines[place]) for place in bad]
        start += len(lines)


def _pairs(table: FileSource, needed: Sequence[str], fragment: Fragment) -> Iterator[Raw]:
    """Lines of ``user item item ...``: a row an item; ``place`` grows along the line, the lines and the files of the table."""
    start = fragment.first
    space = r"[\x00-\x20]+" if table.delimiter is None else rf"(?:[\x00-\x20]|\x{ord(table.delimiter):02x})+"
    for lines in _lines(fragment, table.encoding):
        parts = pc.split_pattern_regex(pa.array(lines, pa.string()), space)
        words, line = pc.list_flatten(parts), np.asarray(pc.list_parent_indices(parts))
        some = np.asarray(pc.greater(pc.binary_length(words), 0).to_numpy(zero_copy_only=False))
        words, line = words.filter(pa.array(some)), line[some]
        is_user = np.diff(line, prepend=-1) != 0
        alone = is_user & np.append(is_user[1:], True)
        numbers = start + np.cumsum(~is_user | alone) - 1
        users = np.maximum.accumulate(np.where(is_user, np.arange(len(words)), 0))
        rows = np.flatnonzero(~is_user)
        place = fragment.number * 1_000_000_000 + numbers[rows]
        columns = {"user": words.take(pa.array(users[rows])), "item": words.take(pa.array(rows)), "place": pa.array(place)}
        broken = [(int(numbers[at]), lines[line[at]]) for at in np.flatnonzero(alone)]
        yield pa.table({name: columns[name] for name in needed}), numbers[rows], broken
        start += int(np.count_nonzero(~is_user | alone))


def _jsonl(table: FileSource, needed: Sequence[str], fragment: Fragment) -> Iterator[Raw]:
    start = fragment.first
    read = json.JSONDecoder(object_pairs_hook=_record, parse_int=str, parse_float=str, parse_constant=_no_constant).decode
    for lines in _lines(fragment, table.encoding):
        columns: dict[str, list[str | None]] = {name: [] for name in needed}
        numbers: list[int] = []
        broken: list[tuple[int, str]] = []
        for number, line in enumerate(lines, start):
            if not line.strip():
                continue
            try:
                record = read(line)
                cells = [_cell(record, name) for name in needed] if isinstance(record, dict) else None
            except (ValueError, RecursionError):
                cells = None
            if cells is None:
                broken.append((number, line.encode("utf-8", "replace").decode()))
                continue
            numbers.append(number)
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
        arrays = {name: _nulled(pa.array(column, pa.string()), table.nulls) for name, column in columns.items()}
        yield pa.table(arrays), np.array(numbers, np.int64), broken
        start += len(lines)


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key is given twice")
    return record


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")


def _cell(record: dict[str, Any], name: str) -> str | None:
    """A value as text, numbers as they were written, lists marked; ``ValueError`` for an object or what has no UTF-8."""
    value: Any = record.get(name)
    if value is None and "." in name and name not in record:
        value = record
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        if not all(isinstance(part, str) for part in value):
            raise ValueError("a list of lists or objects is no value")
        value = "".join(LIST_MARK + part for part in value) or LIST_MARK
    if value is None or isinstance(value, str):
        if value is not None and not value.isascii():
            value.encode()  # a lone surrogate, written as an escape, is a UnicodeEncodeError: a ValueError
        return value
    raise ValueError("an object is no value; name its parts with dots")


def _nulled(column: pa.Array, nulls: Sequence[str]) -> pa.Array:
    return pc.if_else(pc.is_in(column, value_set=pa.array(nulls, pa.string())), None, column)


def _stream(fragment: Fragment) -> Any:
    if fragment.stop is None:
        return fragment.place.fs.open_input_stream(fragment.place.path)
    return fragment.place.fs.open_input_file(fragment.place.path).get_stream(fragment.start, fragment.stop - fragment.start)
