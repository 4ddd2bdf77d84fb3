"""Typed columns of USERS, ITEMS and the context of events as features: what was fitted of each, plain JSON, and how values become numbers.

Numbers and booleans stay what they are; texts become codes of a vocabulary, lists of texts one 0/1 column per frequent tag, times the
days that have passed. One function turns a value into its number, whether it comes from a table or from a request, so both
sides agree. Missing and unusable numbers are NaN, missing and unseen texts -1; a value never fails a request.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.dataset import Dataset, Int64
from maple.errors import ConfigError, unknown_name
from maple.features.fold import DAY, Float64
from maple.features.spec import FeatureSpec
from maple.schema import USERS

Array: TypeAlias = npt.NDArray[Any]

#: Columns of ITEMS that are texts to read, keys, live values that a bundle cannot know, or features already.
NOT_AUTOMATIC: frozenset[str] = frozenset({"item_id", "title", "description", "available", "stock", "price", "promotion", "created_at"})


class Kind(StrEnum):
    """How a column is read."""

    NUMBER = "number"  # float32
    CODE = "code"  # int32, the place in ``values``
    TAGS = "tags"  # one float32 column of 0 and 1 per value
    TIME = "time"  # float32 log(1 + days) from then to now; not known where it lies ahead


@dataclass(frozen=True)
class Field:
    """One column as it was fitted. ``values``: the known texts in code order (CODE) or column order (TAGS)."""

    name: str
    kind: Kind
    values: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """JSON-ready, the inverse of ``of``."""
        return {"name": self.name, "kind": self.kind.value, "values": list(self.values)}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Field:
        return Field(str(plain["name"]), Kind(plain["kind"]), tuple(map(str, plain["values"])))

    @staticmethod
    def fit(name: str, column: pa.ChunkedArray, max_values: int, max_tags: int) -> Field | None:
        """The field of a table's column with the most frequent of its values; None where the type cannot be a feature."""
        kind = _kind(column.type)
        if kind is None or kind in (Kind.NUMBER, Kind.TIME):
            return None if kind is None else Field(name, kind)
        counts: Counter[str] = Counter()
        if kind == Kind.TAGS:
            counts.update(pc.list_flatten(column).cast(pa.string()).drop_null().to_pylist())
        else:
            for each in pc.value_counts(column).to_pylist():
                text = _text(each["values"])
                if text is not None:
                    counts[text] += each["counts"]
        most = max_tags if kind == Kind.TAGS else max_values
        kept = sorted(counts, key=lambda text: (-counts[text], text))[:most]
        return Field(name, kind, tuple(sorted(kept)))

    def names(self, prefix: str) -> tuple[str, ...]:
        """Full names of its columns."""
        return tuple(f"{prefix}.{self.name}.{value}" for value in self.values) if self.kind == Kind.TAGS else (f"{prefix}.{self.name}",)

    def encode(self, values: Sequence[Any]) -> list[Array]:
        """The columns of N values as they come from a table or a request: int32[N] of a CODE, float32[N] else; a TIME is float64[N]
        microseconds, for ``passed`` to finish."""
        if self.kind == Kind.CODE:
            codes = self._codes
            found = (None if value is None else _text(value) for value in values)
            return [np.fromiter((-1 if text is None else codes.get(text, -1) for text in found), np.int32, len(values))]
        if self.kind == Kind.TAGS:
            held = [_tags(value) for value in values]
            return [
                np.array([np.nan if tags is None else float(value in tags) for tags in held], np.float32) for value in self.values
            ]  # fmt: skip
        if self.kind == Kind.TIME:
            return [np.array([_time(value) for value in values], np.float64)]
        return [np.array([_number(value) for value in values], np.float64).astype(np.float32)]

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {text: code for code, text in enumerate(self.values)}


def passed(time: Float64, now: Int64) -> Array:
    """log(1 + days) from times in microseconds to now, float32; NaN where the time is unknown or lies ahead."""
    since = now - time
    return np.log1p(np.where(since >= 0, since, np.nan) / DAY).astype(np.float32)


@dataclass(frozen=True)
class Encoding:
    """The fitted fields of requests' contexts, of users and of items. Plain JSON: in the manifest of a bundle."""

    context: tuple[Field, ...] = ()
    user: tuple[Field, ...] = ()
    item: tuple[Field, ...] = ()

    def plain(self) -> dict[str, Any]:
        """JSON-ready, the inverse of ``of``."""
        return {part: [field.plain() for field in getattr(self, part)] for part in ("context", "user", "item")}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Encoding:
        return Encoding(*(tuple(Field.of(each) for each in plain[part]) for part in ("context", "user", "item")))

    @staticmethod
    def fit(data: Dataset, spec: FeatureSpec) -> Encoding:
        """What the users, items and contexts of a log say; give it the training part. Only rows of users and items that have events count.

        ``ConfigError`` where the settings name a column that the tables lack, or one that cannot be a feature.
        """
        asked = spec.attributes
        users = data.user_table.take(pa.array(np.unique(data.log.user)))
        items = data.item_table.take(pa.array(np.unique(data.log.item[data.log.item >= 0])))
        context = []
        for name in spec.context:
            if name in data.contexts:
                counts = np.bincount(data.log.context[name] + 1, minlength=len(data.contexts[name]) + 1)[1:]
                frequent = np.lexsort((np.arange(len(counts)), -counts))[: asked.max_values]
                context.append(
                    Field(name, Kind.CODE, tuple(sorted(filter(None, data.contexts[name].decode(frequent[counts[frequent] > 0])))))
                )
        return Encoding(
            tuple(context),
            _fit(users, asked.user, frozenset(USERS.names), asked.max_values, asked.max_tags, "attributes.user"),
            _fit(items, asked.item, NOT_AUTOMATIC, asked.max_values, asked.max_tags, "attributes.item"),
        )


#: No fields.
NOTHING = Encoding()


def _fit(
    table: pa.Table, wanted: str | Sequence[str], skip: frozenset[str], max_values: int, max_tags: int, where: str
) -> tuple[Field, ...]:
    automatic = isinstance(wanted, str)
    names = [name for name in table.column_names if name not in skip and not name.endswith("_id")] if automatic else list(wanted)
    out = []
    for name in names:
        if name not in table.column_names:
            raise ConfigError(f"{where}: {unknown_name('column', name, table.column_names)}")
        column = table[name]
        field = Field.fit(name, column, max_values + automatic, max_tags)
        if field is None and not automatic:
            raise ConfigError(f"{where}: column {name!r} is {column.type}, which cannot be a feature; leave it out")
        if field is None or (automatic and not _says_something(field, column, max_values)):
            continue
        out.append(field)
    return tuple(out)


def _says_something(field: Field, column: pa.ChunkedArray, max_values: int) -> bool:
    """Whether an unnamed column is worth being one: it varies, and a text is not another id."""
    if column.null_count == len(column):
        return False
    if field.kind == Kind.CODE:
        known = len(column) - int(column.null_count)
        return 1 < len(field.values) <= min(max_values, max(2, known // 2))
    return bool(field.values) if field.kind == Kind.TAGS else True


def plain_rows(table: pa.Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a USERS table as (user id, attributes): texts, numbers, booleans, lists of texts, times as ISO 8601; no nulls."""
    columns = {
        name: column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
        if name != "user_id" and _kind(column.type) is not None
    }
    for row, user in enumerate(table["user_id"].to_pylist()):
        held = {name: _portable(values[row]) for name, values in columns.items()}
        yield user, {name: value for name, value in held.items() if value is not None}


def _portable(value: Any) -> Any:
    """A value of a table as a request would give it; None for a missing or infinite number."""
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, list):
        return [each for each in value if each is not None]
    if isinstance(value, Decimal | float):
        return float(value) if math.isfinite(value) else None
    return value


# -- one value -----------------------------------------------------------------------------------------------------------


def _kind(type_: pa.DataType) -> Kind | None:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return Kind.TAGS if pa.types.is_string(type_.value_type) or pa.types.is_large_string(type_.value_type) else None
    if pa.types.is_boolean(type_) or pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return Kind.CODE
    if pa.types.is_timestamp(type_) or pa.types.is_date(type_):
        return Kind.TIME
    return Kind.NUMBER if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_) else None


def _text(value: Any) -> str | None:
    """A scalar as the text that a vocabulary holds; None for what is empty or no scalar."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return None if not math.isfinite(value) else str(int(value)) if value == int(value) else repr(float(value))
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float:
    if not isinstance(value, bool | int | float | str | Decimal):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if abs(number) < 3e38 else math.nan


def _tags(value: Any) -> frozenset[str] | None:
    if isinstance(value, str):
        return frozenset((value,))
    return frozenset(each for each in value if isinstance(each, str)) if isinstance(value, list | tuple) else None


def _time(value: Any) -> float:
    """Microseconds since 1970; a number is taken as such, a text as ISO 8601, without a zone as UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return math.nan
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, datetime):
        value = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return float((value - _EPOCH) // timedelta(microseconds=1))
    return _number(value) if not isinstance(value, bool) else math.nan


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
