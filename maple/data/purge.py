"""Removing what nobody needs: snapshots, features built of them, what dead runs left; and every version that still holds deleted users.

What stays: the latest snapshot with its layers, those that trained runs name, and those that were the latest within ``grace_s``, which a
reader or an append may have open. A version that holds rows of a deleted user goes whoever names it; the latest one is compacted first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from maple.artifacts import MANIFEST, Place
from maple.data.compact import Progress, compact
from maple.data.drafts import LEFT, is_dead, pointing, sweep
from maple.data.snapshot import Snapshot, names
from maple.errors import ArtifactError

GRACE_S = 3600.0


def purge(home: Place, *, grace_s: float = GRACE_S, say: Progress | None = None) -> list[str]:
    """Remove what is not needed; the names of the removed folders, below the home."""
    removed = [f"snapshots/{name}" for name in sweep(home)]
    if not any(_finished(home / "snapshots" / name) for name in names(home)):
        return removed
    if Snapshot.open(home).holds_deleted():
        compact(home, say=say)
    with pointing(home):
        top = Snapshot.open(home)
        kept = _layers(top)
        digests = {top.digest}
        for name in names(home):
            if not _finished(home / "snapshots" / name):
                continue
            found = _opened(home, name)
            wanted = name in kept or name in set(_named_by_runs(home)) or _idle_s(home / "snapshots" / name) < grace_s
            if found is not None and wanted and (name in kept or not found.holds_deleted()):
                kept |= _layers(found)
                digests.add(found.digest)
        for name in names(home):
            if name not in kept and _finished(home / "snapshots" / name):
                _remove(home / "snapshots" / name)
                removed.append(f"snapshots/{name}")
    for folder in (home / "features").children():
        if "." in folder.name:
            continue
        stale = _meta(folder).get("snapshot") not in digests if _finished(folder) else is_dead(folder)
        if stale:
            _remove(folder)
            removed.append(f"features/{folder.name}")
    for name in removed:
        if say is not None:
            say(f"removed {name}")
    return removed


def _layers(snapshot: Snapshot) -> set[str]:
    return {layer.folder.name for layer in snapshot.stack.layers}


def _opened(home: Place, name: str) -> Snapshot | None:
    try:
        return Snapshot.open(home, name)
    except ArtifactError:  # a layer below is gone: it cannot be read by anybody
        return None


def _named_by_runs(home: Place) -> Iterable[str]:
    for folder in (home / "runs").children():
        if "." not in folder.name and _finished(folder):
            yield str(_meta(folder).get("snapshot", ""))


def _finished(folder: Place) -> bool:
    return (folder / MANIFEST).exists()


def _meta(folder: Place) -> dict[str, object]:
    try:
        return dict(json.loads((folder / MANIFEST).read())["meta"])
    except (ValueError, KeyError, TypeError):
        return {}


def _idle_s(folder: Place) -> float:
    """For how long a finished snapshot has not been the latest: since another one took its place, or since it was made if it never was."""
    made = (folder.fs.get_file_info((folder / MANIFEST).path).mtime_ns or 0) / 1e9
    try:
        since = float(json.loads((folder / LEFT).read())["at"])
    except (ArtifactError, ValueError, KeyError, TypeError):
        since = made
    return time.time() - max(made, since)


def _remove(folder: Place) -> None:
    """The manifest first: from then on it does not exist for readers."""
    (folder / MANIFEST).delete()
    folder.delete()
