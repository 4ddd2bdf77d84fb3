"""A Redis server of one's own on a free port, which may be killed and started again on the same data."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from needs import require


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


class RedisServer:
    """Runs from the start until ``stop``; ``append_only`` and ``policy`` as Redis takes them."""

    def __init__(self, folder: Path, append_only: str = "yes", policy: str = "always") -> None:
        require("redis", shutil.which("redis-server") is not None, "there is no redis-server; install the Debian package redis-server")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self._command += ["--appendonly", append_only, "--appendfsync", policy]
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers with its data loaded."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self._process.poll() is None, "redis-server did not start"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed."""
        self._process.kill()
        self._process.wait()

    def hang(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as each:
                each.sendall(b"PING\r\n")
                return each.recv(64).startswith(b"+PONG")
        except OSError:
            return False
