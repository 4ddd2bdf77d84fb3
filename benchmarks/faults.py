"""Faults made on purpose, and whether what is promised holds: rows ``faults/NN`` of ``results/faults.json``, 1 = holds.

A fault is a function ``fault_NN(scratch) -> Outcome`` in one of ``MODULES``: it says what is expected and what was measured, and whether
that is what was promised. Counts are hard; latencies are compared with the same run's own baseline.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import row, show, upsert

MODULES = ("faults_events", "faults_drift", "faults_etl")


@dataclass(frozen=True)
class Outcome:
    """What a fault showed, in words and as a verdict."""

    holds: bool
    expected: str
    measured: str


def faults() -> dict[int, Callable[[Path], Outcome]]:
    """The faults by their number."""
    found: dict[int, Callable[[Path], Outcome]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        found |= {int(each.removeprefix("fault_")): getattr(module, each) for each in dir(module) if each.startswith("fault_")}
    return dict(sorted(found.items()))


def main() -> None:
    """Run the faults asked for and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, action="append", help="the number of one fault (may be repeated); default: all")
    args = parser.parse_args()
    known = faults()
    chosen = args.only or list(known)
    if len(chosen) > 1:  # a process has one cluster in its life, so each fault has a process of its own
        for number in chosen:
            subprocess.run([sys.executable, __file__, "--only", str(number)], check=True)
        return
    for number in chosen:
        fault = known[number]
        with tempfile.TemporaryDirectory(prefix="maple-fault-") as folder:
            outcome = fault(Path(folder))
        command = f"python benchmarks/faults.py --only {number}"
        made = row(f"faults/{number}", float(outcome.holds), "1 = holds", (fault.__doc__ or "").split("\n")[0], None, command)
        made |= {"expected": outcome.expected, "measured": outcome.measured}
        upsert("faults", [made])
        show([made])
        print(f"  expected: {outcome.expected}\n  measured: {outcome.measured}")


if __name__ == "__main__":
    main()
