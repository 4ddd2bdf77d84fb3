"""Ask ranx for per-user metrics: JSON {qrels, run, metrics} on stdin, JSON {metric: {user: value}} on stdout.

A process of its own, because ranx compiles for most of a minute with numba's compiler on and needs none with it off.
"""

from __future__ import annotations

import json
import sys

import ranx

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    run = ranx.Run(asked["run"])
    ranx.evaluate(ranx.Qrels(asked["qrels"]), run, asked["metrics"], make_comparable=True)
    json.dump({name: {user: float(value) for user, value in run.scores[name].items()} for name in asked["metrics"]}, sys.stdout)
