"""Deploy the champion on Ray Serve; the service stays when the job has ended.

ray job submit --working-dir . -- python jobs/serve.py --config jobs/configs/serve.yaml
"""

from __future__ import annotations

from maple.cli.job import run

if __name__ == "__main__":
    run("serve")
