"""How far a column's distribution moved from its parent's: the population stability index over bins of the parent.

PSI = sum over bins of (q - p) ln(q / p) (Siddiqi 2006), p and q the shares of the parent and of the new rows, each smoothed by half a
row per bin, so that an empty bin never gives an infinite index. By convention below 0.1 is stable, above 0.25 is another population.
Without any drift the index is not 0 but about (bins - 1) (1/n + 1/m) (Yurdakul 2018): that is reported as ``noise``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maple.data.profile import ColumnProfile, bin_edges

GROUPS = 10  # of numbers: about deciles of the parent
TOP_TEXTS = 20  # texts with a bin of their own; the others share one
PSEUDO_COUNT = 0.5


@dataclass(frozen=True)
class Psi:
    """The index, what chance alone gives on average, the bins compared, and where most of it comes from, in words."""

    value: float
    noise: float
    bins: int
    told: str


def psi(parent: ColumnProfile, now: ColumnProfile) -> Psi | None:
    """The index of a number or text column; None where it says nothing: other kinds, no rows, too many distinct texts."""
    if parent.kind != now.kind:
        return None
    if parent.kind == "number":
        labels, before, after = _numbers(parent.bins, now.bins)
    elif parent.kind == "text" and parent.complete and now.complete:
        labels, before, after = _texts(parent.values, now.values)
    else:
        return None
    if not before.sum() or not after.sum() or len(before) < 2:
        return None
    value, parts = index(before, after)
    most = int(np.argmax(parts))
    shares = (before[most] / before.sum(), after[most] / after.sum())
    told = f"most of it: {labels[most]} is {shares[1]:.1%} of the rows and was {shares[0]:.1%}"
    return Psi(value, (len(before) - 1) * (1 / float(before.sum()) + 1 / float(after.sum())), len(before), told)


def index(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> tuple[float, npt.NDArray[np.float64]]:
    """The index of two histograms over the same bins, and each bin's part of it."""
    p, q = ((counts + PSEUDO_COUNT) / (counts.sum() + PSEUDO_COUNT * len(counts)) for counts in (before, after))
    parts = (q - p) * np.log(q / p)
    return float(parts.sum()), parts


def _numbers(before: Mapping[int, int], after: Mapping[int, int]) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Log bins joined to groups of about a tenth of the parent's rows each."""
    codes = sorted({*before, *after})
    p, q = (np.array([counts.get(code, 0) for code in codes], np.int64) for counts in (before, after))
    middle = np.cumsum(p) - p / 2
    group = np.minimum((middle / max(int(p.sum()), 1) * GROUPS).astype(np.int64), GROUPS - 1)
    group = np.unique(group, return_inverse=True)[1]
    labels = []
    for number in range(int(group.max(initial=-1)) + 1):
        own = np.flatnonzero(group == number)
        labels.append(f"{bin_edges(codes[own[0]])[0]:g} to {bin_edges(codes[own[-1]])[1]:g}")
    return labels, np.bincount(group, p).astype(np.int64), np.bincount(group, q).astype(np.int64)


def _texts(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The most frequent texts of the parent, and all others together."""
    names = sorted(before, key=lambda name: (-before[name], name))[:TOP_TEXTS]
    p, q = ([counts.get(name, 0) for name in names] for counts in (before, after))
    rest = (sum(before.values()) - sum(p), sum(after.values()) - sum(q))
    return [*(repr(name) for name in names), "any other value"], np.array([*p, rest[0]], np.int64), np.array([*q, rest[1]], np.int64)
