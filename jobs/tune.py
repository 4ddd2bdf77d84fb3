"""Search hyper-parameters with Ray Tune on the validation part; an unfinished search goes on where it was.

ray job submit --working-dir . -- python jobs/tune.py --config jobs/configs/tune.yaml
"""

from __future__ import annotations

from maple.cli.job import run

if __name__ == "__main__":
    run("tune")
