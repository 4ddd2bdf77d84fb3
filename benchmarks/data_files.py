"""Crafted bad files through the public ingestion: what is not refused, lost, or executed, and the time and memory it takes.

The files are made here and judged in a process of their own, so that its peak memory is that of judging them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bad_files
from bad_files import Case
from harness import row

COMMAND = "python benchmarks/data.py --only files"
FLIPS = 200


def run(scratch: Path) -> list[dict[str, Any]]:
    """The rows of this part; every case that does not hold is printed."""
    marker = scratch / "executed"
    refuse = _judged(bad_files.must_refuse(marker), scratch / "refuse", marker)
    account = _judged([*bad_files.must_account(), *bad_files.flipped(FLIPS)], scratch / "account", marker)
    failed = [sum(not one["holds"] for one in part) for part in (refuse, account)]
    everything = refuse + account
    for one in everything:
        if not one["holds"]:
            print(f"  {one['name']}: {one['told']}")
    return [
        row("data/bad-files/not-refused", failed[0], "files", f"of {len(refuse)} that must be refused", None, COMMAND),
        row("data/bad-files/not-accounted", failed[1], "files", f"of {len(account)} with rows to account for", None, COMMAND),
        row("data/bad-files/executed", float(marker.exists()), "1 = code ran", "pickles in extension types", None, COMMAND),
        row("data/bad-files/slowest", max(one["seconds"] for one in everything), "s", "one file", None, COMMAND),
        row(
            "data/bad-files/peak-memory",
            max(one["growth"] for one in everything),
            "MiB",
            "growth of the process by one file",
            None,
            COMMAND,
        ),
    ]


def _judged(cases: Iterator[Case] | list[Case], folder: Path, marker: Path) -> list[dict[str, Any]]:
    """Judge cases one after the other in a process of their own."""
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, str(folder), str(marker)]
    out = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as judge:
        assert judge.stdin is not None, "a pipe"
        assert judge.stdout is not None, "a pipe"
        for number, case in enumerate(cases):
            path = folder / f"case-{number}"
            path.write_bytes(case.data)
            asked = {**{name: value for name, value in vars(case).items() if name != "data"}, "data": str(path)}
            judge.stdin.write(json.dumps(asked) + "\n")
            judge.stdin.flush()
            answer = judge.stdout.readline()
            out.append(
                json.loads(answer)
                if answer
                else {"name": case.name, "holds": False, "told": "the process died", "seconds": 0.0, "growth": 0}
            )
            path.unlink()
            if not answer:
                break
        judge.stdin.close()
    return out


def _serve(folder: Path, marker: Path) -> None:
    """Answer each case on the standard input with what became of it."""
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        case = Case(**{**asked, "data": Path(asked["data"]).read_bytes()})
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before, start = _memory("VmRSS"), time.perf_counter()
        verdict = bad_files.judge(case, folder / f"judged-{number}", marker)
        seconds, growth = time.perf_counter() - start, _memory("VmHWM") - before
        answer = {"name": case.name, "holds": verdict.holds, "told": verdict.told[:500], "seconds": seconds, "growth": growth}
        print(json.dumps(answer), flush=True)


def _memory(name: str) -> int:
    """A figure of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
