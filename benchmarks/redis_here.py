"""A Redis of a benchmark's own, on a free port, for as long as the benchmark runs."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maple.errors import ConfigError


@contextmanager
def redis_here(folder: Path, *, durable: bool) -> Iterator[str]:
    """Its URL. ``durable``: everything is in an append-only file, on disk, before it is acknowledged; otherwise it is in memory only."""
    if shutil.which("redis-server") is None:
        raise ConfigError("this benchmark needs redis-server; install the Debian package redis-server")
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        port = int(each.getsockname()[1])
    folder.mkdir(parents=True, exist_ok=True)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "always"] if durable else ["--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                assert process.poll() is None, "redis-server did not start"
                time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
