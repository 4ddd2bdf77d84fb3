"""The snapshots of a home: a list of them, and what differs between two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import MANIFEST, Place, latest
from maple.data.history import changed, row_keys
from maple.data.layers import joined
from maple.data.snapshot import Snapshot, names
from maple.errors import ArtifactError


@dataclass(frozen=True)
class Version:
    """One snapshot in a list. ``bytes`` are of its own files; ``events`` of all its layers; ``unreadable``: why not, if so."""

    name: str
    parent: str | None
    created: str
    source: str
    events: int
    bytes: int
    layers: int
    latest: bool
    unreadable: str = ""


def versions(home: Place) -> list[Version]:
    """The finished snapshots of a home, oldest first."""
    out = []
    newest = latest(home, "snapshot") if (home / "snapshots/latest.json").exists() else ""
    for name in names(home):
        stamp = name.split("-")[0]
        created = f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]}:{stamp[13:15]}"
        last = newest == name
        try:
            snapshot = Snapshot.open(home, name)
            events = snapshot.num_events
        except ArtifactError as error:
            if (home / "snapshots" / name / MANIFEST).exists():  # else half-made
                out.append(Version(name, None, created, "", 0, 0, 0, last, str(error)))
            continue
        source = str(snapshot.manifest.meta["source"]["name"])
        sizes = snapshot.stack.num_bytes
        out.append(Version(name, snapshot.parent, created, source, events, sizes[-1], len(sizes), last))
    return out


@dataclass(frozen=True)
class Difference:
    """From one snapshot to another: rows by event id within their user, users with events, items, columns.

    ``kinds`` and ``days``: (added, removed) events by kind and by day (UTC). ``columns``: event columns that came, went or changed type.
    """

    added: int
    removed: int
    changed: int
    users_added: int
    users_removed: int
    items_added: int
    items_removed: int
    items_changed: int
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    days: dict[str, tuple[int, int]] = field(default_factory=dict)
    columns: tuple[str, ...] = ()


def diff(before: Snapshot, now: Snapshot) -> Difference:
    """What differs from ``before`` to ``now``. Memory: about two buckets of the one with fewer."""
    totals: Counter[str] = Counter()
    kinds: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    days: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for old, new in _pairs(before, now):
        come, gone = changed(old, new)
        both = pc.is_in(row_keys(come), value_set=row_keys(gone))
        again = pc.is_in(row_keys(gone), value_set=row_keys(come))
        totals["changed"] += int(pc.sum(both).as_py() or 0)
        for side, (name, rows) in enumerate((("added", come.filter(pc.invert(both))), ("removed", gone.filter(pc.invert(again))))):
            totals[name] += rows.num_rows
            kinds[side].update(rows["event"].to_pylist())
            days[side].update(pc.strftime(rows["timestamp"], "%Y-%m-%d").to_pylist())
        users_old, users_new = pc.unique(old["user_id"]), pc.unique(new["user_id"])
        totals["users_added"] += _missing(users_new, users_old)
        totals["users_removed"] += _missing(users_old, users_new)
    one, other = before.items(), now.items()
    came, went = changed(one, other, ("item_id",))
    items_added, items_removed = (_missing(a["item_id"].combine_chunks(), b["item_id"]) for a, b in ((other, one), (one, other)))
    assert went.num_rows >= items_removed
    schemas = {field.name: field.type for field in before.stack.schema()}, {field.name: field.type for field in now.stack.schema()}
    columns = [f"+ {name} ({kind})" for name, kind in schemas[1].items() if name not in schemas[0]]
    columns += [f"- {name} ({kind})" for name, kind in schemas[0].items() if name not in schemas[1]]
    columns += [f"{name}: {kind} -> {schemas[1][name]}" for name, kind in schemas[0].items() if schemas[1].get(name, kind) != kind]
    return Difference(
        totals["added"], totals["removed"], totals["changed"], totals["users_added"], totals["users_removed"],
        items_added, items_removed, came.num_rows - items_added, _both(kinds), _both(days), tuple(columns),
    )  # fmt: skip


def _pairs(before: Snapshot, now: Snapshot) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The events of the same users in both: bucket b of n is what lies in the buckets b, b + n, b + 2n ... of more."""
    count = min(before.num_buckets, now.num_buckets)
    for bucket in range(count):
        old, new = (joined([each.events([part]) for part in range(bucket, each.num_buckets, count)]) for each in (before, now))
        yield old, new


def _missing(ids: pa.Array, among: pa.Array | pa.ChunkedArray) -> int:
    known = among.combine_chunks() if isinstance(among, pa.ChunkedArray) else among
    return int(pc.sum(pc.invert(pc.is_in(ids, value_set=known))).as_py() or 0)


def _both(counts: tuple[Counter[str], Counter[str]]) -> dict[str, tuple[int, int]]:
    return {name: (counts[0][name], counts[1][name]) for name in sorted({*counts[0], *counts[1]})}
