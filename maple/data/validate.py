"""Cleaning as declared rules: which rows are set aside, which are re-labelled, and a report that counts every rule.

A rule is a typed setting, never code. Rules are judged in order; the first quarantining rule that fires names a row's
reason, yet the report counts every rule on every row. Nothing is dropped silently: rows in = clean + quarantined.

``action`` says what becomes of a row, ``severity`` what becomes of the ingestion: see ``RuleBase``. A general validation library
(pandera, Great Expectations) would serve the item and user tables, which fit in memory, but it judges a whole frame and answers with
failure cases, not with a verdict per row of a stream that also re-labels rows and counts every rule; it would stand beside these
vectorised lines without replacing any, so there is one engine for all tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from maple.config import Section
from maple.data.profile import Profile
from maple.data.report import UNREADABLE, Severity, count_values
from maple.errors import ConfigError, unknown_name
from maple.schema import EVENT_CODES, EVENT_TYPES, legal_ids

DUPLICATE = "duplicate"
MAX_RULES = 60  # fired rules travel as one bit each

Bool: TypeAlias = npt.NDArray[np.bool_]


class RuleBase(Section):
    """What every rule has. ``convert`` re-labels the event as ``to`` and makes its value positive; ``note`` only counts.

    With a ``severity`` a rule is also a check of the whole: a finding where it fires on more than ``max_share`` of the rows. An ``error``
    stops the ingestion. Without one, a rule only counts: a bad row is set aside and the rest goes on.
    """

    name: str = ""
    events: tuple[str, ...] = ()  # judge only events of these kinds; empty = all
    action: Literal["quarantine", "convert", "note"] = "quarantine"
    to: str = ""  # the event kind that ``convert`` gives
    severity: Severity | None = None
    max_share: float = Field(default=0.0, ge=0, le=1)

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


class Outlier(RuleBase):
    """Fires where a number is ``times`` too large for a reference that no single bad file can move. Null never fires.

    ``catalogue``: the price of the item table; a price ``times`` too small fires as well, an item without a price never.
    ``parent``: the 99.9 % quantile of the magnitudes in the snapshot that is appended to. Ingesting everything anew has no parent, and
    what it gives must not depend on what was there before: nothing fires then.
    """

    kind: Literal["outlier"]
    column: str = "price"
    against: Literal["catalogue", "parent"] = "catalogue"
    times: float = Field(default=10.0, gt=1)
    limit: float | None = None  # the greatest magnitude allowed; Maple sets it from the parent

    @model_validator(mode="after")
    def _price(self) -> Self:
        if self.against == "catalogue" and self.column != "price":
            raise ValueError("the catalogue only knows prices; write `column: price` or `against: parent`")
        return self


AnyRule: TypeAlias = Pattern | Range | Required | LegalId | InCatalogue | Future | KnownEvent | Unreadable | Repeated | Outlier
Rule: TypeAlias = Annotated[AnyRule, Field(discriminator="kind")]
Rules: TypeAlias = Sequence[AnyRule]


def rule_name(rule: AnyRule) -> str:
    """The name a rule has in reports: its own, or made of kind and column."""
    return str(rule.name or (rule.kind if rule.column.startswith("_") else f"{rule.kind}:{rule.column}"))


def complete(rules: Rules, ids: Sequence[str], *, events: bool, parent: Profile | None = None) -> tuple[AnyRule, ...]:
    """Declared rules framed by the ones Maple always needs: unreadable first; then declared; then ids, time, known kinds, future.

    A built-in rule is left out where a declared quarantining rule of the same kind judges the same column for all events. Limits that
    a rule takes from the parent's profile are fixed here, once for all tasks.
    """
    rules = [_with_limit(rule, parent) if isinstance(rule, Outlier) else rule for rule in rules]
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


def _with_limit(rule: Outlier, parent: Profile | None) -> Outlier:
    known = None if parent is None else parent.columns.get(rule.column)
    if rule.against != "parent" or rule.limit is not None or known is None or not known.bins:
        return rule
    return rule.model_copy(update={"limit": rule.times * known.magnitude(0.999)})


@dataclass(frozen=True, eq=False)
class Judged:
    """A table after its rules: ``reason`` int16[N], the place of the rule that set a row aside or -1; ``fired`` int64[N], a bit a rule."""

    table: pa.Table
    reason: npt.NDArray[np.int16]
    fired: npt.NDArray[np.int64]


def judge(table: pa.Table, rules: Rules, *, catalogue: pa.Table | None = None, now: int | None = None) -> Judged:
    """Judge every row by every rule, in order. ``catalogue``: columns item_id and price. ``now`` in microseconds.

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


def validate_events(table: pa.Table, rules: Rules, *, catalogue: pa.Table | None = None, now: int | None = None) -> Validated:
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


def _fires(table: pa.Table, rule: AnyRule, catalogue: pa.Table | None, now: int | None) -> Bool:
    if rule.column not in table.column_names:
        if rule.kind == "unreadable":
            return np.zeros(table.num_rows, np.bool_)
        raise ConfigError(
            f"rule {rule_name(rule)!r} judges the column {rule.column!r}: {unknown_name('column', rule.column, table.column_names)}"
        )
    column = table[rule.column]
    try:
        if isinstance(rule, Outlier):
            return _numpy_bool(_too_large(table, rule, catalogue))
        return _numpy_bool(_verdict(column, rule, catalogue, now))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ConfigError(f"rule {rule_name(rule)!r} cannot judge column {rule.column!r} of type {column.type}: {error}") from None


def _too_large(table: pa.Table, rule: Outlier, catalogue: pa.Table | None) -> Any:
    size = pc.abs(table[rule.column])
    if rule.against == "parent":
        return pa.nulls(len(size), pa.bool_()) if rule.limit is None else pc.greater(size, rule.limit)
    if catalogue is None:
        raise ConfigError(f"rule {rule_name(rule)!r} needs an item table; declare `items:` in the source or remove the rule")
    known = catalogue["price"].take(pc.index_in(table["item_id"], value_set=catalogue["item_id"].combine_chunks()))
    ratio = pc.divide(size.cast(pa.float64()), pc.if_else(pc.greater(known, 0), known, None).cast(pa.float64()))
    return pc.or_(pc.greater(ratio, rule.times), pc.less(ratio, 1 / rule.times))


def _verdict(column: pa.ChunkedArray, rule: AnyRule, catalogue: pa.Table | None, now: int | None) -> Any:
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
            return pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, value_set=catalogue["item_id"].combine_chunks())))
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
