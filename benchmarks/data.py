"""Data and features: scale, incremental ingest, stores, parity, deletion, bad files. One part after the other: ``--only NAME``.

Every part is a module ``data_<part>.py`` with ``run(scratch) -> rows``; rows go to ``results/data.json``.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import show, upsert

PARTS = ("scale", "incremental", "kill", "files", "parity", "store", "deletion")


def main() -> None:
    """Run the parts asked for and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part (may be repeated); default: all")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for large files; default: a temporary one")
    args = parser.parse_args()
    parts = args.only or PARTS
    if len(parts) > 1:  # a process has one cluster in its life, so each part has a process of its own
        scratch = [] if args.scratch is None else ["--scratch", str(args.scratch)]
        for part in parts:
            subprocess.run([sys.executable, __file__, "--only", part, *scratch], check=True)
        return
    for part in parts:
        module = importlib.import_module(f"data_{part}")
        with tempfile.TemporaryDirectory(prefix="maple-bench-", dir=args.scratch) as folder:
            rows = module.run(Path(folder))
        upsert("data", rows)
        show(rows)


if __name__ == "__main__":
    main()
