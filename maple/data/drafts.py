"""Snapshots in the making: a folder that says whose it is, its removal when its maker died, and the step that makes it the latest.

What has no manifest does not exist for readers, so a maker may be killed at any moment; what it leaves is removed by the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import psutil
import pyarrow.fs as pafs

from maple.artifacts import MANIFEST, Place, latest, point
from maple.errors import ArtifactError

MAKER = "making.json"
LEFT = "superseded.json"  # beside a snapshot's files: since when it is not the latest any more
ABANDONED_HOURS = 24.0  # after so long without a new file, a draft whose maker cannot be asked is taken to be dead


def new_folder(home: Place) -> Place:
    """Where a new snapshot may be made; its name says when."""
    return home / "snapshots" / f"{datetime.now(UTC):%Y%m%dT%H%M%S-%f}-{uuid.uuid4().hex[:6]}"


@contextmanager
def draft(folder: Place) -> Iterator[None]:
    """Marks a folder as a snapshot in the making; the folder is removed if the block fails, the mark when it is done."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    (folder / MAKER).write(json.dumps(mine).encode())
    try:
        yield
    except BaseException:
        folder.delete()
        raise
    (folder / MAKER).delete()


def sweep(home: Place) -> list[str]:
    """Remove what dead makers left in a home's folder of snapshots; the names of what was removed."""
    removed = []
    for folder in (home / "snapshots").children():
        if "." in folder.name:
            continue
        if (folder / MANIFEST).exists():
            (folder / MAKER).delete()  # its maker died between the manifest and this
        elif is_dead(folder):
            folder.delete()
            removed.append(folder.name)
    return removed


def tidy(folder: Place, names: Iterable[str]) -> None:
    """Remove every file of a draft but the named ones, and folders without any: what killed tasks left, and intermediate files."""
    keep = {(folder / name).path for name in (*names, MAKER)}
    for info in folder.fs.get_file_info(pafs.FileSelector(folder.path, recursive=True)):
        if info.type == pafs.FileType.File and info.path not in keep:
            folder.fs.delete_file(info.path)
    for info in folder.fs.get_file_info(pafs.FileSelector(folder.path)):
        if info.type == pafs.FileType.Directory and not any(path.startswith(info.path + "/") for path in keep):
            folder.fs.delete_dir(info.path)


def is_dead(folder: Place) -> bool:
    """Whether nobody is making an unfinished folder any more: its maker is gone, or it has not changed for a day."""
    try:
        maker = json.loads((folder / MAKER).read())
        if maker["host"] == socket.gethostname():
            process = psutil.Process(maker["pid"])
            return bool(process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - maker["started"]) > 1.0)
    except psutil.NoSuchProcess:
        return True
    except (ArtifactError, ValueError, KeyError, TypeError):
        pass  # no mark, or a torn one: age tells
    found = folder.fs.get_file_info(pafs.FileSelector(folder.path, recursive=True, allow_not_found=True))
    found.append(folder.fs.get_file_info(folder.path))
    last = max((info.mtime_ns or 0 for info in found), default=0) / 1e9
    return time.time() - last > ABANDONED_HOURS * 3600


@contextmanager
def pointing(home: Place) -> Iterator[None]:
    """While this is held nobody else on this machine changes which snapshot is the latest. On object stores nothing is held."""
    folder = home / "snapshots"
    if folder.local is None:
        yield
        return
    folder.fs.create_dir(folder.path, recursive=True)
    with open(folder.local / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def lead(home: Place, name: str) -> None:
    """Make a snapshot the latest; the one before notes since when it is not, which ``purge`` counts from. Only while ``pointing``."""
    before = latest(home, "snapshot") if (home / "snapshots/latest.json").exists() else name
    if before != name and (home / "snapshots" / before / MANIFEST).exists():
        (home / "snapshots" / before / LEFT).write(json.dumps({"at": time.time()}).encode())
    point(home, "snapshot", name)
