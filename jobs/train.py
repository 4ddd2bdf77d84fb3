"""Fit the sources and the ranker on what lies before the test part.

ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/train.yaml
"""

from __future__ import annotations

from maple.cli.job import run

if __name__ == "__main__":
    run("train")
