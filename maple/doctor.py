"""What ``maple doctor`` looks at: versions, Ray's flags, ports, stores and the home; each line says ok or what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from maple.artifacts import Place
from maple.cluster_ray import ray_flags
from maple.config import maple_home
from maple.errors import MapleError

PACKAGES = ("ray", "torch", "numpy", "pyarrow", "numba", "implicit", "faiss-cpu", "mlflow", "optuna", "fastapi", "redis")
#: Below these versions there are known remote holes or wrong behaviour; see the comments in pyproject.toml.
FLOORS = {"ray": (2, 60), "mlflow": (3, 15), "pyarrow": (25,)}
PORTS = {8265: "Ray dashboard", 8000: "HTTP API", 6379: "Redis or a Ray head"}
MEMORY_FLOOR_GIB = 4


def examine() -> tuple[list[str], list[list[str]], bool]:
    """A table (header, rows) of findings and whether nothing is wrong."""
    rows: list[list[str]] = []

    def add(what: str, found: str, verdict: str = "ok") -> None:
        rows.append([what, found, verdict])

    version = sys.version_info
    add("Python", platform.python_version(), "ok" if (3, 11) <= version[:2] < (3, 13) else "use Python 3.11 or 3.12")
    for name in PACKAGES:
        add(name, *_package(name))
    _machine(add)
    for name, value in ray_flags().items():
        set_to = os.environ.get(name)
        add(name, set_to or f"{value} (from ray.env)", "ok" if set_to in (None, value) else f"ray.env says {value}")
    for port, use in PORTS.items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        add(f"port {port}", "in use" if taken else "free", f"ok ({use}; Maple chooses free ports)")
    _stores(add)
    return ["what", "found", "verdict"], rows, all(row[2].startswith("ok") for row in rows)


def _package(name: str) -> tuple[str, str]:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        optional = name == "redis"
        return "not installed", "ok (optional: pip install maple-rec[redis])" if optional else "run `make demo` or pip install -e ."
    floor = FLOORS.get(name)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    return found, "ok" if floor is None or numbers >= floor else f"needs {'.'.join(map(str, floor))} or newer"


def _machine(add: Callable[..., None]) -> None:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    add("CPU cores", str(os.cpu_count()))
    add("memory", f"{memory:.1f} GiB", "ok" if memory >= MEMORY_FLOOR_GIB else f"the demo wants {MEMORY_FLOOR_GIB} GiB")
    store = Path("/dev/shm")  # noqa: S108 - Ray's object store lives there
    free = shutil.disk_usage(store).free / 2**30 if store.exists() else 0.0
    add(str(store), f"{free:.1f} GiB free", "ok" if free >= 0.5 else "Ray's object store wants 0.5 GiB there; it falls back to slower disk")


def _stores(add: Callable[..., None]) -> None:
    home = maple_home()
    try:
        place = Place.at(home)
        probe = place / "doctor.probe"
        probe.write(b"ok")
        probe.delete()
        add("MAPLE_HOME", home)
        add("champion", _champion(place))
    except (MapleError, OSError) as error:
        add("MAPLE_HOME", home, f"cannot be written: {error}")
    with tempfile.TemporaryDirectory() as folder, sqlite3.connect(Path(folder) / "probe.db") as database:
        mode = database.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    add("SQLite", sqlite3.sqlite_version, "ok" if mode == "wal" else "WAL mode is not available on the temporary folder")


def _champion(home: Place) -> str:
    from maple.train.release import Ledger

    release = Ledger.open(home).read()
    return f"{release.champion[:12]} (generation {release.generation})" if release.champion else "none yet"
