"""Feature columns as the input of a network: robust scaling of numbers, table rows for codes, missing values made explicit.

Fitted on training columns, then a pure function of a batch of columns; its state is plain arrays. What becomes of a missing number
is a policy per column (``Missing``); a code that is missing always has the table row of unknown codes.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from maple.data.dataset import Bool, Float32, Int32
from maple.errors import DataError, unknown_name
from maple.models.base import Array, State

#: ``impute``: the center of the training values stands in. ``indicator``: only a 0/1 column that says whether the number is missing,
#: the number itself is left out. ``both``: the center, and the 0/1 column if training had missing values. ``reject``: training on a missing
#: value is an error, so that a broken feature is not learned around; a request is still answered, with the center.
Missing: TypeAlias = Literal["impute", "indicator", "both", "reject"]

CLIP = 5.0
SAMPLE_ROWS = 200_000


@dataclass(frozen=True, eq=False)
class Columns:
    """What was learned of K number columns and C code columns.

    A number becomes ``clip((f(x) - center) / scale, -5, 5)``, f = signed log for heavy tails, with center and scale from the
    middle 99 % of the training values; a value that is missing (NaN or infinite) becomes 0, and a 0/1 indicator column may say so,
    as the column's policy wants it. A code becomes a row of one embedding table shared by all code columns: each column has a row of
    its own for every frequent code, and one for unknown, unseen and rare codes together.
    """

    numbers: tuple[str, ...]
    codes: tuple[str, ...]
    log_scale: Float32  # [K], 0 = no log
    center: Float32  # [K]
    scale: Float32  # [K]
    kept: Bool  # [K], whether the number itself enters
    indicator: Bool  # [K], whether a missing-value column follows
    rows: tuple[Int32, ...]  # per code column: code -> table row, the last entry is the row of unknown codes

    @property
    def width(self) -> int:
        """Columns of the number matrix, indicators included."""
        return int(self.kept.sum()) + int(self.indicator.sum())

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table."""
        return int(self.rows[-1].max()) + 1 if self.rows else 0

    @property
    def unknown_rows(self) -> Int32:
        """The table row of unknown codes, per code column: int32[C]."""
        return np.array([rows[-1] for rows in self.rows], dtype=np.int32)

    @staticmethod
    def fit(columns: Mapping[str, Array], *, max_codes: int, min_count: int, missing: Mapping[str, Missing] | None = None) -> Columns:
        """Learn from training columns; ``DataError`` if one is neither. The ``max_codes`` most frequent codes keep a row of their own.

        ``missing``: policies by pattern (``user.price*``) of the names of number columns; the first that fits counts, ``both`` where none.
        """
        if not columns:
            raise DataError("a ranker needs at least one feature column; declare features in the pipeline")
        numbers = tuple(sorted(name for name, column in columns.items() if column.dtype.kind in "fb"))
        codes = tuple(sorted(name for name, column in columns.items() if column.dtype.kind in "iu"))
        other = sorted(set(columns) - set(numbers) - set(codes))
        if other:
            raise DataError(f"feature column {other[0]!r} is {columns[other[0]].dtype}; a ranker takes floats or integer codes")
        fitted = np.array([_fit_number(np.asarray(columns[name], dtype=np.float32)) for name in numbers], dtype=np.float64).reshape(-1, 4)
        policies = _policies(numbers, missing or {})
        for name, policy in zip(numbers, policies, strict=True):
            lost = int((~np.isfinite(np.asarray(columns[name], dtype=np.float32))).sum())
            if policy == "reject" and lost:
                raise DataError(
                    f"feature column {name!r} is missing in {lost:,} of {len(columns[name]):,} training rows, and its policy is `reject`. "
                    "Repair what it is made of, or choose `impute`, `indicator` or `both` for it under `missing:` of the ranker."
                )
        flags = np.array(
            [policy == "indicator" or (policy == "both" and some > 0) for policy, some in zip(policies, fitted[:, 3], strict=True)]
        )
        kept = np.array([policy != "indicator" for policy in policies])
        rows, start = [], 0
        for name in codes:
            mapped = _fit_codes(columns[name], max_codes, min_count) + start
            start = int(mapped.max()) + 1
            rows.append(mapped.astype(np.int32))
        return Columns(
            numbers, codes, fitted[:, 0].astype(np.float32), fitted[:, 1].astype(np.float32), fitted[:, 2].astype(np.float32),
            kept.astype(np.bool_), flags.astype(np.bool_), tuple(rows),
        )  # fmt: skip

    def transform(self, columns: Mapping[str, Array]) -> tuple[Float32, Int32]:
        """(numbers float32[N, width], table rows int32[N, C]). Extra columns are ignored; a missing one is a ``DataError``."""
        absent = [name for name in (*self.numbers, *self.codes) if name not in columns]
        if absent:
            raise DataError(f"feature columns of the training are not given: {', '.join(absent)}. Give them, or train the ranker again.")
        names = (*self.numbers, *self.codes)
        size = len(columns[names[0]])
        uneven = [name for name in names if columns[name].shape != (size,)]
        if uneven:
            raise DataError(f"feature column {uneven[0]!r} has shape {columns[uneven[0]].shape}, the others ({size},)")
        raw = np.empty((len(self.numbers), size), dtype=np.float32)
        for place, name in enumerate(self.numbers):
            if columns[name].dtype.kind not in "fb":
                raise DataError(f"feature column {name!r} was trained as numbers and is now {columns[name].dtype}")
            raw[place] = columns[name]
        missing = ~np.isfinite(raw)
        raw[missing] = 0
        logged = self.log_scale > 0
        raw[logged] = _signed_log(raw[logged], self.log_scale[logged, None])
        raw -= self.center[:, None]
        raw /= self.scale[:, None]
        np.clip(raw, -CLIP, CLIP, out=raw)
        raw[missing] = 0
        out = np.concatenate([raw[self.kept], missing[self.indicator].astype(np.float32)])
        table = np.empty((size, len(self.codes)), dtype=np.int32)
        for place, (name, rows) in enumerate(zip(self.codes, self.rows, strict=True)):
            column = columns[name]
            if column.dtype.kind not in "iu":
                raise DataError(f"feature column {name!r} was trained as codes and is now {column.dtype}")
            known = (column >= 0) & (column < len(rows) - 1)
            table[:, place] = rows[np.where(known, column, len(rows) - 1)]
        return np.ascontiguousarray(out.T), table

    def state(self) -> State:
        """Everything learned, as arrays; names are JSON bytes."""
        names = json.dumps({"numbers": self.numbers, "codes": self.codes}).encode()
        state: State = {
            "names": np.frombuffer(names, dtype=np.uint8), "log_scale": self.log_scale, "center": self.center, "scale": self.scale,
            "kept": self.kept, "indicator": self.indicator,
        }  # fmt: skip
        return state | {f"rows.{place}": rows for place, rows in enumerate(self.rows)}

    @staticmethod
    def from_state(state: Mapping[str, Array]) -> Columns:
        """The inverse of ``state``."""
        names = json.loads(state["names"].tobytes())
        rows = tuple(state[f"rows.{place}"] for place in range(len(names["codes"])))
        return Columns(
            tuple(names["numbers"]), tuple(names["codes"]), state["log_scale"], state["center"], state["scale"], state["kept"],
            state["indicator"], rows,
        )  # fmt: skip


def _policies(numbers: Sequence[str], missing: Mapping[str, Missing]) -> list[Missing]:
    """The policy of each number column; ``DataError`` for a pattern that fits none, which is a slip of the pen."""
    for pattern in missing:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in numbers):
            raise DataError(f"`missing:` of the ranker: {unknown_name('number column or pattern', pattern, numbers)}")
    return [next((policy for pattern, policy in missing.items() if fnmatch.fnmatchcase(name, pattern)), "both") for name in numbers]


def _signed_log(x: Float32, scale: npt.NDArray[np.float32]) -> Float32:
    return np.asarray(np.sign(x) * np.log1p(np.abs(x) / scale), dtype=np.float32)


def _fit_number(column: Float32) -> tuple[float, float, float, bool]:
    """(log scale or 0, center, scale, whether values are missing) of one column."""
    finite = np.isfinite(column)
    values = column[finite]
    values = values[:: max(1, len(values) // SAMPLE_ROWS)].astype(np.float64)
    if len(values) == 0:
        return 0.0, 0.0, 1.0, bool(len(column))
    log_scale = 0.0
    q01, q25, q50, q75, q99 = np.quantile(values, [0.01, 0.25, 0.5, 0.75, 0.99])
    if max(q99 - q50, q50 - q01) > 4 * (q75 - q25):  # 1.7 for a normal, 3.5 for an exponential, 6.3 for a log-normal column
        size = np.abs(values[values != 0])
        log_scale = float(np.median(size))
        values = np.sign(values) * np.log1p(np.abs(values) / log_scale)
    low, high = np.quantile(values, [0.005, 0.995])
    inside = np.clip(values, low, high) if high > low else values
    scale = float(inside.std())
    return log_scale, float(inside.mean()), scale if scale > 1e-9 * (1 + abs(float(inside.mean()))) else 1.0, bool((~finite).any())


def _fit_codes(column: Array, max_codes: int, min_count: int) -> Int32:
    """For each code its row, from 1; the last entry, and every code without a row of its own, is row 0."""
    known = column[column >= 0]
    counts = np.bincount(known) if len(known) else np.zeros(0, dtype=np.int64)
    frequent = np.flatnonzero(counts >= max(1, min_count))
    frequent = frequent[np.argsort(-counts[frequent], kind="stable")[:max_codes]]
    rows = np.zeros(len(counts) + 1, dtype=np.int32)
    rows[np.sort(frequent)] = np.arange(1, len(frequent) + 1)
    return rows
