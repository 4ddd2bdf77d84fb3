"""From a file's columns to Maple's: renaming, re-labelling, ratios, extracts, and reading texts as numbers and times.

What cannot be read becomes null and is named in ``_unreadable``, so that one bad cell costs one row and not the run.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc

from maple.data.sources import Clock, TableSource
from maple.data.validate import UNREADABLE
from maple.errors import DataError
from maple.schema import TIMESTAMP

NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?$"
ZONED = r"(?:[Zz]|[+-]\d\d:?\d\d)$"
UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
MAX_US = 253_402_300_799 * 1_000_000  # the end of the year 9999
KEPT = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


def shape(raw: pa.Table, table: TableSource, schema: pa.Schema, label: str) -> pa.Table:
    """Rows of a file in Maple's columns: those of ``schema`` (null where not mapped), then the kept ones, then ``_unreadable``."""
    rows = raw.num_rows
    columns: dict[str, pa.Array] = {}
    problem: pa.Array = pa.nulls(rows, pa.string())
    for name in table.names:
        text_or_typed = _source(raw, table, name, label)
        wanted = _wanted(table, schema, name, text_or_typed.type, label)
        # An event before 1970 is a stand-in for "unknown" in the files of shops, and online state does not take it.
        earliest = 0 if name == "timestamp" and table.clock.unit != "order" else -MAX_US
        column, bad = _read(text_or_typed, wanted, table.clock, f"{label}: column {name!r}", earliest)
        if bad is not None:
            problem = pc.if_else(
                pc.and_(bad, pc.is_null(problem)), pc.binary_join_element_wise(name, text_or_typed.cast(pa.string()), "="), problem
            )
        columns[name] = column
    for field in schema:
        if field.name not in columns:
            columns[field.name] = pa.nulls(rows, field.type)
    ordered = [*schema.names, *(name for name in table.names if name not in schema.names)]
    return pa.table({**{name: columns[name] for name in ordered}, UNREADABLE: problem})


def empty(table: TableSource, schema: pa.Schema, raw: pa.Schema, label: str, rows: int) -> pa.Table:
    """A table of ``rows`` rows of nulls with the schema that ``shape`` gives for files with the schema ``raw``."""
    target = shape(raw.empty_table(), table, schema, label).schema
    return pa.table([pa.nulls(rows, field.type) for field in target], schema=target)


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
        target = pa.int64()
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        target = pa.float64()
    elif pa.types.is_date(kind):
        target = pa.timestamp("us")
    elif pa.types.is_null(kind):
        target = pa.string()
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_type
        if not (pa.types.is_primitive(inner) or pa.types.is_string(inner) or pa.types.is_large_string(inner)):
            target = None
    elif not (pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_timestamp(kind)):
        target = None
    if target is None:
        raise DataError(
            f"{label}: column {name!r} is {kind}, which Maple does not read; write it as numbers, text, times or lists of those"
        )
    try:
        out = column.cast(target) if target != kind else column
    except pa.ArrowInvalid as error:
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
    column: pa.Array, wanted: pa.DataType, clock: Clock, what: str, earliest: int = -MAX_US
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
            return column.cast(wanted)
        whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**53))
        return pc.if_else(whole, column, None).cast(wanted)
    limit = 3.4028234e38 if wanted == pa.float32() else 1.7976931348623157e308
    column = column.cast(pa.float64(), safe=False)
    return pc.if_else(pc.less_equal(pc.abs(column), limit), column, None).cast(wanted)


def _times(column: pa.Array, clock: Clock, what: str) -> pa.Array:
    found = column.type
    if pa.types.is_timestamp(found):
        if found.tz is not None:
            return column.cast(TIMESTAMP, safe=False)
        return _zone(column.cast(pa.timestamp("us"), safe=False), clock)
    if pa.types.is_boolean(found) or pa.types.is_list(found):
        raise _wrong(found, "a time", what)
    if clock.unit in UNITS or clock.unit == "order":
        scale = UNITS.get(clock.unit, 1_000_000)
        if pa.types.is_integer(found):
            ok = pc.less_equal(pc.abs(column), MAX_US // scale)
            return pc.multiply(pc.if_else(ok, column, None), scale).cast(TIMESTAMP)
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
        moments = pa.array([_moment(text, clock) for text in coded.dictionary.to_pylist()], pa.int64()).cast(TIMESTAMP)
        return moments.take(coded.indices)


def _zone(naive: pa.Array, clock: Clock) -> pa.Array:
    return pc.assume_timezone(naive, clock.timezone, ambiguous="earliest", nonexistent="earliest").cast(TIMESTAMP)


def _moment(text: Any, clock: Clock) -> int | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=ZoneInfo(clock.timezone))
    try:
        return round((moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1_000_000)
    except OverflowError:
        return None
