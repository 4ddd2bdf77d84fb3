"""A step as a Ray job: settings from a YAML page, on the cluster that the job runs on, and one line of JSON as its last word.

The scripts in ``jobs/`` are one call into this. The last line of standard output is ``{"step", "seconds", "summary", "facts"}``; where
the step refuses, it is ``{"step", "error", "message"}`` and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from maple.errors import MapleError


def run(step: str, arguments: Sequence[str] | None = None) -> None:
    """Run one step of ``maple.steps`` with the settings of ``--config``; ends the process with 1 on an error of the user's."""
    parser = argparse.ArgumentParser(description=f"Maple's step `{step}` on a Ray cluster.")
    parser.add_argument("--config", required=True, help="run settings (YAML); see jobs/configs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, dotted: --set tune.random_trials=8")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        from maple import steps
        from maple.cluster_ray import attach
        from maple.run import run_config

        function, _ = steps.STEPS[step]
        config = run_config(given.config, None, given.set)
        attach()
        result = function(config, _say)
    except MapleError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        _last_word({"step": step, "error": type(error).__name__, "message": str(error)})
        sys.exit(1)
    for line in result.details:
        print(line)
    _last_word({"step": step, "seconds": round(time.monotonic() - started, 1), "summary": result.summary, "facts": dict(result.facts)})


def _say(text: str) -> None:
    print(text, flush=True)


def _last_word(facts: dict[str, object]) -> None:
    print(json.dumps(facts), flush=True)
