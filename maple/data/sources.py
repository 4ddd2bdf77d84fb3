"""What a source is: a declarative mapping from any shop's files to Maple's events, items and users.

The YAML names files, formats and columns and declares the cleaning rules; nothing in it is code. ``presets.load_source`` finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_serializer, field_validator, model_validator

from maple.config import Section
from maple.data.behaviour import UserRule
from maple.data.checks import Checks
from maple.data.dataset import DEFAULT_SIGNALS
from maple.data.validate import Rule
from maple.errors import ConfigError, unknown_name
from maple.schema import EVENT_CODES, EVENT_TYPES, EVENTS, IDENTITIES, ITEMS, USERS

#: ``dat``: fields split by ``::`` (or ``delimiter:``) without quotes. ``atomic``: RecBole's, with typed names in the header.
#: ``lists``: ``user item item ...`` lines, oldest first; their columns are ``user``, ``item`` and ``place``.
Format = Literal["csv", "tsv", "jsonl", "parquet", "dat", "atomic", "lists"]
LIST_COLUMNS = ("user", "item", "place")
LIST_MARK = "\x1f"  # before each value of a JSON list that travels as a text
SUFFIXES: dict[str, Format] = {
    "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet", "dat": "dat",
    "inter": "atomic", "item": "atomic", "user": "atomic",
}  # fmt: skip
COMPRESSED = ("gz", "bz2", "zst", "lz4")
SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "mock")  # never http: a setting must not make Maple fetch pages


def check_uri(uri: str) -> str:
    """``uri`` if it is a local path or of a file system that Maple reads; ``ConfigError`` for anything else, such as http."""
    scheme = uri.partition("://")[0].lower() if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise ConfigError(f"{uri!r}: Maple reads no {scheme}:// addresses; use a local path or one of {', '.join(SCHEMES)}")
    return uri


def _tupled(value: Any) -> Any:
    """One thing where several may be given."""
    return [value] if isinstance(value, str | dict | Section) else value


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


class FileSource(Section):
    """Files of one layout: where they lie and how they are read."""

    path: str | tuple[str, ...]  # relative to the data folder, globs allowed; or a URI
    format: Format | None = None  # by the file's ending where not given
    header: tuple[str, ...] = ()  # names of the columns where the files have no header line
    encoding: str = "utf-8"
    delimiter: str | None = Field(default=None, min_length=1)
    nulls: tuple[str, ...] = ("",)  # texts that mean "missing"
    separator: str = Field(default=" ", min_length=1)  # between the values of a list in a text

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except LookupError:
            raise ValueError(f"unknown text encoding {encoding!r}; common ones are utf-8, latin-1, cp1252") from None
        return encoding

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for one in (path,) if isinstance(path, str) else path:
            try:
                check_uri(one)
            except ConfigError as error:
                raise ValueError(str(error)) from None
            if "://" not in one and (one.startswith("/") or ".." in one.split("/")):
                raise ValueError(f"path {one!r} must lie inside the data folder, or be a URI")
        return path

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    def format_of(self, path: str) -> Format:
        """The format of one file."""
        if self.format is not None:
            return self.format
        parts = path.lower().rsplit("/", 1)[-1].split(".")
        while len(parts) > 1 and parts[-1] in COMPRESSED:
            parts.pop()
        if parts[-1] not in SUFFIXES:
            raise ConfigError(
                f"{path}: the format cannot be told from the name; write `format:` ({', '.join(sorted({*SUFFIXES.values(), 'lists'}))})"
            )
        return SUFFIXES[parts[-1]]


class Join(FileSource):
    """Another table that adds columns by a key, as orders to their lines: one row a key, and it must fit in memory.

    ``key``: the column that both have, or {ours: theirs} where the names differ. ``take``: the columns it adds, a list or
    {name here: name there}; `columns:` and the other settings then use them like the files' own. A row without a match is set aside.
    """

    key: dict[str, str] = Field(min_length=1)
    take: dict[str, str] = Field(min_length=1)

    @field_validator("key", "take", mode="before")
    @classmethod
    def _names(cls, names: Any) -> Any:
        return _named([names] if isinstance(names, str) else names)


class RateTable(FileSource):
    """Exchange rates by day: what one unit of ``currency`` is worth, from ``date`` (an ISO day) until the next known day."""

    date: str = "date"
    currency: str = "currency"
    rate: str = "rate"


class Currencies(Section):
    """Amounts in several currencies made one: each of ``applies_to`` times the rate of the row's currency, which is in ``column``.

    ``rates``: {GBP: 1.17}, what one of them is worth in ``to``; or ``daily``, a table of rates by day (UTC), of which the last known one
    counts. A row with an amount in a currency without a rate is set aside.
    """

    column: str
    to: str
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    daily: RateTable | None = None
    applies_to: tuple[str, ...] = ("price",)

    _lists = field_validator("applies_to", mode="before")(_tupled)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.rates) == (self.daily is not None):
            raise ValueError("give either `rates:` or a table of `daily:` rates")
        return self


class Units(Section):
    """Quantities in several units made one: each of ``applies_to`` times the factor of the row's unit, which is in ``column``."""

    column: str
    factors: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    applies_to: tuple[str, ...] = ("value",)

    _lists = field_validator("applies_to", mode="before")(_tupled)


class TableSource(FileSource):
    """One table of a source. Names on the left are Maple's (see ``maple.schema``), names on the right are the files'."""

    columns: dict[str, str] = Field(default_factory=dict)
    constants: dict[str, str | float | bool] = Field(default_factory=dict)
    values: dict[str, dict[str, str]] = Field(default_factory=dict)  # {event: {transaction: purchase}}: re-label texts of a column
    ratios: dict[str, tuple[str, str]] = Field(default_factory=dict)  # {price: [sales_value, quantity]}; null where the divisor is 0
    extract: dict[str, Extract] = Field(default_factory=dict)
    keep: dict[str, str] = Field(default_factory=dict)  # further columns; a list keeps their names
    #: Of kept columns in text files. Atomic files say theirs; else ``string``. ``strings`` and ``floats`` are lists, see ``separator``.
    types: dict[str, Literal["string", "int", "float", "bool", "strings", "floats"]] = Field(default_factory=dict)
    join: tuple[Join, ...] = ()
    currencies: Currencies | None = None
    units: Units | None = None
    clock: Clock = Clock()
    rules: tuple[Rule, ...] = ()

    _joins = field_validator("join", mode="before")(_tupled)

    @field_validator("keep", mode="before")
    @classmethod
    def _names(cls, keep: Any) -> Any:
        return _named(keep)

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
        converted = [name for scale in (self.currencies, self.units) if scale is not None for name in scale.applies_to]
        for what, named in (("types", self.types), ("applies_to", converted)):
            unknown = sorted(set(named) - seen)
            if unknown:
                raise ValueError(f"`{what}` names {unknown[0]!r}: " + unknown_name("column", unknown[0], seen))
        taken = [name for join in self.join for name in join.take]
        twice = sorted({name for name in taken if taken.count(name) > 1})
        if twice:
            raise ValueError(f"two joins give a column {twice[0]!r}; rename one of them: `take: {{other_name: {twice[0]}}}`")
        return self

    @property
    def names(self) -> list[str]:
        """Maple's names of everything this table gives, in declared order."""
        return [*self.columns, *self.constants, *self.ratios, *self.extract, *self.keep]

    @property
    def used(self) -> list[str]:
        """The columns that the mapping names, the files' own and joined ones, distinct, in declared order."""
        wanted = [*self.columns.values(), *(name for pair in self.ratios.values() for name in pair)]
        wanted += [*(part.column for part in self.extract.values()), *self.keep.values()]
        return list(dict.fromkeys([*wanted, *(scale.column for scale in (self.currencies, self.units) if scale is not None)]))

    @property
    def needed(self) -> list[str]:
        """The files' own columns that must be read, distinct."""
        taken = {name for join in self.join for name in join.take}
        keys = [name for join in self.join for name in join.key]
        return list(dict.fromkeys(name for name in [*self.used, *keys] if name not in taken))


def _named(names: Any) -> Any:
    return {name: name for name in names} if isinstance(names, list | tuple) else names


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
    events: tuple[TableSource, ...] = Field(min_length=1)  # one table, or a list of them
    items: TableSource | None = None
    users: TableSource | None = None
    identities: TableSource | None = None  # device_id -> user_id: whose events are one person's (see ``identity``)
    items_from_events: ItemsFromEvents = ItemsFromEvents()
    duplicates: Literal["quarantine", "keep"] = "quarantine"  # of events that are equal in every column, or share an event_id
    returns: Literal["keep", "net"] = "keep"  # net: quantities that came back are taken off what was bought (see ``etl.net_returns``)
    returns_days: float | None = Field(default=None, gt=0)  # how old a purchase may be that a return is netted with; null: any
    session_gap_minutes: float | None = Field(default=30.0, gt=0)  # for events without session_id; null leaves it empty
    behaviour: tuple[UserRule, ...] = ()  # rules about whole users: bots
    max_quarantined_share: float = Field(default=0.5, ge=0, le=1)
    checks: Checks = Checks()  # of the whole, and against the parent snapshot
    targets: tuple[str, ...] = Field(default=("purchase",), min_length=1)  # event kinds that count as relevant
    signals: dict[str, float] = Field(default_factory=lambda: dict(DEFAULT_SIGNALS))  # interest per event kind

    _tables = field_validator("events", mode="before")(_tupled)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """The source from plain values, or a ``ConfigError``, in which a single table of events is not counted."""
        try:
            return super().parse(values, where)
        except ConfigError as error:
            if isinstance(values.get("events"), list | tuple):
                raise
            raise ConfigError(str(error).replace("events.0.", "events.")) from None

    @field_serializer("events")
    def _as_written(self, events: tuple[TableSource, ...]) -> Any:
        """One table is written without a list, as people do."""
        plain = [table.plain() for table in events]
        return plain[0] if len(plain) == 1 else plain

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for event in (*self.targets, *self.signals):
            if event not in EVENT_CODES:
                raise ValueError(unknown_name("event type", event, EVENT_TYPES))
        tables = [(f"events[{place}]" if len(self.events) > 1 else "events", table, EVENTS) for place, table in enumerate(self.events)]
        others = (("items", self.items, ITEMS), ("users", self.users, USERS), ("identities", self.identities, IDENTITIES))
        for what, table, schema in (*tables, *((what, table, schema) for what, table, schema in others if table is not None)):
            for column in schema:
                if not column.nullable and column.name != "event_id" and column.name not in table.names:
                    raise ValueError(f"{what}: map a column to {column.name!r} under `columns:` (or give it under `constants:`)")
        if len({table.clock.unit == "order" for table in self.events}) > 1 or (self.ordered and len({t.clock for t in self.events}) > 1):
            raise ValueError("events: tables with `clock: {unit: order}` cannot be mixed with others; an order has no common time")
        known = list(dict.fromkeys(name for table in self.events for name in table.names))
        for target, column in self.items_from_events.texts.items():
            if target not in ("title", "description", "category", "brand"):
                raise ValueError(f"items_from_events: {target!r} is not a text column of items (title, description, category, brand)")
            if column not in known:
                raise ValueError(f"items_from_events: {unknown_name('event column', column, known)}")
        return self

    @property
    def tables(self) -> Iterable[tuple[str, TableSource]]:
        """Every table of the source with what it holds."""
        yield from (("events", table) for table in self.events)
        for what, table in (("items", self.items), ("users", self.users), ("identities", self.identities)):
            if table is not None:
                yield what, table

    @property
    def ordered(self) -> bool:
        """Whether the events have no clock but an order (see ``Clock``)."""
        return self.events[0].clock.unit == "order"

    @property
    def order_clock(self) -> Clock | None:
        """The clock of events that have an order and no time; None where they have times."""
        return self.events[0].clock if self.ordered else None

    @property
    def transient(self) -> list[str]:
        """Event columns that only serve to derive items and are not stored with the events."""
        return [name for name in dict.fromkeys(self.items_from_events.texts.values()) if name not in EVENTS.names]
