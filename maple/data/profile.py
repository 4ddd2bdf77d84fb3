"""A profile: statistics of a table's columns that merge, so that a log of any size is described by a few kilobytes.

The profile of a whole is the merged profiles of its parts, however it was cut into parts of whole users, to the last bit: counts add up,
histograms have fixed bins, and distinct values are estimated from the smallest of their hashes (k minimum values, Bar-Yossef et al.
2002). Values themselves are kept where there are few, and never of columns that identify people.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.hashing import mix64

Kind: TypeAlias = Literal["number", "text", "time", "identity", "other"]

#: Columns whose values belong to one user (an event id: to one row): only counted. Their distinct values add up over whole users.
IDENTITY = ("event_id", "user_id", "source_user_id", "session_id", "request_id")
KEPT_VALUES = 200  # distinct counts are exact up to here; beyond, their relative error is about 1 / sqrt(200) = 7 %
MAX_DAYS = 1000  # bins of a time histogram; beyond, a bin holds 2, 4, 8 ... days
TEXT = 60  # characters of a value that are kept
DAY_US = 86_400_000_000
_OFFSET = 1 << 14


@dataclass(frozen=True)
class ColumnProfile:
    """One column. ``nulls`` counts null, NaN and infinite values; ``low`` and ``high`` are numbers or microseconds.

    ``bins`` counts numbers by ``log_bins``, and times by day // ``width``. ``hashes``: the smallest hashes of values, ascending.
    ``values`` counts every value, by the beginning of its text, where all hashes are kept; else it is empty.
    """

    type: str
    kind: Kind
    rows: int
    nulls: int
    low: float | None = None
    high: float | None = None
    bins: Mapping[int, int] = field(default_factory=dict)
    width: int = 1
    hashes: tuple[int, ...] = ()
    complete: bool = True  # whether all hashes are kept
    values: Mapping[str, int] = field(default_factory=dict)
    counted: int = 0  # distinct values of an identity column

    @property
    def null_share(self) -> float:
        """Share of rows without a value; 0 where there are no rows."""
        return self.nulls / self.rows if self.rows else 0.0

    @property
    def distinct(self) -> int:
        """Distinct values: exact where all are kept and in identity columns, else estimated."""
        if self.kind == "identity":
            return self.counted
        if self.complete:
            return len(self.hashes)
        return round((len(self.hashes) - 1) * 2.0**64 / self.hashes[-1])

    def top(self, number: int = 10) -> list[tuple[str, int]]:
        """The most frequent values by count, then text; empty where there are too many to keep."""
        return sorted(self.values.items(), key=lambda pair: (-pair[1], pair[0]))[:number]

    def quantile(self, share: float) -> float:
        """About the value that ``share`` of the numbers do not exceed: the middle of its bin; NaN where there is none."""
        codes = sorted(self.bins)
        counts = np.array([self.bins[code] for code in codes], np.int64)
        if self.kind != "number" or not counts.sum():
            return float("nan")
        place = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
        low, high = bin_edges(codes[min(place, len(codes) - 1)])
        assert self.low is not None
        assert self.high is not None
        return min(max((low + high) / 2, self.low), self.high)

    def magnitude(self, share: float) -> float:
        """About the magnitude that ``share`` of the numbers do not exceed: the upper end of its bin; 0 where there is none."""
        sizes: Counter[int] = Counter()
        for code, count in self.bins.items():
            sizes[abs(code)] += count
        running = 0
        for code in sorted(sizes):
            running += sizes[code]
            if running >= share * sizes.total():
                return bin_edges(code)[1]
        return 0.0

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        bins = {str(code): count for code, count in self.bins.items()}
        return {**vars(self), "bins": bins, "hashes": [f"{key:016x}" for key in self.hashes], "values": dict(self.values)}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> ColumnProfile:
        """The inverse of ``plain``."""
        bins = {int(code): int(count) for code, count in plain["bins"].items()}
        return ColumnProfile(**{**plain, "bins": bins, "hashes": tuple(int(key, 16) for key in plain["hashes"])})


@dataclass(frozen=True)
class Profile:
    """A table: its rows, users, its columns by name, and how many events users have (``log_bins`` of the number of events)."""

    rows: int
    users: int
    columns: Mapping[str, ColumnProfile]
    per_user: Mapping[int, int] = field(default_factory=dict)

    @staticmethod
    def of(table: pa.Table) -> Profile:
        """The profile of the rows of some whole users; columns that start with ``_`` are left out."""
        columns = {
            name: _column(name, table[name].combine_chunks() if table.num_rows else pa.array([], table.schema.field(name).type))
            for name in sorted(table.column_names)
            if not name.startswith("_")
        }
        per_user: dict[int, int] = {}
        users = 0
        if "user_id" in table.column_names:
            events = np.asarray(pc.value_counts(table["user_id"].combine_chunks().drop_null()).field("counts"))
            users, per_user = len(events), _count(log_bins(events.astype(np.float64)))
        return Profile(table.num_rows, users, columns, per_user)

    def discreet(self, least: int = 5) -> Profile:
        """Without values that fewer than ``least`` rows have: for a table with a row per person."""
        columns = {
            name: replace(column, values={text: count for text, count in column.values.items() if count >= least})
            for name, column in self.columns.items()
        }
        return replace(self, columns=columns)

    @staticmethod
    def merge(parts: Iterable[Profile]) -> Profile:
        """The profile of the union of disjoint rows; users that are in several parts count once in each."""
        return reduce(_merged, parts, Profile(0, 0, {}))

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        per_user = {str(code): count for code, count in self.per_user.items()}
        return {"rows": self.rows, "users": self.users, "per_user": per_user, "columns": {k: v.plain() for k, v in self.columns.items()}}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Profile:
        """The inverse of ``plain``."""
        columns = {name: ColumnProfile.from_plain(column) for name, column in plain["columns"].items()}
        return Profile(plain["rows"], plain["users"], columns, {int(code): int(count) for code, count in plain["per_user"].items()})


def log_bins(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bin of each finite number: four to an octave, exact (bits of the number, no logarithm), in the order of the numbers.

    0 has a bin of its own, negative numbers mirror positive ones.
    """
    mantissa, exponent = np.frexp(np.abs(values))
    code = exponent.astype(np.int64) * 4 + ((mantissa - 0.5) * 8).astype(np.int64) + _OFFSET
    return np.asarray(np.where(values == 0, 0, np.sign(values).astype(np.int64) * code))


def bin_edges(code: int) -> tuple[float, float]:
    """The numbers a bin of ``log_bins`` lies between."""
    if code == 0:
        return 0.0, 0.0
    octave, quarter = divmod(abs(code) - _OFFSET, 4)
    low = math.ldexp(0.5 + quarter / 8, octave)
    high = sys.float_info.max if (octave, quarter) == (1024, 3) else math.ldexp(0.5 + (quarter + 1) / 8, octave)
    return (low, high) if code > 0 else (-high, -low)


def _column(name: str, column: pa.Array) -> ColumnProfile:
    kind, rows, type_ = _kind(name, column.type), len(column), str(column.type)
    if kind == "identity":
        distinct = rows - column.null_count if name == "event_id" else int(pc.count_distinct(column, mode="only_valid").as_py())
        return ColumnProfile(type_, kind, rows, column.null_count, counted=distinct)
    if kind == "other":
        return ColumnProfile(type_, kind, rows, column.null_count)
    if kind == "time":
        times = np.asarray(column.drop_null().cast(pa.timestamp("us", tz=column.type.tz) if pa.types.is_timestamp(column.type) else
                                                   pa.timestamp("us")).cast(pa.int64()))  # fmt: skip
        first, last = (int(times.min()), int(times.max())) if len(times) else (None, None)
        return _coarse(ColumnProfile(type_, kind, rows, column.null_count, first, last, _count(times // DAY_US)))
    valid = column.drop_null()
    if kind == "text":
        if pa.types.is_dictionary(valid.type):
            valid = valid.cast(valid.type.value_type)
        found = pc.value_counts(valid.cast(pa.large_string()))
        return ColumnProfile(type_, kind, rows, column.null_count, None, None, {}, 1, *_kept(_text_hashes(found.field("values")), found))
    if pa.types.is_float16(valid.type):
        valid = valid.cast(pa.float32())
    if pa.types.is_floating(valid.type):
        valid = pc.add(valid, pa.scalar(0.0, valid.type))  # one zero
    found = pc.value_counts(valid)
    numbers = np.asarray(found.field("values").cast(pa.float64(), safe=False))
    finite = np.isfinite(numbers)
    if not finite.all():
        found, numbers = found.filter(pa.array(finite)), numbers[finite]
    counts = np.asarray(found.field("counts"))
    codes, place = np.unique(log_bins(numbers), return_inverse=True)
    bins = dict(zip(codes.tolist(), np.bincount(place, counts, len(codes)).astype(np.int64).tolist(), strict=True))
    kept = _kept(mix64(numbers.view(np.uint64) + np.uint64(1)), found)
    low, high = (float(numbers.min()), float(numbers.max())) if len(numbers) else (None, None)
    return ColumnProfile(type_, kind, rows, rows - int(counts.sum()), low, high, bins, 1, *kept)


def _kind(name: str, type_: pa.DataType) -> Kind:
    if name in IDENTITY:
        return "identity"
    if pa.types.is_timestamp(type_) or pa.types.is_date(type_):
        return "time"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "number"
    inner = type_.value_type if pa.types.is_dictionary(type_) else type_
    return "text" if pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_boolean(inner) else "other"


def _text_hashes(texts: pa.Array) -> npt.NDArray[np.uint64]:
    """A hash of each text, uint64[N]."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8, key=b"value").digest() for text in texts.to_pylist()]
    return np.frombuffer(b"".join(digests), "<u8")


def _kept(hashes: npt.NDArray[np.uint64], found: pa.StructArray) -> tuple[tuple[int, ...], bool, dict[str, int]]:
    """The smallest hashes of some distinct values, whether these are all, and the counts of the values if so."""
    if len(hashes) > KEPT_VALUES:
        return tuple(np.sort(np.partition(hashes, KEPT_VALUES)[:KEPT_VALUES]).tolist()), False, {}
    values: Counter[str] = Counter()
    for text, count in zip(found.field("values").cast(pa.string()).to_pylist(), found.field("counts").to_pylist(), strict=True):
        values[text[:TEXT]] += count
    return tuple(np.sort(hashes).tolist()), True, dict(sorted(values.items()))


def _count(codes: npt.NDArray[np.int64]) -> dict[int, int]:
    if not len(codes):
        return {}
    low, span = int(codes.min()), int(codes.max() - codes.min())
    if span > 4 * len(codes) + 1000:
        found, counts = np.unique(codes, return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))
    counts = np.bincount(codes - low)
    found = np.flatnonzero(counts)
    return dict(zip((found + low).tolist(), counts[found].tolist(), strict=True))


def _add(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    return dict(sorted((Counter(one) + Counter(other)).items()))


def _coarse(column: ColumnProfile, width: int = 1) -> ColumnProfile:
    """The time column with bins of at least ``width`` days, wider where there would be too many: a function of the days alone."""
    bins, at = dict(column.bins), column.width
    while at < width or len(bins) > MAX_DAYS:
        wider: Counter[int] = Counter()
        for code, count in bins.items():
            wider[code // 2] += count
        bins, at = dict(sorted(wider.items())), at * 2
    return replace(column, bins=bins, width=at)


def _merged(one: Profile, other: Profile) -> Profile:
    columns = {
        name: _merged_column(one.columns[name], other.columns[name])
        if name in one.columns and name in other.columns
        else (one.columns.get(name) or other.columns[name])
        for name in sorted({*one.columns, *other.columns})
    }
    return Profile(one.rows + other.rows, one.users + other.users, columns, _add(one.per_user, other.per_user))


def _merged_column(one: ColumnProfile, other: ColumnProfile) -> ColumnProfile:
    rows, nulls = one.rows + other.rows, one.nulls + other.nulls
    types = sorted({*one.type.split(" | "), *other.type.split(" | ")} - {"null"}) or ["null"]
    kinds = {column.kind for column in (one, other) if column.type != "null"}  # a column without any value fits every kind
    kind: Kind = kinds.pop() if len(kinds) == 1 else "other"
    if kind == "other":
        return ColumnProfile(" | ".join(types), kind, rows, nulls)
    width = max(one.width, other.width)
    one, other = _coarse(one, width), _coarse(other, width)
    lows = [value for value in (one.low, other.low) if value is not None]
    highs = [value for value in (one.high, other.high) if value is not None]
    hashes = sorted({*one.hashes, *other.hashes})
    complete = one.complete and other.complete and len(hashes) <= KEPT_VALUES
    values = dict(sorted((Counter(one.values) + Counter(other.values)).items())) if complete else {}
    merged = ColumnProfile(
        " | ".join(types), kind, rows, nulls, min(lows, default=None), max(highs, default=None), _add(one.bins, other.bins), width,
        tuple(hashes[:KEPT_VALUES]), complete, values, one.counted + other.counted,
    )  # fmt: skip
    return _coarse(merged)
