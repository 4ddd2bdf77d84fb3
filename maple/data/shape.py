"""From a file's columns to Maple's: renaming, re-labelling, ratios, extracts, one currency and unit, texts as numbers and times.

What cannot be read becomes null and is named in ``_unreadable``, so that one bad cell costs one row and not the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.rates import Rates
from maple.data.report import UNREADABLE
from maple.data.sources import LIST_MARK, Clock, TableSource
from maple.errors import DataError
from maple.schema import TIMESTAMP

NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?$"
ZONED = r"(?:[Zz]|[+-]\d\d:?\d\d)$"
UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
MAX_US = 253_402_300_799 * 1_000_000  # the end of the year 9999
MIN_US = 62_135_596_800 * 1_000_000  # from the year 1 to 1970
KEPT = {
    "string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "strings": pa.list_(pa.string()),
    "floats": pa.list_(pa.float64()),
}  # fmt: skip


def shape(raw: pa.Table, table: TableSource, schema: pa.Schema, label: str, rates: Rates | None = None) -> pa.Table:
    """Rows of a file in Maple's columns: those of ``schema`` (null where not mapped), then the kept ones, then ``_unreadable``.

    ``rates`` are those of the table's ``currencies``; they must be given where there are rows.
    """
    rows = raw.num_rows
    columns: dict[str, pa.Array] = {}
    problem: pa.Array = pa.nulls(rows, pa.string())
    for name in table.names:
        text_or_typed = _source(raw, table, name, label)
        wanted = _wanted(table, schema, name, text_or_typed.type, label)
        # An event before 1970 is a stand-in for "unknown" in the files of shops, and online state does not take it.
        earliest = 0 if name == "timestamp" and table.clock.unit != "order" else -MAX_US
        column, bad = _read(text_or_typed, wanted, table.clock, f"{label}: column {name!r}", earliest, table.separator)
        if bad is not None:
            problem = pc.if_else(
                pc.and_(bad, pc.is_null(problem)), pc.binary_join_element_wise(name, text_or_typed.cast(pa.string()), "="), problem
            )
        columns[name] = column
    for field in schema:
        if field.name not in columns:
            columns[field.name] = pa.nulls(rows, field.type)
    if rows:
        problem = _converted(columns, raw, table, label, rates, problem)
    ordered = [*schema.names, *(name for name in table.names if name not in schema.names)]
    return pa.table({**{name: columns[name] for name in ordered}, UNREADABLE: problem})


def empty(table: TableSource, schema: pa.Schema, raw: pa.Schema, label: str, rows: int) -> pa.Table:
    """A table of ``rows`` rows of nulls with the schema that ``shape`` gives for files with the schema ``raw``."""
    target = shape(raw.empty_table(), table, schema, label).schema
    return pa.table([pa.nulls(rows, field.type) for field in target], schema=target)


def plain_table(raw: pa.Table, label: str) -> pa.Table:
    """A file's columns in the types that Maple computes with; ``DataError`` for one that it does not read."""
    return pa.table({name: _plain(raw[name], label, name) for name in raw.column_names})


def key_texts(columns: pa.Table, names: Mapping[str, str], label: str) -> pa.Array:
    """The texts by which rows of two tables are matched: those of one column, or of several joined; null where one is null."""
    texts = [_read(_plain(columns[name], label, name), pa.string(), Clock(), f"{label}: column {name!r}")[0] for name in names]
    return texts[0] if len(texts) == 1 else pc.binary_join_element_wise(*texts, LIST_MARK)


def _converted(
    columns: dict[str, pa.Array], raw: pa.Table, table: TableSource, label: str, rates: Rates | None, problem: pa.Array
) -> pa.Array:
    """Quantities and amounts made one unit and one currency, in place; rows without a factor are named in ``problem``."""
    for what, scale in (("unit", table.units), ("currency", table.currencies)):
        if scale is None:
            continue
        kind = pc.utf8_trim_whitespace(_plain(raw[scale.column], label, scale.column).cast(pa.string()))
        if table.units is not None and what == "unit":
            known = table.units.factors
            factor = pa.array(list(known.values()), pa.float64()).take(pc.index_in(kind, value_set=pa.array(list(known), pa.string())))
        else:
            assert rates is not None, "a table with currencies is read with its rates"
            factor = rates.of(kind, columns.get("timestamp"))
        for name in scale.applies_to:
            amount = columns[name]
            if not (pa.types.is_floating(amount.type) or pa.types.is_integer(amount.type)):
                raise DataError(f"{label}: column {name!r} is {amount.type}, but a number is needed to convert its {what}")
            lost = pc.and_(pc.is_valid(amount), pc.is_null(factor))
            told = pc.binary_join_element_wise(f"{what}: {scale.column}", pc.fill_null(kind, ""), "=")
            problem = pc.if_else(pc.and_(lost, pc.is_null(problem)), told, problem)
            made = pc.multiply(amount.cast(pa.float64()), factor)
            columns[name] = pc.if_else(lost, amount, made.cast(amount.type, safe=False) if pa.types.is_floating(amount.type) else made)
    return problem


def _source(raw: pa.Table, table: TableSource, name: str, label: str) -> pa.Array:
    rows = raw.num_rows
    if name in table.constants:
        value = table.constants[name]
        return pa.repeat(pa.scalar(value, pa.string() if isinstance(value, str) else None), rows)
    if name in table.ratios:
        above, below = (_number(raw, part, label) for part in table.ratios[name])
        return pc.divide(above, pc.if_else(pc.equal(below, 0.0), None, below))
    if name in table.extract:
        part = table.extract[name]
        found = pc.extract_regex(_plain(raw[part.column], label, part.column).cast(pa.string()), part.pattern)
        column = pc.struct_field(found, "value")
        column = pc.if_else(pc.equal(column, ""), None, column)
    else:
        origin = table.columns.get(name) or table.keep[name]
        column = _plain(raw[origin], label, origin)
    if name in table.values:
        known = table.values[name]
        column = column.cast(pa.string())
        place = pc.index_in(column, value_set=pa.array(list(known), pa.string()))
        column = pc.if_else(pc.is_valid(place), pa.array(list(known.values()), pa.string()).take(place), column)
    return column


def _number(raw: pa.Table, name: str, label: str) -> pa.Array:
    return _read(_plain(raw[name], label, name), pa.float64(), Clock(), f"{label}: column {name!r}")[0]


def _plain(column: pa.ChunkedArray, label: str, name: str) -> pa.Array:
    """One array of an accepted type: dictionaries decoded, wide types made standard; ``DataError`` for anything else."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    target = kind
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        target = pa.string()
    elif pa.types.is_integer(kind):
        target = kind if kind == pa.uint64() else pa.int64()
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        target = pa.float64()
    elif pa.types.is_date(kind):
        target = pa.timestamp("s")
    elif pa.types.is_null(kind):
        target = pa.string()
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_type
        if not (pa.types.is_primitive(inner) or pa.types.is_string(inner) or pa.types.is_large_string(inner)):
            target = None
        elif pa.types.is_large_list(kind):
            target = pa.list_(inner)
    elif not (pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_timestamp(kind)):
        target = None
    if target is None:
        raise DataError(
            f"{label}: column {name!r} is {kind}, which Maple does not read; write it as numbers, text, times or lists of those"
        )
    try:
        if pa.types.is_date64(kind):
            column = column.cast(pa.timestamp("ms"))
        elif pa.types.is_date32(kind):
            column = pc.multiply(column.cast(pa.int32()).cast(pa.int64()), 86_400)
        out = column.cast(target) if target != column.type else column
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{label}: column {name!r} ({kind}) cannot be read as {target}: {error}") from None
    return out.combine_chunks() if isinstance(out, pa.ChunkedArray) else out


def _wanted(table: TableSource, schema: pa.Schema, name: str, found: pa.DataType, label: str) -> pa.DataType:
    if name in schema.names:
        if pa.types.is_list(found) or pa.types.is_large_list(found):
            raise DataError(f"{label}: column {name!r} is {found}, but {schema.field(name).type} is needed; map another column to it")
        return schema.field(name).type
    if name in table.types:
        return KEPT[table.types[name]]
    return TIMESTAMP if pa.types.is_timestamp(found) else found


def _read(
    column: pa.Array, wanted: pa.DataType, clock: Clock, what: str, earliest: int = -MAX_US, separator: str = " "
) -> tuple[pa.Array, pa.Array | None]:  # fmt: skip
    """The column in the wanted type, and which of its non-null cells could not be read (None = all could)."""
    found = column.type
    if pa.types.is_timestamp(wanted):
        read = column if found == wanted else _times(column, clock, what)
        moment = read.cast(pa.int64())
        read = pc.if_else(pc.and_(pc.greater_equal(moment, earliest), pc.less_equal(moment, MAX_US)), read, None)
    elif found == wanted and not pa.types.is_floating(wanted):
        return column, None
    elif pa.types.is_string(wanted):
        read = _texts(column, what)
    elif pa.types.is_boolean(wanted):
        read = _bools(column, what)
    elif pa.types.is_floating(wanted) or pa.types.is_integer(wanted):
        read = _numbers(column, wanted, what)
    elif pa.types.is_string(found):
        read = _lists(column, wanted, separator)
    else:  # lists stay as they are
        return column, None
    bad = pc.and_(
        pc.is_valid(column) if not pa.types.is_floating(found) else pc.and_(pc.is_valid(column), pc.invert(pc.is_nan(column))),
        pc.is_null(read),
    )
    bad = pc.fill_null(bad, False)
    return read, bad if pc.any(bad).as_py() else None


def _wrong(found: pa.DataType, wanted: str, what: str) -> DataError:
    return DataError(f"{what} is {found}, but {wanted} is needed; map another column to it in the source YAML")


def _texts(column: pa.Array, what: str) -> pa.Array:
    found = column.type
    if pa.types.is_floating(found):  # ids that passed through a float column with gaps
        column = pc.if_else(pc.equal(column, pc.floor(column)), column, None)
        column = pc.if_else(pc.less(pc.abs(column), 2.0**53), column, None).cast(pa.int64())
    elif not (pa.types.is_integer(found) or pa.types.is_boolean(found)):
        raise _wrong(found, "text or a whole number", what)
    return column.cast(pa.string())


def _bools(column: pa.Array, what: str) -> pa.Array:
    found = column.type
    if pa.types.is_integer(found) or pa.types.is_floating(found):
        return pc.if_else(pc.is_in(column, value_set=pa.array([0, 1], found)), pc.not_equal(column, 0), None)
    if not pa.types.is_string(found):
        raise _wrong(found, "true or false", what)
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    yes, no = (pc.is_in(lower, value_set=pa.array(words)) for words in (["true", "1", "yes", "y", "t"], ["false", "0", "no", "n", "f"]))
    return pc.if_else(yes, True, pc.if_else(no, False, None))


def _numbers(column: pa.Array, wanted: pa.DataType, what: str) -> pa.Array:
    found = column.type
    if pa.types.is_string(found):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.match_substring_regex(column, NUMBER), column, None).cast(pa.float64())
    elif not (pa.types.is_integer(found) or pa.types.is_floating(found)):
        raise _wrong(found, "a number", what)
    if pa.types.is_integer(wanted):
        if pa.types.is_integer(column.type):
            fits = pc.less_equal(column, np.iinfo(np.int64).max) if column.type == pa.uint64() else True
            return pc.if_else(fits, column, None).cast(wanted)
        whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**53))
        return pc.if_else(whole, column, None).cast(wanted)
    limit = 3.4028234e38 if wanted == pa.float32() else 1.7976931348623157e308
    column = column.cast(pa.float64(), safe=False)
    return pc.if_else(pc.less_equal(pc.abs(column), limit), column, None).cast(wanted)


def _lists(column: pa.Array, wanted: pa.DataType, separator: str) -> pa.Array:
    """Texts as lists of texts or numbers; null where a number cannot be read. Empty values between separators are left out."""
    marked = pc.starts_with(column, LIST_MARK)
    same = pc.if_else(marked, column, pc.replace_substring(column, separator, LIST_MARK))
    parts = pc.split_pattern(pc.if_else(pc.is_valid(column), same, ""), LIST_MARK)
    words, row = pc.list_flatten(parts), pc.list_parent_indices(parts)
    some = pc.not_equal(words, "")
    words, row = words.filter(some), row.filter(some)
    values, bad = (words, None) if pa.types.is_string(wanted.value_type) else _read(words, pa.float64(), Clock(), "")
    ends = np.concatenate([[0], np.cumsum(np.bincount(np.asarray(row), minlength=len(column)))])
    out = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
    lost = np.zeros(len(column), np.bool_)
    if bad is not None:
        lost[np.asarray(row.filter(bad))] = True
    return pc.if_else(pc.and_(pc.is_valid(column), pa.array(~lost)), out, None)


def _in_range(column: pa.Array) -> pa.Array:
    """A column of timestamps in microseconds; null where its count leaves the years 1 to 9999 (a cast would wrap round)."""
    kind = column.type
    per = {"s": 1_000_000, "ms": 1_000, "us": 1}.get(kind.unit)
    if per is not None:
        count = column.cast(pa.int64())
        column = pc.if_else(pc.and_(pc.less_equal(count, MAX_US // per), pc.greater_equal(count, -MIN_US // per)), column, None)
    return column.cast(pa.timestamp("us", kind.tz), safe=False)


def _times(column: pa.Array, clock: Clock, what: str) -> pa.Array:
    found = column.type
    if pa.types.is_timestamp(found):
        column = _in_range(column)
        return column.cast(TIMESTAMP) if found.tz is not None else _zone(column, clock)
    if pa.types.is_boolean(found) or pa.types.is_list(found):
        raise _wrong(found, "a time", what)
    if clock.unit in UNITS or clock.unit == "order":
        scale = UNITS.get(clock.unit, 1_000_000)
        if pa.types.is_integer(found):
            ok = pc.less_equal(column, MAX_US // scale)
            ok = ok if found == pa.uint64() else pc.and_(ok, pc.greater_equal(column, -MAX_US // scale))
            return pc.multiply(pc.if_else(ok, column, None).cast(pa.int64()), scale).cast(TIMESTAMP)
        numbers = _numbers(column, pa.float64(), what)
        ok = pc.less_equal(pc.abs(numbers), MAX_US / scale)
        return pc.round(pc.multiply(pc.if_else(ok, numbers, None), float(scale))).cast(pa.int64()).cast(TIMESTAMP)
    if not pa.types.is_string(found):
        raise DataError(f"{what} is {found}; declare under `clock:` what it counts, `unit: s`, `ms`, `us` or `order`")
    column = pc.utf8_trim_whitespace(column)
    if clock.unit == "strptime":
        return _zone(pc.strptime(column, clock.format, "us", error_is_null=True), clock)
    try:
        zoned = pc.match_substring_regex(column, ZONED)
        exact = pc.if_else(zoned, column, None).cast(TIMESTAMP)
        return pc.if_else(zoned, exact, _zone(pc.if_else(zoned, None, column).cast(pa.timestamp("us")), clock))
    except pa.ArrowInvalid:  # some text is no time: read the distinct ones singly
        coded = column.dictionary_encode()
        read = [_moment(text) for text in coded.dictionary.to_pylist()]
        exact = pa.array([moment if zoned else None for moment, zoned in read], pa.int64()).cast(TIMESTAMP)
        naive = pa.array([None if zoned else moment for moment, zoned in read], pa.int64()).cast(pa.timestamp("us"))
        return pc.coalesce(exact, _zone(naive, clock)).take(coded.indices)


def _zone(naive: pa.Array, clock: Clock) -> pa.Array:
    return pc.assume_timezone(naive, clock.timezone, ambiguous="earliest", nonexistent="earliest").cast(TIMESTAMP)


def _moment(text: Any) -> tuple[int | None, bool]:
    """Microseconds since 1970 of an ISO text as it stands, and whether it names its zone; None where it is no time."""
    try:
        moment = datetime.fromisoformat(text)
        zoned = moment.tzinfo is not None
        since = (moment.astimezone(UTC) if zoned else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        return None, False
    return round(since.total_seconds() * 1_000_000), zoned
