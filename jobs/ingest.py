"""Read a source, validate it, and publish an immutable snapshot.

ray job submit --working-dir . -- python jobs/ingest.py --config jobs/configs/ingest.yaml
"""

from __future__ import annotations

from maple.cli.job import run

if __name__ == "__main__":
    run("ingest")
