"""The page of an ingestion: what happened to the rows, what the checks found, what the columns are like beside the parent's.

One self-contained file beside ``report.json``. It shows no user id: examples of rows in quarantine name their file and row.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from maple.data.charts import bars, day_bars, number_bars, short
from maple.data.drift import psi
from maple.data.profile import ColumnProfile, Profile, bin_edges
from maple.data.report import TableReport, ValidationReport
from maple.page import Block, Cell, FactsBlock, FigureBlock, Section, TableBlock, TextBlock, render

HIDDEN = ("user_id", "source_user_id", "unreadable", "reason", "file", "row")
EXAMPLES = 3  # rows of a reason
PLOTTED = 8  # number columns


def page(report: ValidationReport, parent: ValidationReport | None, examples: pa.Table | None = None) -> bytes:
    """The whole page, UTF-8. ``parent``: the report compared with. ``examples``: rows in quarantine, as the snapshot stores them."""
    events = report.events
    errors, warnings = (sum(found.severity == severity for found in report.findings) for severity in ("error", "warn"))
    verdict = "The data failed its checks: nothing was published." if errors else "The data passed its checks."
    if warnings and not errors:
        verdict += f" {warnings} of them ask for a look."
    sections = [Section("Rows", tuple(_rows(events, report))), Section("Findings", tuple(_findings(report)))]
    sections.append(Section("Set aside", tuple(_aside(events, examples))))
    for name, table, before in (
        ("events", events, None if parent is None else parent.events),
        ("items", report.item_table, None if parent is None else parent.item_table),
        ("users", report.user_table, None if parent is None else parent.user_table),
    ):
        if table is not None and table.profile is not None:
            old = None if before is None else before.profile
            sections.append(Section(f"Columns of {name}", tuple(_columns(name, table.profile, old))))
    facts = [("source", report.source), ("compared with", report.parent or "nothing: no parent")]
    if events.first is not None and events.last is not None:
        facts.append(("period", f"{_day(events.first)} to {_day(events.last)}"))
    return render(f"Data report: {report.source}", sections, subtitle=verdict, facts=facts).encode()


def _rows(events: TableReport, report: ValidationReport) -> Iterator[Block]:
    share = f"{events.rows_quarantined / max(events.rows_judged, 1):.1%}"
    facts = [
        ("rows in", f"{events.rows_in:,}", ""),
        ("clean", f"{events.rows_clean:,}", ""),
        ("set aside", f"{events.rows_quarantined:,}", share),
    ]
    facts += [(what, f"{rows:,}", "") for what, rows in (("known already", events.rows_known), ("deleted", events.rows_deleted)) if rows]
    yield FactsBlock((*facts, ("users", f"{events.users:,}", ""), ("items", f"{report.items:,}", "")))
    kinds = tuple((kind, f"{count:,}", f"{count / max(events.rows_clean, 1):.1%}") for kind, count in events.kinds.items())
    yield TableBlock("Clean events by kind", ("kind", "events", "share"), kinds, (1, 2))
    files = tuple((name, f"{count:,}") for name, count in list(events.files.items())[:50])
    yield TableBlock(f"Rows by file ({len(events.files):,} files)", ("file", "rows"), files, (1,))


def _findings(report: ValidationReport) -> Iterator[Block]:
    if not report.findings:
        yield TextBlock("No check found anything.", "lead")
        return
    tones = {"error": "bad", "warn": "", "info": ""}
    rows = tuple(
        (
            Cell(found.severity, tone=tones[found.severity]),
            found.check,
            found.column or "-",
            found.message,
            _number(found.value),
            _number(found.limit),
        )
        for found in report.findings
    )
    yield TableBlock("What the checks found, errors first", ("severity", "check", "column", "what", "measured", "limit"), rows, (4, 5))


def _aside(events: TableReport, examples: pa.Table | None) -> Iterator[Block]:
    if not events.rules and not events.reasons:
        yield TextBlock("No rule fired.", "lead")
        return
    names = [name for name, count in events.rules.items() if count or events.reasons.get(name)]
    rows = tuple((name, f"{events.rules.get(name, 0):,}", f"{events.reasons.get(name, 0):,}") for name in names)
    yield TableBlock(
        "Rules: every rule is counted on every row; the first one names the reason", ("rule", "fired", "set aside"), rows, (1, 2)
    )
    shown = tuple(_examples(examples)) if examples is not None and examples.num_rows else ()
    if shown:
        yield TableBlock("Examples; user ids are left out", ("reason", "file", "row", "cells"), shown, (2,))


def _examples(table: pa.Table) -> Iterator[tuple[str, ...]]:
    seen: dict[str, int] = {}
    for row in table.to_pylist():
        reason = str(row["reason"])
        seen[reason] = seen.get(reason, 0) + 1
        if seen[reason] > EXAMPLES:
            continue
        cells = [
            f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in row.items()
            if value is not None and name not in HIDDEN
        ]
        unreadable = str(row["unreadable"] or "")
        if unreadable.startswith(("line: ", "lines: ")):  # a raw line may hold anything
            cells = [f"a line that is no row, {len(unreadable.partition(': ')[2])} characters"]
        elif unreadable:
            cells.append(f"unreadable {unreadable[:80]}")
        yield reason, str(row["file"]), f"{int(row['row']) + 1:,}", ", ".join(cells)[:240]


def _columns(table: str, now: Profile, before: Profile | None) -> Iterator[Block]:
    old = {} if before is None else before.columns
    header = ("column", "type", "missing", "distinct", "from", "to", "most frequent", "drift (PSI)")
    rows = tuple(_column_row(name, column, old.get(name)) for name, column in now.columns.items())
    note = "Distinct counts above 200 are estimates. PSI below 0.1: stable; above 0.25: another distribution."
    yield TableBlock(note, header, rows, (2, 3, 4, 5, 7))
    legend = " Line: the parent." if before is not None else ""
    time = now.columns.get("timestamp")
    if time is not None and time.bins:
        yield FigureBlock(f"Rows of {table} over time.{legend}", day_bars("rows by first day", time, old.get("timestamp")))
    if now.per_user:
        codes = sorted(now.per_user)
        labels = [short(bin_edges(code)[0]) for code in codes]
        values = [float(now.per_user[code]) for code in codes]
        yield FigureBlock(
            "Users by number of events.", bars("users by number of events", labels, values, None, "{:,.0f}".format), half=True
        )
    numbers = [(name, column) for name, column in now.columns.items() if column.kind == "number" and column.bins]
    for name, column in numbers[:PLOTTED]:
        drawn = number_bars(name, column, old.get(name))
        yield FigureBlock(f"{name}: share of rows, on a logarithmic scale.{legend}", drawn, half=True)


def _column_row(name: str, now: ColumnProfile, before: ColumnProfile | None) -> tuple[Cell | str, ...]:
    index = None if before is None else psi(before, now)
    missing = Cell(f"{now.null_share:.1%}", change="" if before is None else f"was {before.null_share:.1%}")
    distinct = f"{now.distinct:,}" if now.kind != "other" and now.kind != "time" else "-"
    top = ", ".join(f"{text} ({count:,})" for text, count in now.top(4)) if now.complete and now.values else "-"
    drift = "-" if index is None else Cell(f"{index.value:.3f}", tone="bad" if index.value - index.noise > 0.25 else "")
    return (name, now.type, missing, distinct, _end(now, now.low), _end(now, now.high), top, drift)


def _end(column: ColumnProfile, value: float | None) -> str:
    if value is None:
        return "-"
    return _day(int(value)) if column.kind == "time" else f"{value:.6g}"


def _day(microseconds: int) -> str:
    return f"{datetime.fromtimestamp(microseconds / 1e6, UTC):%Y-%m-%d}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
