"""Cleaning as declared rules: which rows are set aside, which are re-labelled, and a report that counts every rule.

A rule is a typed setting, never code. Rules are judged in order; the first quarantining rule that fires names a row's
reason, yet the report counts every rule on every row. Nothing is dropped silently: rows in = clean + quarantined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from maple.config import Section
from maple.errors import ConfigError, DataError, unknown_name
from maple.schema import EVENT_CODES, EVENT_TYPES, legal_ids

#: Bookkeeping columns that travel with the rows of a source until a snapshot is written.
FILE, ROW, UNREADABLE = "_file", "_row", "_unreadable"
DUPLICATE = "duplicate"
MAX_RULES = 60  # fired rules travel as one bit each

Bool: TypeAlias = npt.NDArray[np.bool_]


class RuleBase(Section):
    """What every rule has. ``convert`` re-labels the event as ``to`` and makes its value positive; ``note`` only counts."""

    name: str = ""
    events: tuple[str, ...] = ()  # judge only events of these kinds; empty = all
    action: Literal["quarantine", "convert", "note"] = "quarantine"
    to: str = ""  # the event kind that ``convert`` gives

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.action == "convert") != bool(self.to):
            raise ValueError("`to: <event>` belongs to `action: convert`, and `convert` needs it")
        for event in (*self.events, *([self.to] if self.to else [])):
            if event not in EVENT_CODES:
                raise ValueError(unknown_name("event type", event, EVENT_TYPES))
        return self


class Pattern(RuleBase):
    """Fires where the text of a column ``matches`` a regular expression (RE2), or where it ``lacks`` one. Null never fires."""

    kind: Literal["pattern"]
    column: str
    matches: str | None = None
    lacks: str | None = None

    @model_validator(mode="after")
    def _one_pattern(self) -> Self:
        if (self.matches is None) == (self.lacks is None):
            raise ValueError("give either `matches:` or `lacks:`")
        try:
            pc.match_substring_regex(pa.array([""]), self.matches or self.lacks)
        except pa.ArrowInvalid as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return self


class Range(RuleBase):
    """Fires where a number lies outside [min, max], or outside (min, max) if ``exclusive``. Null never fires."""

    kind: Literal["range"]
    column: str
    min: float | None = None
    max: float | None = None
    exclusive: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give `min:`, `max:` or both")
        return self


class Required(RuleBase):
    """Fires where a column is null or blank."""

    kind: Literal["required"]
    column: str


class LegalId(RuleBase):
    """Fires where an id is not 1 to 256 bytes of UTF-8 without control characters. Null never fires (that is ``required``)."""

    kind: Literal["legal_id"]
    column: str


class InCatalogue(RuleBase):
    """Fires where the item is not in the source's item table."""

    kind: Literal["in_catalogue"]
    column: str = "item_id"


class Future(RuleBase):
    """Fires where the time is more than ``hours`` after the moment of ingestion."""

    kind: Literal["future"]
    column: str = "timestamp"
    hours: float = Field(default=24.0, ge=0)


class KnownEvent(RuleBase):
    """Fires where the event kind is none of ``schema.EVENT_TYPES``."""

    kind: Literal["known_event"]
    column: str = "event"


class Unreadable(RuleBase):
    """Fires where the reader could not make sense of a value or a line. Always judged first."""

    kind: Literal["unreadable"]
    column: str = UNREADABLE


class Repeated(RuleBase):
    """Fires on every row but the first of a key; for the item and user tables (events have ``duplicates:``)."""

    kind: Literal["repeated"]
    column: str


AnyRule: TypeAlias = Pattern | Range | Required | LegalId | InCatalogue | Future | KnownEvent | Unreadable | Repeated
Rule: TypeAlias = Annotated[AnyRule, Field(discriminator="kind")]
Rules: TypeAlias = Sequence[AnyRule]


def rule_name(rule: AnyRule) -> str:
    """The name a rule has in reports: its own, or made of kind and column."""
    return str(rule.name or (rule.kind if rule.column.startswith("_") else f"{rule.kind}:{rule.column}"))


def complete(rules: Rules, ids: Sequence[str], *, events: bool) -> tuple[AnyRule, ...]:
    """Declared rules framed by the ones Maple always needs: unreadable first; then declared; then ids, time, known kinds, future.

    A built-in rule is left out where a declared quarantining rule of the same kind judges the same column for all events.
    """
    declared = {(rule.kind, rule.column) for rule in rules if rule.action == "quarantine" and not rule.events}
    built: list[AnyRule] = []
    for column in (*ids, *(("event", "timestamp") if events else ())):
        built.append(Required(kind="required", column=column))
    built += [LegalId(kind="legal_id", column=column) for column in ids]
    built += [KnownEvent(kind="known_event"), Future(kind="future")] if events else [Repeated(kind="repeated", column=ids[0])]
    out = (Unreadable(kind="unreadable"), *rules, *(rule for rule in built if (rule.kind, rule.column) not in declared))
    names = [rule_name(rule) for rule in out]
    repeated = sorted({name for name in names if names.count(name) > 1} | ({DUPLICATE} & set(names)))
    if repeated:
        raise ConfigError(f"rule name {repeated[0]!r} is used twice or reserved; give each rule its own `name:`")
    if len(out) > MAX_RULES:
        raise ConfigError(f"a table may have at most {MAX_RULES} rules, this one has {len(out)}; join some patterns with `|`")
    return out


@dataclass(frozen=True, eq=False)
class Judged:
    """A table after its rules: ``reason`` int16[N], the place of the rule that set a row aside or -1; ``fired`` int64[N], a bit a rule."""

    table: pa.Table
    reason: npt.NDArray[np.int16]
    fired: npt.NDArray[np.int64]


def judge(table: pa.Table, rules: Rules, *, catalogue: pa.Array | None = None, now: int | None = None) -> Judged:
    """Judge every row by every rule, in order. ``now`` in microseconds.

    Conversions change clean rows only; quarantined rows stay as they came.
    """
    rows = table.num_rows
    reason = np.full(rows, -1, np.int16)
    fired = np.zeros(rows, np.int64)
    current = table
    for place, rule in enumerate(rules):
        hit = _fires(current, rule, catalogue, now)
        if rule.events:
            hit &= _numpy_bool(pc.is_in(current["event"], value_set=pa.array(rule.events)))
        fired[hit] |= np.int64(1) << place
        if rule.action == "quarantine":
            reason[hit & (reason < 0)] = place
        elif rule.action == "convert" and hit.any():
            mask = pa.array(hit)
            current = _replace(current, "event", pc.if_else(mask, rule.to, current["event"]))
            if "value" in current.column_names:
                current = _replace(current, "value", pc.if_else(mask, pc.abs(current["value"]), current["value"]))
    if current is not table and (reason >= 0).any():
        bad = pa.array(reason >= 0)
        for name in ("event", "value"):
            if name in current.column_names:
                current = _replace(current, name, pc.if_else(bad, table[name], current[name]))
    return Judged(current, reason, fired)


@dataclass(frozen=True, eq=False)
class Validated:
    """``clean`` keeps the columns; ``quarantined`` has the rows as they came, with ``reason``.

    ``counts`` is by rule name, every rule on every row.
    """

    clean: pa.Table
    quarantined: pa.Table
    counts: dict[str, int]

    @property
    def reasons(self) -> dict[str, int]:
        """Quarantined rows by the reason that named them."""
        return count_values(self.quarantined["reason"])


def validate_events(table: pa.Table, rules: Rules, *, catalogue: pa.Array | None = None, now: int | None = None) -> Validated:
    """Split a table by its rules. ``clean.num_rows + quarantined.num_rows == table.num_rows`` always."""
    judged = judge(table, rules, catalogue=catalogue, now=now)
    names = [rule_name(rule) for rule in rules]
    return Validated(
        judged.table.filter(pa.array(judged.reason < 0)),
        quarantined_rows(judged.table, judged.reason, names),
        rule_counts(judged.fired, names),
    )


def quarantined_rows(table: pa.Table, reason: npt.NDArray[np.int16], names: Sequence[str]) -> pa.Table:
    """The rows with a reason, its name in a column ``reason``."""
    bad = np.flatnonzero(reason >= 0)
    label = pa.array([*names]).take(pa.array(reason[bad])) if len(names) else pa.array([], pa.string())
    return table.take(pa.array(bad)).append_column("reason", label)


def rule_counts(fired: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, int]:
    """How many rows each rule fired on."""
    return {name: int(np.count_nonzero(fired >> place & 1)) for place, name in enumerate(names)}


def count_values(column: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """Counts of a string column's values, in the order of the values."""
    found = pc.value_counts(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    pairs = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
    return dict(sorted((str(value), int(count)) for value, count in pairs))


def _fires(table: pa.Table, rule: AnyRule, catalogue: pa.Array | None, now: int | None) -> Bool:
    if rule.column not in table.column_names:
        if rule.kind == "unreadable":
            return np.zeros(table.num_rows, np.bool_)
        raise ConfigError(
            f"rule {rule_name(rule)!r} judges the column {rule.column!r}: {unknown_name('column', rule.column, table.column_names)}"
        )
    column = table[rule.column]
    try:
        return _numpy_bool(_verdict(column, rule, catalogue, now))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ConfigError(f"rule {rule_name(rule)!r} cannot judge column {rule.column!r} of type {column.type}: {error}") from None


def _verdict(column: pa.ChunkedArray, rule: AnyRule, catalogue: pa.Array | None, now: int | None) -> Any:
    match rule:
        case Pattern():
            found = pc.match_substring_regex(column, rule.matches if rule.matches is not None else rule.lacks)
            return found if rule.matches is not None else pc.invert(found)
        case Range():
            low, high = (pc.less_equal, pc.greater_equal) if rule.exclusive else (pc.less, pc.greater)
            under = low(column, rule.min) if rule.min is not None else False
            over = high(column, rule.max) if rule.max is not None else False
            return pc.or_(under, over)
        case Required():
            blank = pc.is_null(column, nan_is_null=True)
            return pc.or_(blank, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), False)) if _is_text(column.type) else blank
        case LegalId():
            return pc.and_(pc.is_valid(column), pc.invert(legal_ids(column)))
        case InCatalogue():
            if catalogue is None:
                raise ConfigError(f"rule {rule_name(rule)!r} needs an item table; declare `items:` in the source or remove the rule")
            return pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, value_set=catalogue)))
        case Future():
            bound = None if now is None else now + int(rule.hours * 3_600_000_000)
            return pa.nulls(len(column), pa.bool_()) if bound is None else pc.greater(column.cast(pa.int64()), bound)
        case KnownEvent():
            return pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, value_set=pa.array(EVENT_TYPES))))
        case Unreadable():
            return pc.is_valid(column)
        case Repeated():
            codes = np.asarray(column.combine_chunks().dictionary_encode().indices.fill_null(-1))
            first = np.zeros(len(codes), np.bool_)
            first[np.unique(codes, return_index=True)[1]] = True
            return pa.array(~first & (codes >= 0))
    raise AssertionError(f"no judge for rule kind {rule.kind}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _numpy_bool(column: Any) -> Bool:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return np.array(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _replace(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column.cast(table.schema.field(name).type))


@dataclass(frozen=True)
class TableReport:
    """What happened to one table: ``reasons`` counts quarantined rows, ``rules`` every rule on every row, ``nulls`` clean rows."""

    rows_in: int = 0
    rows_clean: int = 0
    rows_quarantined: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[str, int] = field(default_factory=dict)
    nulls: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    users: int = 0
    first: int | None = None  # microseconds
    last: int | None = None

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}

    @staticmethod
    def merge(parts: Iterable[TableReport]) -> TableReport:
        """The report of the union of disjoint rows whose users do not overlap either."""
        everything = list(parts)
        counts: dict[str, Any] = {}
        for name in ("rows_in", "rows_clean", "rows_quarantined", "users"):
            counts[name] = sum(getattr(part, name) for part in everything)
        for name in ("reasons", "rules", "nulls", "files", "kinds"):
            total: dict[str, int] = {}
            for part in everything:
                for key, count in getattr(part, name).items():
                    total[key] = total.get(key, 0) + count
            counts[name] = total if name == "rules" else dict(sorted(total.items()))
        firsts = [part.first for part in everything if part.first is not None]
        lasts = [part.last for part in everything if part.last is not None]
        return TableReport(**counts, first=min(firsts, default=None), last=max(lasts, default=None))


def table_report(clean: pa.Table, quarantined: pa.Table, rules: Mapping[str, int]) -> TableReport:
    """The report of one judged part of a table; ``quarantined`` has a ``reason``, both may have a ``_file``."""
    files: dict[str, int] = {}
    for part in (clean, quarantined):
        for name, count in count_values(part[FILE]).items() if FILE in part.column_names else ():
            files[name] = files.get(name, 0) + count
    times = pc.min_max(clean["timestamp"].cast(pa.int64())).as_py() if "timestamp" in clean.column_names else {"min": None, "max": None}
    return TableReport(
        rows_in=clean.num_rows + quarantined.num_rows, rows_clean=clean.num_rows, rows_quarantined=quarantined.num_rows,
        reasons=count_values(quarantined["reason"]), rules=dict(rules),
        nulls={name: clean[name].null_count for name in clean.column_names if not name.startswith("_")},
        files=files, kinds=count_values(clean["event"]) if "event" in clean.column_names else {},
        users=pc.count_distinct(clean["user_id"]).as_py() if "user_id" in clean.column_names else 0,
        first=times["min"], last=times["max"],
    )  # fmt: skip


@dataclass(frozen=True)
class ValidationReport:
    """The report of an ingestion: events, and the item and user tables where the source has them.

    ``items``: distinct items with clean events.
    """

    source: str
    events: TableReport
    items: int
    item_table: TableReport | None = None
    user_table: TableReport | None = None

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        tables = {"item_table": self.item_table, "user_table": self.user_table}
        return {
            "source": self.source, "items": self.items, "events": self.events.plain(),
            **{name: None if table is None else table.plain() for name, table in tables.items()},
        }  # fmt: skip

    @staticmethod
    def of(plain: Mapping[str, Any]) -> ValidationReport:
        """The report again, from ``plain``."""
        tables = [None if plain[name] is None else TableReport(**plain[name]) for name in ("item_table", "user_table")]
        return ValidationReport(plain["source"], TableReport(**plain["events"]), plain["items"], *tables)

    def lines(self) -> list[str]:
        """The report for a person, one fact a line."""
        events = self.events
        share = events.rows_quarantined / max(events.rows_in, 1)
        out = [
            f"{self.source}: {events.rows_in:,} rows in = {events.rows_clean:,} clean + {events.rows_quarantined:,} quarantined "
            f"({share:.1%})",
            f"{events.users:,} users, {self.items:,} items; " + ", ".join(f"{count:,} {kind}" for kind, count in events.kinds.items()),
        ]
        out += [
            f"  {name}: fired on {count:,} rows, set aside {events.reasons.get(name, 0):,}" for name, count in events.rules.items() if count
        ]
        return out


def gate(report: TableReport, max_quarantined_share: float, what: str) -> None:
    """``DataError`` where no clean event is left or too large a share was quarantined; the message names the main reasons."""
    top = sorted(report.reasons.items(), key=lambda pair: -pair[1])[:4]
    why = "; ".join(f"{name}: {count:,}" for name, count in top) or "the files hold no rows"
    if report.rows_clean == 0:
        raise DataError(
            f"{what}: no events are left after cleaning {report.rows_in:,} rows ({why}). Check `columns:` and `rules:` in the source YAML."
        )
    share = report.rows_quarantined / report.rows_in
    if share > max_quarantined_share:
        raise DataError(
            f"{what}: {share:.1%} of {report.rows_in:,} rows would be quarantined, more than "
            f"`max_quarantined_share: {max_quarantined_share}` "
            f"allows ({why}). Fix the mapping or the files, or raise the limit in the source YAML."
        )
