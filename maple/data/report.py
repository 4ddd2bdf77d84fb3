"""The report of an ingestion: what happened to every row, what the clean rows are like, and what the checks found.

Reports of parts merge into that of the whole; all of it is JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.profile import Profile
from maple.schema import EVENT_TYPES

#: Bookkeeping columns that travel with the rows of a source until a snapshot is written.
FILE, ROW, UNREADABLE = "_file", "_row", "_unreadable"

STRANGE, STRANGE_TEXT = 20, 60  # unknown event kinds of a part that are counted, and their characters

Severity: TypeAlias = Literal["error", "warn", "info"]


@dataclass(frozen=True)
class Finding:
    """What a check found: an ``error`` stops the ingestion, ``warn`` asks for a look, ``info`` is good to know.

    ``column`` is empty where it is about the whole. ``value`` is what was measured, ``limit`` what is allowed.
    """

    check: str
    severity: Severity
    column: str
    message: str
    value: float | None = None
    limit: float | None = None


def count_values(column: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """Counts of a string column's values, in the order of the values."""
    found = pc.value_counts(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    pairs = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
    return dict(sorted((str(value), int(count)) for value, count in pairs))


@dataclass(frozen=True)
class TableReport:
    """What happened to one table: ``reasons`` counts quarantined rows, ``rules`` every rule on every row, ``nulls`` clean rows.

    ``rows_known``: rows of an append that the snapshot has already; ``rows_deleted``: rows of deleted users, dropped.
    rows in = clean + quarantined + known + deleted.
    """

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
    profile: Profile | None = None  # of the clean rows
    rows_known: int = 0
    rows_deleted: int = 0
    valued: Mapping[str, int] = field(default_factory=dict)  # clean events with a value, by "kind:column"
    strange: Mapping[str, int] = field(default_factory=dict)  # event kinds of rows set aside that are none of Maple's, the most frequent

    @property
    def rows_judged(self) -> int:
        """Rows that are either clean or quarantined: what shares are of."""
        return self.rows_clean + self.rows_quarantined

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        return {**values, "profile": None if self.profile is None else self.profile.plain()}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> TableReport:
        """The inverse of ``plain``."""
        profile = plain.get("profile")
        return TableReport(**{**plain, "profile": None if profile is None else Profile.from_plain(profile)})

    @staticmethod
    def merge(parts: Iterable[TableReport]) -> TableReport:
        """The report of the union of disjoint rows whose users do not overlap either."""
        everything = list(parts)
        counts: dict[str, Any] = {}
        for name in ("rows_in", "rows_clean", "rows_quarantined", "users", "rows_known", "rows_deleted"):
            counts[name] = sum(getattr(part, name) for part in everything)
        for name in ("reasons", "rules", "nulls", "files", "kinds", "valued", "strange"):
            total: dict[str, int] = {}
            for part in everything:
                for key, count in getattr(part, name).items():
                    total[key] = total.get(key, 0) + count
            counts[name] = total if name == "rules" else dict(sorted(total.items()))
        firsts = [part.first for part in everything if part.first is not None]
        lasts = [part.last for part in everything if part.last is not None]
        profiles = [part.profile for part in everything if part.profile is not None]
        profile = Profile.merge(profiles) if profiles else None
        return TableReport(**counts, first=min(firsts, default=None), last=max(lasts, default=None), profile=profile)


def table_report(clean: pa.Table, quarantined: pa.Table, rules: Mapping[str, int]) -> TableReport:
    """The report of one judged part of a table; ``quarantined`` has a ``reason``, both may have a ``_file``."""
    files: dict[str, int] = {}
    for part in (clean, quarantined):
        for name, count in count_values(part[FILE]).items() if FILE in part.column_names else ():
            files[name] = files.get(name, 0) + count
    times = pc.min_max(clean["timestamp"].cast(pa.int64())).as_py() if "timestamp" in clean.column_names else {"min": None, "max": None}
    profile = Profile.of(clean)
    if "user_id" in clean.column_names and "event" not in clean.column_names:  # the user table
        profile = profile.discreet()
    return TableReport(
        rows_in=clean.num_rows + quarantined.num_rows, rows_clean=clean.num_rows, rows_quarantined=quarantined.num_rows,
        reasons=count_values(quarantined["reason"]), rules=dict(rules),
        nulls={name: clean[name].null_count for name in clean.column_names if not name.startswith("_")},
        files=files, kinds=count_values(clean["event"]) if "event" in clean.column_names else {},
        strange=_strange(quarantined),
        valued=_valued(clean) if "event" in clean.column_names else {},
        users=pc.count_distinct(clean["user_id"]).as_py() if "user_id" in clean.column_names else 0,
        first=times["min"], last=times["max"], profile=profile,
    )  # fmt: skip


def _strange(aside: pa.Table) -> dict[str, int]:
    if "event" not in aside.column_names:
        return {}
    kinds = aside["event"].filter(pc.invert(pc.is_in(aside["event"], value_set=pa.array(EVENT_TYPES)))).drop_null()
    counts = count_values(pc.utf8_slice_codeunits(kinds, 0, STRANGE_TEXT))
    return dict(sorted(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:STRANGE]))


def _valued(events: pa.Table) -> dict[str, int]:
    """How many events of each kind have a value in each column, by "kind:column"; NaN and infinite are none."""
    kinds = events["event"].combine_chunks().dictionary_encode()
    codes = np.asarray(kinds.indices.fill_null(len(kinds.dictionary)))
    names = kinds.dictionary.to_pylist()
    out: dict[str, int] = {}
    for name in events.column_names:
        if name.startswith("_"):
            continue
        column = events[name].cast(pa.float32()) if pa.types.is_float16(events[name].type) else events[name]
        there = pc.fill_null(pc.is_finite(column), False) if pa.types.is_floating(column.type) else pc.is_valid(column)
        counts = np.bincount(codes[np.asarray(there)], minlength=len(names))
        out |= {f"{kind}:{name}": int(count) for kind, count in zip(names, counts, strict=False) if count}
    return dict(sorted(out.items()))


@dataclass(frozen=True)
class ValidationReport:
    """The report of an ingestion: events, and the item and user tables where the source has them.

    ``items``: distinct items with clean events. ``parent``: the snapshot that the checks compared with, or empty.
    ``file_columns``: the columns of the event files and their types there.
    """

    source: str
    events: TableReport
    items: int
    item_table: TableReport | None = None
    user_table: TableReport | None = None
    parent: str = ""
    file_columns: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        tables = {"item_table": self.item_table, "user_table": self.user_table}
        return {
            "source": self.source, "items": self.items, "parent": self.parent, "file_columns": dict(self.file_columns),
            "findings": [vars(finding) for finding in self.findings], "events": self.events.plain(),
            **{name: None if table is None else table.plain() for name, table in tables.items()},
        }  # fmt: skip

    @staticmethod
    def of(plain: Mapping[str, Any]) -> ValidationReport:
        """The report again, from ``plain``."""
        tables = [None if plain[name] is None else TableReport.from_plain(plain[name]) for name in ("item_table", "user_table")]
        return ValidationReport(
            plain["source"], TableReport.from_plain(plain["events"]), plain["items"], tables[0], tables[1], parent=plain.get("parent", ""),
            file_columns=plain.get("file_columns", {}), findings=tuple(Finding(**found) for found in plain.get("findings", ())),
        )  # fmt: skip

    def lines(self) -> list[str]:
        """The report for a person, one fact a line."""
        events = self.events
        share = events.rows_quarantined / max(events.rows_judged, 1)
        more = (("known already", events.rows_known), ("of deleted users", events.rows_deleted))
        out = [
            f"{self.source}: {events.rows_in:,} rows in = {events.rows_clean:,} clean + {events.rows_quarantined:,} quarantined "
            f"({share:.1%})" + "".join(f" + {rows:,} {what}" for what, rows in more if rows),
            f"{events.users:,} users, {self.items:,} items; " + ", ".join(f"{count:,} {kind}" for kind, count in events.kinds.items()),
        ]
        out += [
            f"  {name}: fired on {count:,} rows, set aside {events.reasons.get(name, 0):,}" for name, count in events.rules.items() if count
        ]
        return out + [f"  {found.severity}: {found.message}" for found in self.findings]
