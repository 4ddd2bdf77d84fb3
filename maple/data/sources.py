"""What a source is: a declarative mapping from any shop's files to Maple's events, items and users.

The YAML names files, formats and columns and declares the cleaning rules; nothing in it is code. ``presets.load_source`` finds it.
"""

from __future__ import annotations

from typing import Any, Literal, Self
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from maple.config import Section
from maple.data.behaviour import UserRule
from maple.data.checks import Checks
from maple.data.dataset import DEFAULT_SIGNALS
from maple.data.validate import Rule
from maple.errors import ConfigError, unknown_name
from maple.schema import EVENT_CODES, EVENT_TYPES, EVENTS, ITEMS, USERS

Format = Literal["csv", "tsv", "jsonl", "parquet", "dat", "atomic"]
SUFFIXES: dict[str, Format] = {
    "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet", "dat": "dat",
    "inter": "atomic", "item": "atomic", "user": "atomic",
}  # fmt: skip
COMPRESSED = ("gz", "bz2", "zst", "lz4")


class Clock(Section):
    """How a table's ``timestamp`` (or ``created_at``) is read. A column that already is a timestamp or a date needs none of it.

    ``s``, ``ms`` and ``us`` count from 1970. ``timezone`` is that of texts and timestamps without one. ``order`` is for data without a
    clock: the column is a place in the user's own sequence, and each user's sequence is spread evenly over ``days`` from ``start``.
    """

    unit: Literal["iso", "s", "ms", "us", "strptime", "order"] = "iso"
    format: str = ""
    timezone: str = "UTC"
    start: str = "2000-01-01"
    days: float = Field(default=365.0, gt=0, le=36500)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.unit == "strptime") != bool(self.format):
            raise ValueError("`format:` belongs to `unit: strptime`, and strptime needs it")
        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"unknown timezone {self.timezone!r}; write an IANA name such as Europe/London") from None
        try:
            pa.scalar(self.start).cast(pa.timestamp("us"))
        except pa.ArrowInvalid:
            raise ValueError(f"start {self.start!r} is not an ISO date") from None
        return self

    @property
    def start_us(self) -> int:
        """``start`` in microseconds since 1970."""
        return int(pa.scalar(self.start).cast(pa.timestamp("us")).cast(pa.int64()).as_py())


class Extract(Section):
    """A part of a text column: the group named ``value`` in a regular expression (RE2); null where it does not match."""

    column: str
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _usable(cls, pattern: str) -> str:
        if "(?P<value>" not in pattern:
            raise ValueError("the pattern needs a group (?P<value>...)")
        try:
            pc.extract_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise ValueError(f"not a regular expression with one named group: {error}") from None
        return pattern


class TableSource(Section):
    """One table of a source. Names on the left are Maple's (see ``maple.schema``), names on the right are the files'."""

    path: str | tuple[str, ...]  # relative to the data folder, globs allowed; or a URI
    format: Format | None = None  # by the file's ending where not given
    header: tuple[str, ...] = ()  # names of the columns where the files have no header line
    encoding: str = "utf-8"
    delimiter: str | None = None
    nulls: tuple[str, ...] = ("",)  # texts that mean "missing"
    columns: dict[str, str] = Field(default_factory=dict)
    constants: dict[str, str | float | bool] = Field(default_factory=dict)
    values: dict[str, dict[str, str]] = Field(default_factory=dict)  # {event: {transaction: purchase}}: re-label texts of a column
    ratios: dict[str, tuple[str, str]] = Field(default_factory=dict)  # {price: [sales_value, quantity]}; null where the divisor is 0
    extract: dict[str, Extract] = Field(default_factory=dict)
    keep: dict[str, str] = Field(default_factory=dict)  # further columns; a list keeps their names
    types: dict[str, Literal["string", "int", "float", "bool"]] = Field(default_factory=dict)  # of kept columns in text files (else string)
    clock: Clock = Clock()
    rules: tuple[Rule, ...] = ()

    @field_validator("keep", mode="before")
    @classmethod
    def _names(cls, keep: Any) -> Any:
        return {name: name for name in keep} if isinstance(keep, list | tuple) else keep

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except LookupError:
            raise ValueError(f"unknown text encoding {encoding!r}; common ones are utf-8, latin-1, cp1252") from None
        return encoding

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        seen: set[str] = set()
        for part in (self.columns, self.constants, self.ratios, self.extract, self.keep):
            for name in part:
                if name in seen:
                    raise ValueError(f"the column {name!r} is declared twice")
                if name.startswith("_") or name == "reason":
                    raise ValueError(f"the column name {name!r} is reserved; rename it under `keep:`")
                seen.add(name)
        unknown = sorted(set(self.types) - seen)
        if unknown:
            raise ValueError(f"`types` names {unknown[0]!r}: " + unknown_name("column", unknown[0], seen))
        for path in self.paths:
            if "://" not in path and (path.startswith("/") or ".." in path.split("/")):
                raise ValueError(f"path {path!r} must lie inside the data folder, or be a URI")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def names(self) -> list[str]:
        """Maple's names of everything this table gives, in declared order."""
        return [*self.columns, *self.constants, *self.ratios, *self.extract, *self.keep]

    @property
    def needed(self) -> list[str]:
        """The files' columns that must be read, distinct, in declared order."""
        wanted = [*self.columns.values(), *(name for pair in self.ratios.values() for name in pair)]
        return list(dict.fromkeys([*wanted, *(part.column for part in self.extract.values()), *self.keep.values()]))

    def format_of(self, path: str) -> Format:
        """The format of one file."""
        if self.format is not None:
            return self.format
        parts = path.lower().rsplit("/", 1)[-1].split(".")
        while len(parts) > 1 and parts[-1] in COMPRESSED:
            parts.pop()
        if parts[-1] not in SUFFIXES:
            raise ConfigError(
                f"{path}: the format cannot be told from the name; write `format:` ({', '.join(sorted(set(SUFFIXES.values())))})"
            )
        return SUFFIXES[parts[-1]]


class LastWord(Section):
    """A category made of a text: its last word of letters, singular, upper case; ``OTHER`` where fewer than ``min_items`` share it."""

    last_word_of: str = "title"
    min_items: int = Field(default=5, ge=1)


class ItemsFromEvents(Section):
    """What clean events say of items: it fills what the item table leaves empty, and makes the table where there is none.

    ``texts``: {item column: event column}, the most frequent non-blank text (the first in byte order of equals).
    ``price``: lower median unit price of target events. ``created_at``: time of the first event.
    """

    texts: dict[str, str] = Field(default_factory=dict)
    price: bool = True
    created_at: bool = True
    category: LastWord | None = None


class SourceConfig(Section):
    """A shop's data: where its tables lie, how their columns map, how they are cleaned, and which events count."""

    name: str = "custom"
    about: str = ""
    events: TableSource
    items: TableSource | None = None
    users: TableSource | None = None
    items_from_events: ItemsFromEvents = ItemsFromEvents()
    duplicates: Literal["quarantine", "keep"] = "quarantine"  # of events that are equal in every column, or share an event_id
    session_gap_minutes: float | None = Field(default=30.0, gt=0)  # for events without session_id; null leaves it empty
    behaviour: tuple[UserRule, ...] = ()  # rules about whole users: bots
    max_quarantined_share: float = Field(default=0.5, ge=0, le=1)
    checks: Checks = Checks()  # of the whole, and against the parent snapshot
    targets: tuple[str, ...] = Field(default=("purchase",), min_length=1)  # event kinds that count as relevant
    signals: dict[str, float] = Field(default_factory=lambda: dict(DEFAULT_SIGNALS))  # interest per event kind

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for event in (*self.targets, *self.signals):
            if event not in EVENT_CODES:
                raise ValueError(unknown_name("event type", event, EVENT_TYPES))
        for what, table, schema in (("events", self.events, EVENTS), ("items", self.items, ITEMS), ("users", self.users, USERS)):
            for column in schema:
                if table is not None and not column.nullable and column.name != "event_id" and column.name not in table.names:
                    raise ValueError(f"{what}: map a column to {column.name!r} under `columns:` (or give it under `constants:`)")
        texts = self.items_from_events.texts
        for target, column in texts.items():
            if target not in ("title", "description", "category", "brand"):
                raise ValueError(f"items_from_events: {target!r} is not a text column of items (title, description, category, brand)")
            if column not in self.events.names:
                raise ValueError(f"items_from_events: {unknown_name('event column', column, self.events.names)}")
        return self

    @property
    def transient(self) -> list[str]:
        """Event columns that only serve to derive items and are not stored with the events."""
        return [name for name in dict.fromkeys(self.items_from_events.texts.values()) if name not in EVENTS.names]
