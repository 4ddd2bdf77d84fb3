"""What every benchmark shares: rows with their circumstances, a printed table, and results files updated by row name."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).with_name("results")


def hardware() -> str:
    """Processors, memory and platform, in words."""
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{os.cpu_count()} CPU, {memory} GiB, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """The short hash of the checkout, with ``+`` where tracked files differ from it."""
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True).stdout
    outside = [line for line in changed.splitlines() if "benchmarks/results/" not in line]
    return head.stdout.strip() + ("+" if outside else "")


def data_folder() -> Path:
    """Where the data sets are: ``MAPLE_DATA``, by default ``../shared/data``."""
    return Path(os.environ.get("MAPLE_DATA", "../shared/data")).absolute()


def row(name: str, value: float, unit: str, reference: str, reference_value: float | None, command: str) -> dict[str, Any]:
    """One result. ``reference`` says what ``reference_value`` is; ``ratio`` is value over reference."""
    ratio = round(value / reference_value, 4) if reference_value else None
    return {
        "name": name, "value": round(float(value), 6), "unit": unit, "reference": reference, "reference_value": reference_value,
        "ratio": ratio, "command": command, "commit": commit(), "hardware": hardware(),
    }  # fmt: skip


def upsert(file: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows into ``results/<file>.json``, replacing those of the same name and keeping the others; sorted by name."""
    path = RESULTS / f"{file}.json"
    kept = {old["name"]: old for old in (json.loads(path.read_text()) if path.exists() else [])}
    kept |= {new["name"]: new for new in rows}
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps([kept[name] for name in sorted(kept)], indent=1) + "\n")
    draft.replace(path)
    return path


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as one aligned table."""
    cells = [("name", "value", "unit", "reference", "ratio")]
    for each in rows:
        known = each["reference_value"] is not None
        reference = f"{each['reference']} {each['reference_value']:g}" if known else each["reference"]
        cells.append(
            (each["name"], f"{each['value']:.4f}", each["unit"], reference, "" if each["ratio"] is None else f"{each['ratio']:.3f}")
        )
    widths = [max(len(line[place]) for line in cells) for place in range(5)]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
