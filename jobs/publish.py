"""Refit on everything up to now, register the result as one immutable bundle, and release it.

ray job submit --working-dir . -- python jobs/publish.py --config jobs/configs/publish.yaml
"""

from __future__ import annotations

from maple.cli.job import run

if __name__ == "__main__":
    run("publish")
