"""Measure the trained pipeline and its sources on the test part.

ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/configs/evaluate.yaml
"""

from __future__ import annotations

from maple.cli.job import run

if __name__ == "__main__":
    run("evaluate")
