"""Leaks: a feature that knows the label, and a feature row that saw its own future.

The first shows in numbers: no honest feature tells positives from negatives almost without error. The second is found by computing
sampled rows again from a log that ends strictly before their moment, with the same reader, and comparing. Both give findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import rankdata

from maple.data.dataset import Bool, Dataset, Float32, Int32, Int64, Vocab, ragged_take
from maple.data.report import Finding, Severity
from maple.data.snapshot import Snapshot
from maple.errors import DataError
from maple.features.build import FeatureArtifact
from maple.features.catalogue import Catalogue
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.ticks import ItemTimeline, partials
from maple.hashing import rng

Float64: TypeAlias = npt.NDArray[np.float64]

KEYS = ("user_id", "timestamp", "item_id", "event")
SAMPLE = 10_000  # rows of each class that a column is measured on
LEAST = 30  # rows of each class for a verdict
BIN_ROWS = 20  # of each bin that information is measured with
AUC_LIMITS = (0.97, 0.995)  # warn, error; the times a user has bought an item, an honest feature, stays around 0.8
INFORMATION_LIMITS = (0.75, 0.9)  # warn, error: share of what there is to know of the label


# -- a feature that knows the label ------------------------------------------------------------------------------------


def label_leaks(columns: Mapping[str, Any], labels: npt.NDArray[Any], *, seed: int = 0) -> list[Finding]:
    """Columns [N] (floats, NaN = missing, or integer codes) that give away ``labels`` [N] (> 0 = positive), the worst first.

    Measured on as many rows of each class, ``SAMPLE`` at most: the area under the ROC curve of the numbers (either direction), of whether
    they are missing, and the mutual information with the label as a share of its entropy, which also sees what is not monotone.
    """
    random = rng(seed, "label leaks")
    positive = np.asarray(labels) > 0
    classes = [np.flatnonzero(positive), np.flatnonzero(~positive)]
    size = min(*(len(rows) for rows in classes), SAMPLE)
    if size < LEAST:
        return []
    rows = random.permutation(np.concatenate([random.choice(rows, size, replace=False) for rows in classes]))
    y = positive[rows]
    found: list[Finding] = []
    for name, column in sorted(columns.items()):
        found += _of_column(name, np.asarray(column)[rows], y)
    return sorted(found, key=lambda finding: (finding.severity, -(finding.value or 0)))


def _of_column(name: str, column: npt.NDArray[Any], y: Bool) -> Iterator[Finding]:
    how = "the column {0!r} tells positive from negative rows with an AUC of {1:.4f}"
    hint = "; does it hold something that is only known after the event? Build it strictly before, or leave it out."
    column = _rates(column, y) if column.dtype.kind in "iu" else column.astype(np.float64)
    there = np.isfinite(column)
    if min(int((there & y).sum()), int((there & ~y).sum())) >= LEAST:
        area = _auc(column[there], y[there])
        yield from _judged("label_leak", name, area, AUC_LIMITS, how.format(name, area) + hint)
    missing = 0.5 + abs(float(there[y].mean()) - float(there[~y].mean())) / 2
    text = f"whether the column {name!r} is missing tells positive from negative rows with an AUC of {missing:.4f}"
    yield from _judged("label_leak_missing", name, missing, AUC_LIMITS, text + hint)
    share = _information(column, there, y)
    text = f"the column {name!r} holds {share:.1%} of what there is to know of the label"
    yield from _judged("label_information", name, share, INFORMATION_LIMITS, text + hint)


def _judged(check: str, name: str, value: float, limits: tuple[float, float], message: str) -> Iterator[Finding]:
    severities: tuple[Severity, Severity] = ("warn", "error")
    passed = [(severity, limit) for severity, limit in zip(severities, limits, strict=True) if value > limit]
    if passed:
        yield Finding(check, passed[-1][0], name, message, value, passed[-1][1])


def _auc(scores: Float64, y: Bool) -> float:
    """Area under the ROC curve in the better direction, ties counted half."""
    count, other = int(y.sum()), int((~y).sum())
    area = (float(rankdata(scores)[y].sum()) - count * (count + 1) / 2) / (count * other)
    return max(area, 1 - area)


def _rates(codes: npt.NDArray[Any], y: Bool) -> Float64:
    """Each row's code as the share of positives that the other half of the rows has with it, so that no row counts for itself."""
    code = np.unique(codes, return_inverse=True)[1]
    half = np.arange(len(code)) % 2 == 0
    out = np.empty(len(code))
    for own in (half, ~half):
        seen = np.bincount(code[~own], minlength=int(code.max()) + 1)
        hits = np.bincount(code[~own], y[~own], minlength=int(code.max()) + 1)
        out[own] = ((hits + 5 * y[~own].mean()) / (seen + 5))[code[own]]
    return out


def _information(column: Float64, there: Bool, y: Bool) -> float:
    """Mutual information of the binned column (missing has a bin of its own) and the label, over the label's entropy, in [0, 1].

    Corrected for the bins that chance fills (Miller 1955): (bins - 1) / 2N.
    """
    bins = min(max(len(y) // BIN_ROWS, 2), 200)
    edges = np.unique(np.quantile(column[there], np.linspace(0, 1, bins + 1)[1:-1])) if there.any() else np.empty(0)
    cell = np.where(there, np.searchsorted(edges, column, side="right"), len(edges) + 1)
    joint = np.stack([np.bincount(cell[y == side], minlength=len(edges) + 2) for side in (False, True)]) / len(y)
    p, q = joint.sum(0), joint.sum(1, keepdims=True)
    used = joint > 0
    mutual = float((joint[used] * np.log(joint[used] / (q * p)[used])).sum()) - (int((p > 0).sum()) - 1) / (2 * len(y))
    return max(0.0, mutual / float(-(q * np.log(q)).sum()))


def refuse_leaks(findings: Sequence[Finding], say: Callable[[str], None]) -> None:
    """Say every warning; ``DataError`` where a column certainly gives the label away."""
    for finding in findings:
        if finding.severity != "error":
            say(f"{finding.severity}: {finding.message}")
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError("the ranker would learn from a leak and nothing was trained: " + " ".join(errors[:3]))


# -- a row that saw its own future -------------------------------------------------------------------------------------


def check_features(
    built: FeatureArtifact, snapshot: Snapshot, *, rows: int = 400, items: int = 40, ticks: int = 6, seed: int = 0
) -> list[Finding]:
    """Everything that can be checked of finished features: sampled user rows and item ticks computed again from a log that ends before
    them, and whether a column of the user's own pairs gives away which item was taken (against items that others took)."""
    random = rng(seed, "feature check")
    table, spec = snapshot.items(), built.spec
    buckets = random.permutation(snapshot.num_buckets)[: max(1, min(4, snapshot.num_buckets))].tolist()
    found: list[Finding] = []
    for bucket in sorted(buckets):
        stored = built.user_events([bucket])
        if stored.num_rows == 0:
            continue
        part = stored.take(pa.array(np.sort(random.permutation(stored.num_rows)[: -(-rows // len(buckets))])))
        data = Dataset.from_tables(snapshot.events([bucket]), table, targets=snapshot.targets)
        found += seen_future(part, data, spec)
        found += _pair_leaks(part, data, spec, random)
    return _worst(found + _ticks_seen_future(built, snapshot, items, ticks, random))


def seen_future(rows: pa.Table, data: Dataset, spec: FeatureSpec) -> list[Finding]:
    """Compare built feature rows (``KEYS`` and columns) of users of ``data`` with what the log strictly before each row gives."""
    time, item = np.asarray(rows["timestamp"].cast(pa.int64())), data.items.encode(rows["item_id"])
    own, paired = _truncated(data, spec, data.users.encode(rows["user_id"]), time, item)
    expected = own | paired
    found = []
    for name in rows.column_names:
        if name not in KEYS and name in expected:
            wrong = np.flatnonzero(_differ(np.asarray(rows[name], dtype=np.float32), expected[name]))
            found += _told(name, wrong, rows.num_rows, lambda row: f"item {rows['item_id'][row]} at {rows['timestamp'][row]}")
    return found


def _truncated(data: Dataset, spec: FeatureSpec, users: Int32, time: Int64, items: Int32) -> tuple[dict[str, Float32], dict[str, Float32]]:
    """User and pair columns of N rows, each from a copy of its user whose log ends strictly before its time."""
    index, offsets = ragged_take(data.offsets, users.astype(np.int64))
    copy = np.repeat(np.arange(len(users), dtype=np.int32), np.diff(offsets))
    kept = data.log.time[index] < time[copy]
    log = replace(data.log.where(index[kept]), user=copy[kept])
    names = pa.array([f"{number:09d}" for number in range(len(users))])
    copies = replace(data, users=Vocab(names), user_table=pa.table({"user_id": names}), log=log)
    bounds = np.arange(len(users) + 1, dtype=np.int64)
    return LogReader(copies, spec, Catalogue.of(data)).columns(np.arange(len(users), dtype=np.int32), time, bounds, items)


def _pair_leaks(rows: pa.Table, data: Dataset, spec: FeatureSpec, random: np.random.Generator) -> list[Finding]:
    """Built columns of the taken items against honest ones of items that other rows took, at the same user and time."""
    time, item = np.asarray(rows["timestamp"].cast(pa.int64())), data.items.encode(rows["item_id"])
    other = random.permutation(item)
    keep = np.flatnonzero(other != item)
    users = data.users.encode(rows["user_id"])[keep]
    _, paired = _truncated(data, spec, users, time[keep], other[keep])
    columns = {name: np.concatenate([np.asarray(rows[name], dtype=np.float32)[keep], column]) for name, column in paired.items()
               if name in rows.column_names}  # fmt: skip
    return label_leaks(columns, np.repeat([1, 0], len(keep)))


def _ticks_seen_future(built: FeatureArtifact, snapshot: Snapshot, items: int, ticks: int, random: np.random.Generator) -> list[Finding]:
    """Item features at sampled ticks against those of a log that ends with the tick."""
    timeline, spec = built.timeline(), built.spec
    if not len(timeline.ticks):
        return []
    active = np.flatnonzero(np.diff(timeline.offsets))
    codes = np.sort(random.permutation(active)[:items]).astype(np.int32)
    ids = timeline.catalogue.items.ids.take(pa.array(codes))
    parts = [table.filter(pc.is_in(table["item_id"], value_set=ids)) for bucket in range(snapshot.num_buckets)
             for table in (snapshot.events([bucket]),)]  # fmt: skip
    events = pa.concat_tables(parts)
    data = Dataset.from_tables(events, targets=snapshot.targets)
    found: list[Finding] = []
    for tick in sorted(random.choice(np.unique(timeline.ticks), min(ticks, len(np.unique(timeline.ticks))), replace=False).tolist()):
        early = ItemTimeline.of([partials(data.before((tick + 1) * spec.tick), spec)], spec, timeline.catalogue)
        asked = np.full(len(codes), tick, np.int64)
        now, then = timeline.at(codes, asked), early.at(codes, asked)
        for name, column in now.items():
            found += _told(name, np.flatnonzero(_differ(column, then[name])), len(codes), lambda row: f"item {ids[row]} at tick {tick}")  # noqa: B023
    return found


def _differ(built: Float32, honest: Float32) -> Bool:
    return ~np.isclose(built, honest, rtol=1e-4, atol=1e-5, equal_nan=True)


def _told(name: str, wrong: npt.NDArray[np.intp], rows: int, where: Callable[[int], str]) -> list[Finding]:
    if not len(wrong):
        return []
    share = len(wrong) / rows
    text = f"the feature {name!r} saw the future: {len(wrong):,} of {rows:,} sampled rows differ from what the log strictly before gives"
    return [Finding("saw_future", "error", name, f"{text} (first: {where(int(wrong[0]))}).", share, 0.0)]


def _worst(findings: Sequence[Finding]) -> list[Finding]:
    """One finding per check and column: the one with the greatest value."""
    best: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.check, finding.column)
        if key not in best or (finding.value or 0) > (best[key].value or 0):
            best[key] = finding
    return sorted(best.values(), key=lambda finding: (finding.severity, finding.check, finding.column))
