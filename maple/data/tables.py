"""The tables of a source that give one kind of rows, opened: cut into fragments, with joined tables and exchange rates in memory.

A shop may keep its events in several tables (clicks, orders, order lines). Each has its mapping and its rules; their rows have one schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import Place
from maple.data.files import atomic_types, check_columns, columns_of, files, open_parquet, readable
from maple.data.fragments import FRAGMENT_BYTES, FRAGMENT_ROWS, Fragment, fragments_of
from maple.data.profile import Profile
from maple.data.rates import Rates
from maple.data.readers import Raw, raw_batches, raw_schema
from maple.data.report import FILE, ROW, UNREADABLE
from maple.data.shape import empty, key_texts, plain_table, shape
from maple.data.sources import Currencies, FileSource, Join, TableSource
from maple.data.validate import AnyRule, Judged, Pattern, complete, judge, rule_name
from maple.errors import ConfigError, DataError, unknown_name
from maple.schema import TIMESTAMP

RATES = pa.schema([("currency", pa.string()), ("timestamp", TIMESTAMP), ("rate", pa.float64())])
ATOMIC_KEPT = {"float": "float", "token_seq": "strings", "float_seq": "floats"}

#: Why a row could not be made whole, by what ``_unreadable`` begins with; each is a reason of its own.
MAX_TEXT = 65_536  # characters that are kept of a record which could not be read
SPECIAL = {"spanning_record": "^lines: ", "unmatched_join": "^join: ", "unknown_currency": "^currency: ", "unknown_unit": "^unit: "}


@dataclass(frozen=True, eq=False)
class Lookup:
    """A joined table in memory: its columns by the texts of its keys."""

    join: Join
    keys: pa.Array  # distinct
    columns: pa.Table  # by the names they have here, aligned with the keys
    torn: pa.Array  # keys that several different rows have

    @staticmethod
    def open(join: Join, root: Place) -> Lookup:
        """Read a joined table; ``DataError`` where a column is missing."""
        wanted = list(dict.fromkeys([*join.key.values(), *join.take.values()]))
        raw = read_whole(join, wanted, root)
        label = ", ".join(join.paths)
        own = {theirs: theirs for theirs in join.key.values()}
        columns = {"_key": key_texts(raw, own, label)} | {name: raw[theirs] for name, theirs in join.take.items()}
        with readable(label):
            distinct = pa.table(columns).group_by(list(columns), use_threads=False).aggregate([])
        distinct = distinct.filter(pc.is_valid(distinct["_key"])).combine_chunks()
        counts = pc.value_counts(distinct["_key"])
        torn = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        torn = torn.combine_chunks() if isinstance(torn, pa.ChunkedArray) else torn
        whole = distinct.filter(pc.invert(pc.is_in(distinct["_key"], value_set=torn))).combine_chunks()
        return Lookup(join, whole["_key"].combine_chunks(), whole.select(list(join.take)), torn)

    def add(self, raw: pa.Table, label: str) -> tuple[pa.Table, pa.Array]:
        """The rows with the joined columns, and for those without a match what is wrong (else null)."""
        keys = key_texts(raw, self.join.key, label)
        place = pc.index_in(keys, value_set=self.keys)
        place = pc.if_else(pc.is_valid(keys), place, None)
        taken = self.columns.take(place)
        for name in taken.column_names:
            raw = raw.append_column(name, taken[name])
        table = ", ".join(self.join.paths)
        what = pc.if_else(
            pc.is_in(keys, value_set=self.torn), f"join: several different rows in {table} for ", f"join: no row in {table} for "
        )
        named = pc.binary_join_element_wise(", ".join(self.join.key), pc.fill_null(keys, "(nothing)"), "=")
        return raw, pc.if_else(pc.is_null(place), pc.binary_join_element_wise(what, named, ""), None)


@dataclass(frozen=True, eq=False)
class Tables:
    """Tables of one kind. ``fragments`` are those of all of them; ``schema`` is that of the rows they give."""

    tables: tuple[TableSource, ...]
    target: pa.Schema
    schema: pa.Schema
    fragments: tuple[Fragment, ...]
    lookups: tuple[tuple[Lookup, ...], ...]  # of each table
    rates: tuple[Rates | None, ...]

    @staticmethod
    def open(
        tables: Sequence[TableSource],
        target: pa.Schema,
        root: Place,
        *,
        fragment_bytes: int | None = None,
        fragment_rows: int | None = None,
    ) -> Tables:
        """Find and check all files, cut them, and read what is joined. ``target``: EVENTS, ITEMS, USERS or IDENTITIES.

        ``DataError`` for missing, empty, unsafe or corrupt files and missing columns. ``fragment_bytes`` (of text) and ``fragment_rows``
        (of Parquet) say how large a fragment is; they never change what is read.
        """
        size = FRAGMENT_BYTES if fragment_bytes is None else fragment_bytes
        rows = FRAGMENT_ROWS if fragment_rows is None else fragment_rows
        found: list[Fragment] = []
        typed: list[TableSource] = []
        lookups: list[tuple[Lookup, ...]] = []
        for number, table in enumerate(tables):
            listed = files(table, root)
            for label, place in listed:
                with readable(label, table.encoding):
                    check_columns(table.needed, columns_of(place, table), label)
            typed.append(_typed(table, listed))
            lookups.append(tuple(Lookup.open(join, root) for join in table.join))
            found += fragments_of(table, listed, number, size, rows)
        made = Tables(tuple(typed), target, pa.schema([]), tuple(found), tuple(lookups), tuple(_rates(table, root) for table in tables))
        return replace(made, schema=made._agreed())

    @property
    def num_rows(self) -> int:
        """About how many rows there are: exact for Parquet, records for text. Depends on the files only."""
        return sum(fragment.rows for fragment in self.fragments)

    def file_columns(self) -> dict[str, str]:
        """Every column of the files, mapped or not, with its type there (``text`` in text files); types that differ joined by ``|``."""
        found: dict[str, set[str]] = {}
        for fragment in {(fragment.table, fragment.label): fragment for fragment in self.fragments}.values():
            table = self.tables[fragment.table]
            with readable(fragment.label, table.encoding):
                if table.format_of(fragment.label) == "parquet":
                    here = {field.name: str(field.type) for field in open_parquet(fragment.place, fragment.label).schema_arrow}
                else:
                    here = dict.fromkeys(columns_of(fragment.place, table), "text")
            for name, kind in here.items():
                found.setdefault(name, set()).add(kind)
        return {name: " | ".join(sorted(kinds)) for name, kinds in found.items()}

    def read(self, fragment: Fragment) -> Iterator[pa.Table]:
        """A fragment as tables of about ``BATCH_ROWS`` rows at most: Maple's columns, then ``_unreadable``, ``_file`` and ``_row``."""
        table = self.tables[fragment.table]
        with readable(fragment.label, table.encoding):
            for raw in raw_batches(table, table.needed, fragment):
                yield self._whole(raw, fragment)

    def batches(self) -> Iterator[pa.Table]:
        """All rows, streaming, in a fixed order."""
        for fragment in self.fragments:
            yield from self.read(fragment)

    def _whole(self, batch: Raw, fragment: Fragment) -> pa.Table:
        raw, numbers, broken = batch
        table, label = self.tables[fragment.table], fragment.label
        unmatched: list[pa.Array] = []
        for lookup in self.lookups[fragment.table]:
            raw, missing = lookup.add(raw, label)
            unmatched.append(missing)
        part = shape(raw, table, self.target, label, self.rates[fragment.table])
        if unmatched:
            part = part.set_column(part.column_names.index(UNREADABLE), UNREADABLE, pc.coalesce(*unmatched, part[UNREADABLE]))
        if fragment.stop is None and table.format_of(label) in ("csv", "tsv"):  # quoted fields may run over lines
            part = _spanning(part, self.target)
        if broken:
            lost = empty(table, self.target, raw.schema, label, len(broken))
            texts = [_told(text) for _, text in broken]
            part = pa.concat_tables([part, lost.set_column(lost.column_names.index(UNREADABLE), UNREADABLE, pa.array(texts, pa.string()))])
        rows = np.concatenate([numbers, np.array([number for number, _ in broken], np.int64)])
        name = pa.DictionaryArray.from_arrays(pa.array(np.zeros(part.num_rows, np.int32)), pa.array([label])).cast(pa.string())
        part = part.append_column(FILE, name).append_column(ROW, pa.array(rows, pa.int64()))
        columns = [part[field.name] if field.name in part.column_names else pa.nulls(part.num_rows, field.type) for field in self.schema]
        return pa.table(columns, schema=self.schema)

    def _agreed(self) -> pa.Schema:
        """The schema that the rows of every table have; ``DataError`` where files disagree on a kept column."""
        agreed: dict[str, tuple[pa.DataType, str]] = {}
        for fragment in {(fragment.table, fragment.label): fragment for fragment in self.fragments}.values():
            table = self.tables[fragment.table]
            with readable(fragment.label, table.encoding):
                raw = list(raw_schema(table, table.needed, fragment))
            raw += [field for lookup in self.lookups[fragment.table] for field in lookup.columns.schema]
            for field in empty(table, self.target, pa.schema(raw), fragment.label, 0).schema:
                known, first = agreed.setdefault(field.name, (field.type, fragment.label))
                if known != field.type:
                    raise DataError(
                        f"column {field.name!r} is {known} in {first} but {field.type} in {fragment.label}; "
                        "write the files with one type, or declare `types:`"
                    )
        kept = [name for name in agreed if name not in self.target.names and name != UNREADABLE]
        return pa.schema(
            [(name, agreed[name][0]) for name in [*self.target.names, *kept, UNREADABLE]] + [(FILE, pa.string()), (ROW, pa.int64())]
        )


@dataclass(frozen=True, eq=False)
class RuleBook:
    """The rules of each table under one numbering: ``names`` are what the reasons and fired bits of ``Judged`` mean."""

    rules: tuple[tuple[AnyRule, ...], ...]
    names: tuple[str, ...]

    @staticmethod
    def of(tables: Tables, *, ids: Sequence[str], events: bool, unique: bool = True, parent: Profile | None = None) -> RuleBook:
        """Each table's declared rules with those that Maple always needs (``validate.complete``); ``unique``: one row an id.

        ``ConfigError`` for a rule about a column that its table does not have.
        """
        book = []
        quoted = {part.table for part in tables.fragments if tables.tables[part.table].format_of(part.label) in ("csv", "tsv")}
        for number, table in enumerate(tables.tables):
            special = {
                "spanning_record": number in quoted, "unmatched_join": table.join, "unknown_currency": table.currencies,
                "unknown_unit": table.units,
            }  # fmt: skip
            marks = [
                Pattern(
                    kind="pattern", name=name, column=UNREADABLE, matches=SPECIAL[name],
                    severity="warn" if name == "spanning_record" else None,
                )
                for name, used in special.items()
                if used
            ]  # fmt: skip
            needed = complete(table.rules, ids, events=events, parent=parent)
            rules = (*marks, *(rule for rule in needed if unique or rule.kind != "repeated"))
            known = {*tables.target.names, *table.names, UNREADABLE}
            for rule in rules:
                if rule.column not in known:
                    what = "events do" if events else "its table does"
                    raise ConfigError(
                        f"rule {rule_name(rule)!r} judges the column {rule.column!r}, which {what} not have; keep it under `keep:`. "
                        + unknown_name("column", rule.column, known - {UNREADABLE})
                    )
            book.append(rules)
        names = list(dict.fromkeys(rule_name(rule) for rules in book for rule in rules))
        if len(names) > 62:
            raise ConfigError(f"the tables of a source may have at most 62 rules of different names, these have {len(names)}")
        return RuleBook(tuple(book), tuple(names))

    @property
    def by_name(self) -> dict[str, AnyRule]:
        """A rule of each name; tables may have rules of one name that differ."""
        return {rule_name(rule): rule for rules in self.rules for rule in rules}

    def judge(self, table: int, rows: pa.Table, *, catalogue: pa.Table | None = None, now: int | None = None) -> Judged:
        """Judge rows of one table by its rules (``validate.judge``)."""
        rules = self.rules[table]
        places = np.array([self.names.index(rule_name(rule)) for rule in rules], np.int64)
        found = judge(rows, rules, catalogue=catalogue, now=now)
        if np.array_equal(places, np.arange(len(places))):
            return found
        fired = np.zeros_like(found.fired)
        for place, number in enumerate(places.tolist()):
            fired |= (found.fired >> place & 1) << number
        return Judged(found.table, np.where(found.reason >= 0, places[found.reason], -1).astype(np.int16), fired)


def read_whole(table: FileSource, wanted: Sequence[str], root: Place) -> pa.Table:
    """Some columns of all files of a small table in memory, as plain types. Records that cannot be read have no row."""
    listed = files(table, root)
    parts: list[pa.Table] = []
    for label, place in listed:
        with readable(label, table.encoding):
            check_columns(wanted, columns_of(place, table), label)
    for fragment in fragments_of(table, listed, 0, 1 << 62, 1 << 62):
        with readable(fragment.label, table.encoding):
            parts.append(plain_table(raw_schema(table, wanted, fragment).empty_table(), fragment.label))
            parts += [plain_table(raw, fragment.label) for raw, _, _ in raw_batches(table, wanted, fragment)]
    try:
        return pa.concat_tables(parts).combine_chunks()
    except pa.ArrowInvalid as error:
        raise DataError(f"the files of {', '.join(table.paths)} disagree on a column: {error}") from None


def _told(text: str) -> str:
    """What is kept of a record that could not be taken apart: its text, after how many lines it runs over if it is more than one."""
    text = text.rstrip("\r\n")
    count = len(text.splitlines())
    cut = len(text) - MAX_TEXT
    front = "line: " if count < 2 else f"lines: {count} in one record, is a quote missing? "
    return front + (text if cut <= 0 else f"{text[:MAX_TEXT]} ... and {cut:,} more characters")


def _spanning(part: pa.Table, target: pa.Schema) -> pa.Table:
    """The rows, those marked whose ids hold line ends: a quote that never closed swallowed the records behind it."""
    for name in (name for name in target.names if name.endswith("_id")):
        ends = pc.fill_null(pc.match_substring(part[name], "\n"), False)
        if pc.any(ends).as_py():
            count = pc.cast(pc.add(pc.count_substring(part[name], "\n"), 1), pa.string())
            text = pc.binary_join_element_wise("lines: ", count, f" in one {name}, is a quote missing? ", part[name], "")
            text = pc.coalesce(pc.if_else(ends, text, None), part[UNREADABLE])
            part = part.set_column(part.column_names.index(UNREADABLE), UNREADABLE, text)
    return part


def _typed(table: TableSource, listed: Sequence[tuple[str, Place]]) -> TableSource:
    """The table with the types that RecBole headers declare for its kept columns, where it declares none itself."""
    declared: dict[str, str] = {}
    for label, place in listed:
        if table.format_of(label) == "atomic" and not table.header:
            declared |= atomic_types(place, table)
    types = {name: ATOMIC_KEPT[declared[origin]] for name, origin in table.keep.items() if declared.get(origin) in ATOMIC_KEPT}
    return table.model_copy(update={"types": {**types, **table.types}}) if types else table


def _rates(table: TableSource, root: Place) -> Rates | None:
    how: Currencies | None = table.currencies
    if how is None or how.daily is None:
        return None if how is None else Rates.fixed(how.rates, how.to)
    daily = how.daily
    plain = daily.plain()
    columns = {"currency": plain.pop("currency"), "timestamp": plain.pop("date"), "rate": plain.pop("rate")}
    given = Tables.open((TableSource.parse({**plain, "columns": columns}, "daily rates"),), RATES, root)
    rows = pa.concat_tables([given.schema.empty_table(), *given.batches()])
    bad = rows.filter(pc.or_(pc.is_valid(rows[UNREADABLE]), pc.fill_null(pc.invert(pc.greater(rows["rate"], 0)), True)))
    if bad.num_rows:
        row = bad.slice(0, 1).to_pylist()[0]
        told = row[UNREADABLE] or f"{daily.currency}={row['currency']}, {daily.rate}={row['rate']}"
        raise DataError(
            f"row {row[ROW] + 1} of {row[FILE]} is no exchange rate ({told}); each row needs a day, a currency and a rate above 0"
        )
    return Rates.daily(rows, how.to)
