"""What serving costs: the fused and the split placement at 1, 8 and 32 clients, beside a bare FastAPI process on the same pipeline.

    python benchmarks/serving.py [--home MAPLE_HOME]

The bundle is the champion of the home; without one a bundle with the default pipeline is fitted on a simulated shop. Every
request asks for another user who has a history, and the clients run on the same machine, so figures are for the machine as a
whole. The response cache is off and the deadline far away, so that every answer is the whole work, as it is in the bare
process. CPU is that of all processes that serve (replicas, proxies, HAProxy), per answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from harness import row, show, upsert

from maple.artifacts import Place
from maple.cluster_ray import ray_flags
from maple.errors import MapleError
from maple.serve.load import Load, closed

COMMAND = "make bench NAME=serving"
CLIENTS = (1, 8, 32)
DEADLINE_MS = 20_000.0
BARE = "bare FastAPI/uvicorn, same pipeline"


# -- what is served ----------------------------------------------------------------------------------------------------


def champion(home: str | None) -> tuple[Path, str] | None:
    """The local home and its champion, if it has one."""
    from maple.config import maple_home
    from maple.train.release import Ledger

    place = Place.at(home or maple_home())
    if place.local is None:
        return None
    release = Ledger.open(place).read()
    return None if release.champion is None else (place.local, release.champion)


def simulated(home: Path) -> str:
    """Fit the default pipeline on a simulated shop, publish it, and load the shop's events into the online store."""
    from maple.data.dataset import Dataset
    from maple.data.simulate import clean_events, simulate
    from maple.data.splits import boundaries
    from maple.recommend.settings import default_settings
    from maple.schema import EVENT_CODES
    from maple.serve.service import folder_of
    from maple.serve.settings import ServeSettings
    from maple.serve.stores import open_store
    from maple.train.fit import fit_pipeline

    shop = simulate(0)
    events = clean_events(shop)
    data = Dataset.from_tables(events)
    cut = boundaries(data.log.time[data.log.event == EVENT_CODES["purchase"]])
    bundle = fit_pipeline(data, default_settings(), cut, fingerprint="simulated shop, seed 0").bundle
    digest = bundle.save(Place.at(home))
    store = open_store(ServeSettings(home=str(home)), folder_of(bundle))
    store.backfill(events)
    store.close()
    return digest


def users_of(home: Path, limit: int = 5000) -> list[str]:
    """Users with a history, in a fixed order that has nothing to do with how much they bought."""
    connection = sqlite3.connect(f"file:{home / 'online.sqlite'}?mode=ro", uri=True)
    found = [str(user) for (user,) in connection.execute("SELECT DISTINCT user_id FROM events ORDER BY user_id LIMIT ?", (limit,))]
    connection.close()
    if not found:
        raise SystemExit(f"{home / 'online.sqlite'} has no users; run `maple demo` first, or leave --home out")
    return found


# -- the bare process --------------------------------------------------------------------------------------------------


def serve_bare(home: Path, digest: str, port: int) -> None:
    """What one would write by hand: one FastAPI handler around the same store and the same pipeline object. Never returns."""
    from concurrent.futures import ThreadPoolExecutor

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from maple.recommend.bundle import load
    from maple.schema import EVENT_TYPES
    from maple.serve.service import folder_of
    from maple.serve.settings import ServeSettings
    from maple.serve.stores import open_store

    bundle = load(Place.at(home), digest)
    pipeline, folder = bundle.pipeline(), folder_of(bundle)
    store = open_store(ServeSettings(home=str(home)), folder)
    threads = ThreadPoolExecutor(2)
    app = FastAPI()

    class Asked(BaseModel):
        user_id: str
        k: int = 10

    def answer(asked: Asked) -> list[dict[str, Any]]:
        state = store.get([asked.user_id], folder)[asked.user_id]
        history = [
            (item, EVENT_TYPES[event], at)
            for item, event, at in zip(state.items, state.events.tolist(), state.times.tolist(), strict=True)
        ]  # fmt: skip
        query = bundle.query(asked.user_id, now=time.time_ns() // 1000, k=asked.k, history=history, state=state)
        (items,) = bundle.decode(pipeline.run([query], explain=True))
        return [
            {"item_id": one.item_id, "score": one.score, "source": one.source, "title": one.title, "why": one.reason.text} for one in items
        ]

    async def recommend(asked: Asked) -> dict[str, Any]:
        items = await asyncio.get_running_loop().run_in_executor(threads, answer, asked)
        return {"bundle": digest, "degraded": [], "latency_ms": {}, "items": items}

    recommend.__annotations__ = {"asked": Asked, "return": dict[str, Any]}  # the class is local; FastAPI wants the class itself
    app.post("/v1/recommendations")(recommend)
    app.get("/healthz")(lambda: {"status": "ok"})
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


@contextmanager
def bare(home: Path, digest: str) -> Iterator[tuple[str, Callable[[], list[psutil.Process]]]]:
    """The bare process, ready: its URL, and its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--bare", str(port), "--home", str(home), "--digest", digest]
    process = subprocess.Popen(command, env={**os.environ, **ray_flags(), "OMP_NUM_THREADS": "1"})  # as replicas have it
    try:
        url = f"http://127.0.0.1:{port}"
        _until_healthy(url, process)
        yield url, lambda: [psutil.Process(process.pid)]
    finally:
        process.terminate()
        process.wait(20)


def _until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the bare process did not come up")


# -- Maple -------------------------------------------------------------------------------------------------------------


@contextmanager
def maple(home: Path, digest: str, placement: str) -> Iterator[tuple[str, Callable[[], list[psutil.Process]]]]:
    """Maple on the running local cluster, without response cache: its URL, and the processes that serve."""
    from maple.serve import deploy

    address = deploy.deploy(placement, {"home": str(home), "cache": {"size": 0}, "deadline_ms": DEADLINE_MS}, deploy.Pointer(digest, 1))
    try:
        yield address.url, serving_processes
    finally:
        deploy.shutdown()


def serving_processes() -> list[psutil.Process]:
    """Replicas, proxies and HAProxy of this process's own cluster, by their titles; others on this machine do not count."""
    titles = ("ray::ServeReplica", "ray::ProxyActor", "ray::HAProxyManager")
    config = f"{Path(os.environ['RAY_SERVE_HAPROXY_CONFIG_FILE_LOC']).parent}/"  # start_local has put it below the cluster's folder
    workers = psutil.Process().children(recursive=True)  # the head is a child; HAProxy may have left its tree
    found = [process for process in workers if " ".join(_command(process)).startswith(titles)]
    return found + [process for process in psutil.process_iter() if any(config in part for part in _command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended, or is somebody else's
        return []


def cpu_seconds(processes: list[psutil.Process]) -> dict[int, float]:
    """CPU seconds so far by process; one that ended meanwhile is left out."""
    out: dict[int, float] = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            out[process.pid] = times.user + times.system
    return out


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(url: str, users: list[str], processes: Callable[[], list[psutil.Process]], clients: int, requests: int) -> tuple[Load, float]:
    """A closed loop of ``clients`` after a short warm-up, and the CPU milliseconds per answer, of whatever serves at its end."""
    target = f"{url}/v1/recommendations"
    asked = itertools.cycle(users)
    asyncio.run(closed(target, lambda number: {"user_id": next(asked), "k": 10}, clients=clients, requests=max(20, requests // 10)))
    before = cpu_seconds(processes())
    load = asyncio.run(closed(target, lambda number: {"user_id": next(asked), "k": 10}, clients=clients, requests=requests))
    spent = sum(seconds - before.get(pid, 0.0) for pid, seconds in cpu_seconds(processes()).items())
    if set(load.statuses) != {200}:
        print(f"  note: statuses {dict(load.statuses)}")
    if load.degraded:
        print(f"  note: {load.degraded} of {len(load.answers)} answers were degraded")
    return load, spent / len(load.answers) * 1e3


def figures(load: Load, cpu: float) -> dict[str, tuple[float, str]]:
    return {
        "throughput": (load.throughput, "requests/s"),
        "p50": (load.percentile(50), "ms"),
        "p99": (load.percentile(99), "ms"),
        "cpu-ms": (cpu, "ms/request"),
    }


def run(home: Path, digest: str, requests: int, placements: tuple[str, ...] = ("fused", "split")) -> list[dict[str, Any]]:
    """All rows. Starts a local Ray of its own and ends it."""
    from maple.cluster_ray import start_local, stop_local

    users = users_of(home)
    asked = {clients: requests if clients > 1 else requests // 2 for clients in CLIENTS}
    reference: dict[int, dict[str, tuple[float, str]]] = {}
    with bare(home, digest) as (url, processes):
        for clients in CLIENTS:
            print(f"bare, {clients} clients")
            reference[clients] = figures(*measure(url, users, processes, clients, asked[clients]))
    rows = []
    start_local(dashboard=True, test=True)
    try:
        for placement in placements:
            with maple(home, digest, placement) as (url, processes):
                for clients in CLIENTS:
                    print(f"{placement}, {clients} clients")
                    for name, (value, unit) in figures(*measure(url, users, processes, clients, asked[clients])).items():
                        rows.append(row(f"serving/{placement}/c{clients}/{name}", value, unit, BARE, reference[clients][name][0], COMMAND))
    finally:
        stop_local()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", help="a Maple home with a champion and a filled online store")
    parser.add_argument("--requests", type=int, default=1000, help="per measurement; half as many with one client")
    parser.add_argument("--dry", action="store_true", help="print the table, write nothing")
    parser.add_argument("--bare", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--digest", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        serve_bare(Path(args.home), args.digest, args.bare)
        return
    found = champion(args.home)
    with tempfile.TemporaryDirectory() as scratch:
        if found is None and args.home is not None:
            raise SystemExit(f"{args.home} has no champion; run `maple demo` with that home first, or leave --home out")
        home, digest = found or (Path(scratch), simulated(Path(scratch)))
        rows = run(home, digest, args.requests)
    show(rows)
    if not args.dry:
        print(f"written to {upsert('serving', rows)}")


if __name__ == "__main__":
    try:
        main()
    except MapleError as error:
        raise SystemExit(str(error)) from None
