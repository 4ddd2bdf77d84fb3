"""Checks of a whole ingestion, after every row was judged: enough data, no drift of schema or distribution against the parent snapshot.

Settings stand under ``checks:`` of a source; each check has a level: ``error`` stops the ingestion before anything is published,
``warn`` and ``info`` are written into the report, ``off`` leaves the check out. Rules with a ``severity`` are checks as well.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from pydantic import Field

from maple.config import Section
from maple.data.drift import Psi, psi
from maple.data.profile import DAY_US, ColumnProfile, Profile
from maple.data.report import Finding, Severity, TableReport, ValidationReport
from maple.errors import DataError
from maple.schema import EVENT_TYPES

Level: TypeAlias = Literal["error", "warn", "info", "off"]
DUPLICATE = "duplicate"
NETTED = "netted"  # the reason of rows that a return takes away
CHANCE = 0.01  # that a column with a few values shows none in a batch: more likely than this is no finding


class Checks(Section):
    """Levels and limits. The defaults stop what would break training, and only tell of what may be a new season."""

    # Columns of the clean tables, against the parent's.
    missing_column: Level = "error"
    type_change: Level = "error"
    all_null: Level = "error"  # a column that had values has none any more
    new_column: Level = "info"
    new_values: Level = "warn"  # an enumeration (few distinct texts) has more than `new_values_factor` times as many, and 10 more
    new_values_factor: float = Field(default=3.0, gt=1)
    # Columns of the event files as they came, mapped or not.
    file_columns: Level = "warn"
    # Distributions, against the parent's.
    drift: Level = "warn"  # population stability index above `psi`; from `psi_info` it is an info
    psi: float = Field(default=0.25, gt=0)
    psi_info: float = Field(default=0.1, gt=0)
    nulls: Level = "warn"  # the share of nulls moved by more than `null_change`
    null_change: float = Field(default=0.1, gt=0, le=1)
    volume: Level = "warn"  # rows per active day changed by more than `volume_factor`
    volume_factor: float = Field(default=4.0, gt=1)
    ignore: tuple[str, ...] = ()  # columns (patterns such as `meta_*`) that may change as they like
    # The data alone.
    quarantined: Level = "error"  # the limit is the source's `max_quarantined_share`
    duplicates: Level = "warn"
    max_duplicate_share: float = Field(default=0.2, ge=0, le=1)
    time_gap: Level = "warn"  # days without any event, inside or since the parent's last
    max_gap_days: float = Field(default=45.0, gt=0)
    freshness: Level = "warn"  # only where `max_age_days` is given
    max_age_days: float | None = Field(default=None, gt=0)
    too_few: Level = "warn"
    min_users: int = Field(default=10, ge=1)
    min_items: int = Field(default=10, ge=1)
    min_events: int = Field(default=100, ge=1)
    # A share, a drift or missing values of fewer rows than these stop no append: they are a ``warn`` at most.
    min_rows: int = Field(default=100, ge=1)


class Tolerant(Protocol):
    """A rule that may be a check: its severity and the share of rows it may fire on."""

    @property
    def severity(self) -> Severity | None: ...
    @property
    def max_share(self) -> float: ...


@dataclass(frozen=True)
class Question:
    """What the checks are asked about: the new report, the parent's or None, the rules by name, the moment of ingestion (microseconds).

    ``append``: the new rows are a batch over the parent, and not everything anew. ``examples``: a row that was set aside, by reason.
    """

    checks: Checks
    report: ValidationReport
    parent: ValidationReport | None
    rules: Mapping[str, Tolerant]
    max_quarantined_share: float
    now: int
    append: bool = False
    examples: Mapping[str, str] = field(default_factory=dict)

    def level(self, level: Level, rows: int) -> Level:
        """The level of a finding that so many rows stand for: a small batch is not stopped by chance."""
        return "warn" if level == "error" and self.append and rows < self.checks.min_rows else level

    @property
    def partial(self) -> bool:
        """Whether this is a batch that lacks kinds of events which the parent has: distributions of all kinds then say nothing."""
        return self.append and self.parent is not None and not {*self.parent.events.kinds} <= {*self.report.events.kinds}


def run_checks(
    checks: Checks, report: ValidationReport, parent: ValidationReport | None = None, *, rules: Mapping[str, Tolerant] | None = None,
    max_quarantined_share: float = 1.0, now: int = 0, append: bool = False,
    examples: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:  # fmt: skip
    """Every finding, errors first. ``parent`` is the report of the snapshot before; without one nothing can have drifted.

    ``append``: the report is that of a batch over the parent. A batch may be small, and hold some kinds of events only.
    ``examples``: where a row of a reason is ("row 3 of a.csv"), to be told with what a rule found.
    """
    asked = Question(checks, report, parent, rules or {}, max_quarantined_share, now, append, examples or {})
    found = [finding for check in _CHECKS for finding in check(asked)]
    order: list[Severity] = ["error", "warn", "info"]
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def stop_on_errors(findings: Iterable[Finding], what: str, examples: str = "") -> None:
    """``DataError`` with every finding that is an error; ``examples`` (sentences) says which rows."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        told = " ".join(f"[{finding.check}] {finding.message}" for finding in errors)
        raise DataError(f"{what}: nothing was published, the data failed {len(errors)} check(s). {told}{examples}")


# -- the data alone ----------------------------------------------------------------------------------------------------


def _quarantined(asked: Question) -> Iterator[Finding]:
    events = asked.report.events
    bad = events.rows_quarantined - events.reasons.get(NETTED, 0)  # what was bought and returned is no bad row
    top = sorted(events.reasons.items(), key=lambda pair: -pair[1])[:4]
    why = "; ".join(f"{name}: {count:,}" for name, count in top) or "the files hold no rows"
    if events.rows_clean == 0:
        if events.rows_known + events.rows_deleted or (asked.append and bad == 0):
            return  # a batch without news, or of returns that took back what was bought
        text = f"no events are left after cleaning {events.rows_judged:,} rows ({why}). Check `columns:` and `rules:` in the source YAML."
        text += _strange(events)
        yield Finding("quarantined", "error", "", text, 1.0, asked.max_quarantined_share)
        return
    share, limit = bad / events.rows_judged, asked.max_quarantined_share
    if share > limit:
        text = (
            f"{share:.1%} of {events.rows_judged:,} rows would be quarantined, more than `max_quarantined_share: {limit}` allows ({why}). "
            "Fix the mapping or the files, or raise the limit in the source YAML."
        ) + _strange(events)
        yield from _found(asked.level(asked.checks.quarantined, events.rows_judged), "quarantined", "", text, share, limit)


def _strange(events: TableReport) -> str:
    """What to do about event kinds that Maple does not know; empty where there are none."""
    if not events.strange:
        return ""
    most = sorted(events.strange.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    told = ", ".join(f"{kind!r} ({count:,} rows)" for kind, count in most)
    return (
        f" Unknown event kinds: {told}; say what they are, for example `values: {{event: {{{json.dumps(most[0][0])}: purchase}}}}`. "
        f"Maple knows {', '.join(EVENT_TYPES)}."
    )


def _event_kinds(asked: Question) -> Iterator[Finding]:
    if text := _strange(asked.report.events):
        count = sum(asked.report.events.strange.values())
        yield Finding("known_event", "warn", "event", text.strip(), count / max(asked.report.events.rows_judged, 1))


def _rules(asked: Question) -> Iterator[Finding]:
    events = asked.report.events
    for name, rule in asked.rules.items():
        count = events.rules.get(name, 0)
        share = count / max(events.rows_judged, 1)
        if rule.severity is not None and count and share > rule.max_share:
            text = f"the rule {name!r} fired on {count:,} of {events.rows_judged:,} rows ({share:.2%}, allowed {rule.max_share:.2%})."
            text += f" See {asked.examples[name]}." if name in asked.examples else ""
            level = asked.level(rule.severity, events.rows_judged) if rule.max_share else rule.severity
            yield from _found(level, name, getattr(rule, "column", ""), text, share, rule.max_share)


def _duplicates(asked: Question) -> Iterator[Finding]:
    events, limit = asked.report.events, asked.checks.max_duplicate_share
    share = events.reasons.get(DUPLICATE, 0) / max(events.rows_judged, 1)
    if share > limit:
        text = f"{share:.1%} of the rows are duplicates (allowed {limit:.1%}); was a file exported or listed twice?"
        yield from _found(asked.level(asked.checks.duplicates, events.rows_judged), "duplicates", "", text, share, limit)


def _too_few(asked: Question) -> Iterator[Finding]:
    checks, report = asked.checks, asked.report
    if asked.parent is not None and report.events.rows_clean:
        return  # a batch may be small
    for what, count, least in (
        ("users", report.events.users, checks.min_users), ("items", report.items, checks.min_items),
        ("events", report.events.rows_clean, checks.min_events),
    ):  # fmt: skip
        if 0 < count < least:
            text = f"only {count:,} {what} after cleaning, fewer than `min_{what}: {least}`; models learn little from so few."
            yield from _found(checks.too_few, "too_few", "", text, count, least)


def _time(asked: Question) -> Iterator[Finding]:
    checks, events = asked.checks, asked.report.events
    if events.last is None or events.first is None:
        return
    age = (asked.now - events.last) / DAY_US
    if checks.max_age_days is not None and asked.now and age > checks.max_age_days:
        text = f"the last event is {age:.1f} days old, older than `max_age_days: {checks.max_age_days}`; did the export stop?"
        yield from _found(checks.freshness, "freshness", "timestamp", text, age, checks.max_age_days)
    now, before = _days(events), None if asked.parent is None else _days(asked.parent.events)
    where, since = "within the data", 0.0
    if asked.append and now is not None and before is not None:
        width = max(now.width, before.width)
        old = {day * before.width // width for day in before.bins}
        new = {day * now.width // width for day in now.bins} - old
        days, where = sorted(old | new), "around the new rows"
        gaps = [after - day for day, after in itertools.pairwise(days) if day in new or after in new]  # the others were there before
    else:
        width, days = (1, []) if now is None else (now.width, sorted(now.bins))
        gaps = [after - day for day, after in itertools.pairwise(days)]
        if asked.parent is not None and asked.parent.events.last is not None:
            since = (events.first - asked.parent.events.last) / DAY_US
    for length, place in ((float(max(gaps, default=1) - 1) * width, where), (since, "since the last event of the parent")):
        if length > checks.max_gap_days:
            text = f"{length:.0f} days without any event {place}, more than `max_gap_days: {checks.max_gap_days:g}`; is a file missing?"
            yield from _found(checks.time_gap, "time_gap", "timestamp", text, length, checks.max_gap_days)


def _days(report: TableReport) -> ColumnProfile | None:
    """The times of events, counted by days."""
    return None if report.profile is None else report.profile.columns.get("timestamp")


# -- against the parent ------------------------------------------------------------------------------------------------


def _file_columns(asked: Question) -> Iterator[Finding]:
    before = {} if asked.parent is None else asked.parent.file_columns
    now = asked.report.file_columns
    if not before or not now:
        return
    for name in sorted({*before, *now}):
        if _ignored(name, asked.checks) or before.get(name) == now.get(name):
            continue
        if name not in now:
            if asked.partial:
                continue  # a column of files that no new one is like
            text = f"the event files have no column {name!r} any more (the parent's had it as {before[name]})."
        elif name not in before:
            text = f"the event files have a new column {name!r} ({now[name]}); name it under `keep:` to use it."
        else:
            text = f"the column {name!r} of the event files is {now[name]} and was {before[name]}."
        yield from _found(asked.checks.file_columns, "file_columns", name, text)


def _columns(asked: Question) -> Iterator[Finding]:
    if asked.parent is None:
        yield Finding("parent", "info", "", "no parent snapshot: nothing to compare with, drift is checked from the next one on.")
        return
    for table, now, before in _tables(asked.report, asked.parent):
        for name in sorted({*before.columns, *now.columns}):
            if _ignored(name, asked.checks):
                continue
            if name not in now.columns:
                if table == "events" and (usual := _usual(asked, name)) is not None and usual.misses == 1:
                    continue  # the kinds of events in this batch never had it
                text = (
                    f"{table} have no column {name!r} any more; map it again in the source YAML, or set `checks: {{missing_column: warn}}`."
                )
                yield from _found(asked.checks.missing_column, "missing_column", name, text)
            elif name not in before.columns:
                yield from _found(asked.checks.new_column, "new_column", name, f"{table} have a new column {name!r}.")
            else:
                yield from _one_column(asked, table, name, now.columns[name], before.columns[name])


@dataclass(frozen=True)
class _Usual:
    """Missing values of a column in some rows, and the share that was to be expected by the parent."""

    rows: int
    nulls: int
    misses: float


def _usual(asked: Question, name: str) -> _Usual | None:
    """A column of a batch against the parent's events of the same kinds, as many of each; None where the parent did not count by kinds."""
    before = None if asked.parent is None else asked.parent.events
    now = asked.report.events
    if not asked.append or before is None or before.profile is None or name not in before.profile.columns:
        return None
    column = before.profile.columns[name]
    if sum(before.valued.get(f"{kind}:{name}", 0) for kind in before.kinds) != column.rows - column.nulls:
        return None
    kinds = {kind: count for kind, count in now.kinds.items() if before.kinds.get(kind)}
    rows = sum(kinds.values())
    there = sum(now.valued.get(f"{kind}:{name}", 0) for kind in kinds)
    expected = sum(count * before.valued.get(f"{kind}:{name}", 0) / before.kinds[kind] for kind, count in kinds.items())
    return _Usual(rows, rows - there, 1 - expected / rows if expected else 1.0)


def _one_column(asked: Question, table: str, name: str, now: ColumnProfile, before: ColumnProfile) -> Iterator[Finding]:
    if not now.rows or not before.rows:
        return
    checks = asked.checks
    usual = (_usual(asked, name) if table == "events" else None) or _Usual(now.rows, now.nulls, before.null_share)
    if not usual.rows:
        return  # no kind of events in common
    if usual.nulls == usual.rows:
        if usual.misses < 1 and not (asked.append and usual.misses**usual.rows > CHANCE):
            text = f"column {name!r} of {table} has no value in any of {usual.rows:,} rows (the parent: {1 - usual.misses:.1%} have one)."
            level = asked.level(checks.all_null, usual.rows)
            yield from _found(
                level, "all_null", name, text + f" Was it renamed or left out of the export?{_origin(asked, table)}", 1.0, usual.misses
            )
        return
    if before.nulls == before.rows:
        yield from _found(checks.new_column, "new_column", name, f"column {name!r} of {table} has values now; it had none.")
        return
    if now.type != before.type:
        text = f"column {name!r} of {table} is {now.type} and was {before.type}; convert it in the export or map it by `types:`."
        yield from _found(checks.type_change, "type_change", name, text)
        return
    share = usual.nulls / usual.rows
    change = share - usual.misses
    if abs(change) > checks.null_change:
        text = f"{share:.1%} of column {name!r} of {table} are missing, {usual.misses:.1%} in the parent."
        yield from _found(asked.level(checks.nulls, usual.rows), "nulls", name, text, change, checks.null_change)
    if now.kind == "text" and before.complete and now.distinct > max(checks.new_values_factor * before.distinct, before.distinct + 10):
        text = f"column {name!r} of {table} has {now.distinct:,} distinct values, the parent {before.distinct:,}"
        limit = checks.new_values_factor * before.distinct
        yield from _found(
            asked.level(checks.new_values, now.rows), "new_values", name, text + "; is it still the same column?", now.distinct, limit
        )
        return
    index = psi(before, now)
    if index is not None:
        yield from _drift(asked, table, name, index, now.rows)


def _origin(asked: Question, table: str) -> str:
    """Which files and days the rows are from, where no row of them is to blame."""
    report = {"items": asked.report.item_table, "users": asked.report.user_table}.get(table, asked.report.events)
    if report is None or not report.files:
        return ""
    most = sorted(report.files.items(), key=lambda pair: (-pair[1], pair[0]))
    told = ", ".join(f"{name} ({count:,})" for name, count in most[:3]) + (f" and {len(most) - 3} more" if len(most) > 3 else "")
    if report.first is not None and report.last is not None:
        days = [str(np.datetime64(time // DAY_US, "D")) for time in (report.first, report.last)]
        told += f", {days[0]}" + (f" to {days[1]}" if days[1] != days[0] else "")
    return f" The rows are from {told}."


def _drift(asked: Question, table: str, name: str, index: Psi, rows: int) -> Iterator[Finding]:
    checks = asked.checks
    sure = index.value - index.noise
    if sure > checks.psi_info:
        text = (
            f"column {name!r} of {table} is distributed differently: PSI {index.value:.2f} (chance alone {index.noise:.3f}); {index.told}."
            f"{_origin(asked, table)}"
        )
        level: Level = checks.drift if sure > checks.psi or checks.drift == "off" else "info"
        limit = checks.psi if level != "info" else checks.psi_info
        if level in ("error", "warn"):
            level = "info" if asked.partial and table == "events" else asked.level(level, rows)
        yield from _found(level, "drift", name, text, index.value, limit)


def _volume(asked: Question) -> Iterator[Finding]:
    if asked.parent is None:
        return
    now, before = (_daily(report.events) for report in (asked.report, asked.parent))
    factor = asked.checks.volume_factor
    if now and before and not 1 / factor <= now / before <= factor:
        text = (
            f"{now:,.0f} events per active day, {before:,.0f} in the parent: a change by more than {factor:g} times; is the export whole?"
        )
        level = asked.level(asked.checks.volume, asked.report.events.rows_judged)
        yield from _found(level, "volume", "", text, now / before, factor)


def _daily(report: TableReport) -> float:
    column = _days(report)
    return report.rows_clean / (len(column.bins) * column.width) if column is not None and column.bins else 0.0


def _tables(report: ValidationReport, parent: ValidationReport) -> Iterator[tuple[str, Profile, Profile]]:
    for what, now, before in (
        ("events", report.events, parent.events), ("items", report.item_table, parent.item_table),
        ("users", report.user_table, parent.user_table),
    ):  # fmt: skip
        if now is not None and before is not None and now.profile is not None and before.profile is not None:
            yield what, now.profile, before.profile


def _ignored(name: str, checks: Checks) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in checks.ignore)


def _found(
    level: Level, check: str, column: str, message: str, value: float | None = None, limit: float | None = None
) -> Iterator[Finding]:  # fmt: skip
    if level != "off":
        yield Finding(check, level, column, message, value, limit)


_CHECKS: Sequence[Callable[[Question], Iterator[Finding]]] = (
    _quarantined, _event_kinds, _rules, _duplicates, _too_few, _time, _file_columns, _columns, _volume,
)  # fmt: skip
