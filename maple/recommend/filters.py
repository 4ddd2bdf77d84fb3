"""What may not be recommended: unavailable items, what the request excludes or does not accept, and (by setting) what was bought.

``Restrictions`` is the one place that says so: sources get it as a mask before they search, the filter stages apply it
again to what comes back, because a source elsewhere may know an older or newer availability, and ``Popular`` fills up under it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.dataset import Bool, Float32, Int8, Int32, Int64
from maple.errors import ServeError, unknown_name
from maple.models.base import Array
from maple.recommend.engine import Candidates, Query

MAX_FILTER_VALUES = 1000


class FilterError(ServeError):
    """A request's filter that these items cannot answer."""


class ItemColumns:
    """The item table as arrays by code, made on first use: categorical columns as int32 codes, numeric ones as float32.

    Timestamps and dates are microseconds since 1970.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._codes: dict[str, tuple[Int32, dict[Any, int]]] = {}
        self._floats: dict[str, Float32] = {}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def names(self) -> list[str]:
        return [name for name in self.table.column_names if name != "item_id"]

    def kind(self, name: str) -> pa.DataType:
        """The type of a column."""
        return self.table.schema.field(name).type

    def numeric(self, name: str) -> bool:
        """Whether a range over the column means something; a point in time counts as a number."""
        kind = self.kind(name)
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or self._moments(name))

    def _moments(self, name: str) -> bool:
        kind = self.kind(name)
        return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))

    def _microseconds(self, name: str) -> pa.ChunkedArray:
        kind = self.kind(name)
        return self.table[name].cast(pa.timestamp("us", tz=getattr(kind, "tz", None)), safe=False).cast(pa.int64())

    def codes(self, name: str) -> tuple[Int32, Mapping[Any, int]]:
        """(code of each item's value int32[I], -1 = missing; value -> code)."""
        if name not in self._codes:
            column = self._microseconds(name) if self._moments(name) else self.table[name]
            encoded = column.combine_chunks().dictionary_encode()
            if isinstance(encoded, pa.ChunkedArray):
                encoded = encoded.combine_chunks()
            codes = np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int32)
            self._codes[name] = codes, {value: code for code, value in enumerate(encoded.dictionary.to_pylist())}
        return self._codes[name]

    def floats(self, name: str) -> Float32:
        """float32[I], NaN = missing."""
        if name not in self._floats:
            self._floats[name] = np.asarray(self.table[name].cast(pa.float64(), safe=False).fill_null(float("nan"))).astype(np.float32)
        return self._floats[name]

    def times(self, name: str) -> Int64:
        """Microseconds int64[I] of a timestamp or date column, the smallest int64 = missing."""
        column = self._microseconds(name) if self._moments(name) else self.table[name].cast(pa.int64())
        return np.asarray(column.fill_null(np.iinfo(np.int64).min))

    def matches(self, name: str, accepted: Iterable[Any]) -> Bool:
        """Whether each item's value is one of ``accepted``, bool[I]; a missing value is none of them."""
        codes, values = self.codes(name)
        table = np.zeros(len(values) + 1, dtype=bool)  # its last place answers for code -1
        table[[values[value] for value in accepted if value in values]] = True
        return table[codes]

    def mask(self, filters: Mapping[str, Any]) -> Bool:
        """Items that pass a request's filters, bool[I]: ``{column: [accepted values]}`` or ``{column: {"min": x, "max": y}}``.

        Raises ``FilterError`` for a filter that these items cannot answer.
        """
        out = np.ones(len(self), dtype=bool)
        for name, wanted in filters.items():
            self._check(name, wanted)
            try:
                out &= self._within(name, wanted) if isinstance(wanted, Mapping) else self.matches(name, wanted)
            except (pa.ArrowException, TypeError, ValueError) as error:  # a column of lists, for one
                raise FilterError(
                    f"filters.{name}: a column of type {self.kind(name)} cannot be filtered ({type(error).__name__})"
                ) from None
        return out

    def _within(self, name: str, bounds: Mapping[str, float]) -> Bool:
        """Whether each item's value lies in the range, both ends included, bool[I]; a missing value does not."""
        low, high = bounds.get("min", -np.inf), bounds.get("max", np.inf)
        if self._moments(name):  # float32 cannot tell apart what is minutes apart
            times = self.times(name)
            inside: Bool = (times >= low) & (times <= high) & (times != np.iinfo(np.int64).min)
            return inside
        values = self.floats(name)
        with np.errstate(invalid="ignore"):
            return (values >= low) & (values <= high)

    def _check(self, name: str, wanted: Any) -> None:
        """``FilterError`` for a filter that these items cannot answer."""
        if name not in self.names:
            raise FilterError(f"filters: {unknown_name('item column', name, self.names)}")
        if isinstance(wanted, Mapping):
            if not self.numeric(name):
                raise FilterError(f"filters.{name}: a range needs a numeric column; give a list of accepted values")
            if not wanted or not wanted.keys() <= {"min", "max"} or not all(isinstance(bound, int | float) for bound in wanted.values()):
                raise FilterError(f"filters.{name}: a range is {{min: number, max: number}}, at least one of the two")
        elif isinstance(wanted, str | bytes) or not isinstance(wanted, Sequence):
            raise FilterError(f"filters.{name}: give a list of accepted values or a range {{min, max}}")
        elif len(wanted) > MAX_FILTER_VALUES or not all(isinstance(value, str | bool | int | float) for value in wanted):
            raise FilterError(f"filters.{name}: give at most {MAX_FILTER_VALUES} texts, numbers or booleans")


class PatchedColumns(ItemColumns):
    """Item columns with some values replaced and items added behind the last: the columns of a live catalogue.

    ``base`` is neither copied nor changed; a column is put together when it is first used. ``patches``: column -> (item codes
    int32[M], their values as a column of M rows); a column that the base lacks is unknown for all other items.
    """

    def __init__(self, base: ItemColumns, size: int, patches: Mapping[str, tuple[Int32, pa.Array]]) -> None:
        super().__init__(base.table)
        self._base, self._size = base, size
        self._patches = {name: (rows, ItemColumns(pa.table({name: values}))) for name, (rows, values) in patches.items()}

    def __len__(self) -> int:
        return self._size

    @property
    def names(self) -> list[str]:
        return [*self._base.names, *(name for name in self._patches if name not in self._base.names)]

    def kind(self, name: str) -> pa.DataType:
        return self._base.kind(name) if name in self._base.names else self._patches[name][1].kind(name)

    def codes(self, name: str) -> tuple[Int32, Mapping[Any, int]]:
        if name not in self._codes:
            codes, values = self._base.codes(name) if name in self._base.names else (np.empty(0, np.int32), {})
            out, known = self._spread(codes, -1), dict(values)
            if name in self._patches:
                rows, patch = self._patches[name]
                own, own_values = patch.codes(name)
                here = np.array([*(known.setdefault(value, len(known)) for value in own_values), -1], np.int32)
                out[rows] = here[own]
            self._codes[name] = out, known
        return self._codes[name]

    def floats(self, name: str) -> Float32:
        if name not in self._floats:
            out = self._spread(self._base.floats(name) if name in self._base.names else np.empty(0, np.float32), np.nan)
            if name in self._patches:
                rows, patch = self._patches[name]
                out[rows] = patch.floats(name)
            self._floats[name] = out
        return self._floats[name]

    def times(self, name: str) -> Int64:
        out = self._spread(self._base.times(name) if name in self._base.names else np.empty(0, np.int64), np.iinfo(np.int64).min)
        if name in self._patches:
            rows, patch = self._patches[name]
            out[rows] = patch.times(name)
        return out

    def _spread(self, base: Array, blank: float) -> Array:
        """The base's values, and ``blank`` for every item that it does not have."""
        out = np.full(self._size, blank, base.dtype)
        out[: len(base)] = base
        return out


def available(columns: ItemColumns) -> Bool:
    """Which items may be sold, bool[I]: ``available`` is not false and ``stock`` is not zero or less; missing means they may."""
    out = np.ones(len(columns), dtype=bool)
    if "available" in columns.names:
        out &= columns.floats("available") != 0
    if "stock" in columns.names:
        out &= ~(columns.floats("stock") <= 0)
    return out


@dataclass(frozen=True, eq=False)
class Restrictions:
    """Which items a query may get: ``available`` bool[I]; ``bought``: event codes that count as bought where ``repeats`` is false."""

    columns: ItemColumns
    available: Bool
    repeats: bool
    bought: Int8

    def allowed(self, filters: Mapping[str, Any]) -> Bool:
        """Items that may be shown under a request's filters, bool[I]."""
        return self.available & self.columns.mask(filters) if filters else self.available

    def owned(self, query: Query) -> Int32:
        """Items that the query's user has bought and must not get again; empty where repeats are allowed."""
        return np.empty(0, np.int32) if self.repeats else query.items[np.isin(query.events, self.bought)]

    def excluded(self, query: Query) -> Int32:
        """All items that the query must not get, request excludes and owned ones; may hold -1 and repeats."""
        return np.concatenate([query.exclude, self.owned(query)]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Filter:
    """A stage that keeps what ``passes`` says, bool over one query's items, and drops the rest for ``reason``."""

    name: str
    reason: str
    passes: Callable[[Query, Int32], Bool | None]  # None = all pass
    adds: bool = False
    essential: bool = True

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        keep = np.ones(len(candidates), dtype=bool)
        for row, query in enumerate(queries):
            part = slice(candidates.offsets[row], candidates.offsets[row + 1])
            passed = self.passes(query, candidates.items[part])
            if passed is not None:
                keep[part] = passed
        return candidates.keep(keep, self.name, self.reason)


def filters(limits: Restrictions) -> tuple[Filter, ...]:
    """The filter stages: availability, request excludes, already bought, request filters."""

    def in_stock(query: Query, items: Int32) -> Bool:
        return np.asarray(limits.available[items])

    def not_excluded(query: Query, items: Int32) -> Bool | None:
        return ~np.isin(items, query.exclude) if len(query.exclude) else None

    def not_owned(query: Query, items: Int32) -> Bool | None:
        owned = limits.owned(query)
        return ~np.isin(items, owned) if len(owned) else None

    def accepted(query: Query, items: Int32) -> Bool | None:
        return limits.columns.mask(query.filters)[items] if query.filters else None

    return (
        Filter("available", "not available", in_stock),
        Filter("excluded", "excluded by the request", not_excluded),
        Filter("bought", "already bought", not_owned),
        Filter("filters", "does not match the request's filters", accepted),
    )


@dataclass(frozen=True, eq=False)
class Popular:
    """Fill each query up to its k (at least ``least``) with popular items under its restrictions: the fallback, and the backfill.

    ``order`` int32[M]: item codes, most popular first. Added items score below all others; their column ``source`` is ``code``,
    other columns are NaN or -1.
    """

    order: Int32
    limits: Restrictions
    code: int
    least: int = 1
    name: str = "popular fill"
    adds: bool = True
    essential: bool = False

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        sizes = np.diff(candidates.offsets)
        wanted = np.array([max(query.k, self.least) for query in queries], dtype=np.int64)
        short = np.flatnonzero(sizes < wanted).tolist()
        if not short:
            return candidates
        added = {row: self._fill(queries[row], candidates, row, int(wanted[row] - sizes[row])) for row in short}
        blank = np.empty(0, np.int32)
        extra = np.array([len(added.get(row, blank)) for row in range(len(queries))], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes + extra)]).astype(np.int64)
        old = np.arange(len(candidates)) + np.repeat(np.cumsum(extra) - extra, sizes)
        new = np.setdiff1d(np.arange(offsets[-1]), old, assume_unique=True)

        def spread(column: Array, values: Array | float) -> Array:
            out = np.empty(offsets[-1], dtype=column.dtype)
            out[old], out[new] = column, values
            return out

        columns = {name: spread(column, np.nan if column.dtype.kind == "f" else -1) for name, column in candidates.columns.items()}
        source = candidates.columns.get("source", np.full(len(candidates), -1, np.int32))
        columns["source"] = spread(source, self.code)
        scores = [self._below(candidates.score[candidates.offsets[row] : candidates.offsets[row + 1]], int(extra[row])) for row in short]
        return Candidates(
            offsets,
            spread(candidates.items, np.concatenate([added[row] for row in short])),
            spread(candidates.score, np.concatenate(scores)),
            columns, candidates.dropped, candidates.degraded,
        )  # fmt: skip

    def _fill(self, query: Query, candidates: Candidates, row: int, count: int) -> Int32:
        part = slice(candidates.offsets[row], candidates.offsets[row + 1])
        # What an earlier stage dropped for this query stays out, whatever its reason.
        gone = [chunk.items[chunk.rows == row] for chunk in candidates.dropped]
        open_ = self.limits.allowed(query.filters).copy()
        out = np.concatenate([self.limits.excluded(query), candidates.items[part], *gone])
        open_[out[out >= 0]] = False
        return self.order[open_[self.order]][:count]

    @staticmethod
    def _below(scores: Float32, count: int) -> Float32:
        lowest = float(scores.min()) if len(scores) else 1.0
        return (lowest - max(abs(lowest), 1e-3) * 1e-3 * np.arange(1, count + 1)).astype(np.float32)
