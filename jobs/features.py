"""Build the point-in-time features of the latest snapshot with Ray Data.

ray job submit --working-dir . -- python jobs/features.py --config jobs/configs/features.yaml
"""

from __future__ import annotations

from maple.cli.job import run

if __name__ == "__main__":
    run("features")
