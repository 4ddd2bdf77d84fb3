"""The Ray Serve deployments: thin shells that give the service its bundles, its handles and its metrics.

``Ingress`` answers HTTP and holds everything but what runs elsewhere; in the split placement ``Candidates`` and ``Ranker`` run
one segment each of the same pipeline. Every deployment gets the same pointer as ``user_config`` and holds two bundles at most.
A replica that serves never dies of a bundle that it cannot load: it reports it (``pointer``) and goes on with what it has.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from ray.serve.handle import DeploymentHandle

from maple.artifacts import Place
from maple.clock import SteadyClock
from maple.errors import ArtifactError, MapleError, ServeError
from maple.recommend.bundle import Bundle, cache_locally, load
from maple.recommend.engine import Candidates, Deadline, Pipeline, Query, RemoteSegment, Segment, SegmentResult
from maple.recommend.live import LiveBundle
from maple.serve.http import create_app
from maple.serve.live import LiveCatalogue, Poller
from maple.serve.meter import RayMeter
from maple.serve.service import Held, LocalService
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_live, open_store

log = logging.getLogger("maple.serve")

Step = Literal["retrieve", "rank"]
T = TypeVar("T")


class Shelf(Generic[T]):
    """The bundles one replica holds ready, and the pointer it follows.

    Serve takes a replica out of the routing while ``reconfigure`` runs. So only the first pointer is awaited (a replica without a
    bundle is of no use); later ones are followed in the background, in order, while the replica goes on answering.
    """

    def __init__(self, settings: ServeSettings, prepare: Callable[[Bundle], T], took: Callable[[dict[str, T], str, int], None]) -> None:
        self.home = Place.at(settings.home)
        self.cache = settings.local_bundles or str(Path(tempfile.gettempdir()) / "maple-bundles")
        self.prepare, self.took = prepare, took
        self.ready: dict[str, T] = {}
        self.failed: dict[str, str] = {}
        self.serving, self.generation = "", -1
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def reconfigure(self, pointer: Mapping[str, Any]) -> None:
        """Follow a pointer; raises ``ArtifactError`` only where nothing is held that could answer instead."""
        if not self.ready:
            await self._follow(pointer)
            return
        task = asyncio.get_running_loop().create_task(self._follow(pointer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, pointer: Mapping[str, Any]) -> None:
        async with self._turn:  # one after the other, in the order they came
            wanted = [digest for digest in (pointer["serve"], pointer["also"]) if digest]
            failed: dict[str, str] = {}
            for digest in wanted:
                if digest not in self.ready:
                    try:
                        self.ready[digest] = await asyncio.to_thread(self._load, digest)
                    except Exception as error:
                        failed[digest] = str(error) if isinstance(error, MapleError) else f"{type(error).__name__}: {error}"
                        log.error("bundle %s cannot be served: %s", digest[:12], failed[digest])
            self.failed = failed
            if pointer["serve"] not in self.ready:
                if not self.ready:
                    raise ArtifactError(failed[pointer["serve"]])
                return
            self.ready = {digest: ready for digest, ready in self.ready.items() if digest in wanted}
            await asyncio.to_thread(self.took, self.ready, pointer["serve"], int(pointer["generation"]))
            self.serving, self.generation = pointer["serve"], int(pointer["generation"])

    def _load(self, digest: str) -> T:
        """Verified, asked its canaries, and made ready."""
        return self.prepare(load(Place.at(cache_locally(self.home, digest, self.cache)), digest))

    def state(self) -> dict[str, Any]:
        """What this replica answers from, holds, and could not load."""
        return {"serve": self.serving, "generation": self.generation, "held": list(self.ready), "failed": dict(self.failed)}


@dataclass(frozen=True, eq=False)
class Laid:
    """A bundle over the live catalogue, and its pipeline; ``stamp``: of which state of the catalogue."""

    bundle: LiveBundle
    pipeline: Pipeline
    stamp: int


@dataclass(frozen=True)
class Asked:
    """Over what an ingress asks: a bundle, with at least a version of the live items, of which it knows ``size`` with the bundle's own."""

    digest: str
    version: int
    size: int


class Segments:
    """Runs one segment of the pipeline for the ingress, on whichever bundle the request names."""

    def __init__(self, args: dict[str, Any], step: Step) -> None:
        settings = ServeSettings.parse(args, "serve arguments")
        clock, offset = SteadyClock(), int(settings.clock_offset_s * 1e6)
        self.step, self.meter = step, RayMeter()
        self.live = LiveCatalogue(open_live(settings), lambda: clock.now() + offset)
        self.live.poll()
        self.shelf: Shelf[Laid] = Shelf(settings, self._over, self._take)
        self.ready: dict[str, Laid] = {}
        self._turn = threading.Lock()
        self.poller = Poller(self.refresh, settings.live_poll_s)
        self.threads = ThreadPoolExecutor(settings.threads, "maple-compute")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take up a pointer."""
        await self.shelf.reconfigure(user_config)

    def pointer(self) -> dict[str, Any]:
        """What this replica holds, for whoever releases."""
        return self.shelf.state()

    def refresh(self) -> None:
        """Read the live items; if they have changed, the next run sees them."""
        with self._turn:
            if self.live.poll():
                self._place(self.ready)

    def _over(self, bundle: Bundle, before: LiveBundle | None = None) -> Laid:
        over, stamp = self.live.over(bundle, before)
        return Laid(over, over.pipeline(observer=self.meter), stamp)

    def _take(self, ready: Mapping[str, Laid], serving: str, generation: int) -> None:
        with self._turn:
            self._place(ready)

    def _place(self, ready: Mapping[str, Laid]) -> None:
        stamp = self.live.seen.stamp
        self.ready = {digest: laid if laid.stamp == stamp else self._over(laid.bundle.base, laid.bundle) for digest, laid in ready.items()}

    async def run(self, asked: Asked, queries: Sequence[Query], candidates: Candidates, seconds: float | None) -> SegmentResult:
        """The segment's result within ``seconds`` from now; clocks of different machines are never compared.

        The asking replica may have read the live items earlier or later than this one: what it has read is read here first, and items
        that it does not know are not proposed to it.
        """
        deadline = None if seconds is None else Deadline.after(seconds)
        loop = asyncio.get_running_loop()
        laid = self.ready.get(asked.digest)
        if laid is not None and laid.bundle.version < asked.version:
            await loop.run_in_executor(self.threads, self.refresh)
            laid = self.ready.get(asked.digest)
        if laid is None or laid.bundle.version < asked.version:
            raise ServeError(f"this replica does not hold bundle {asked.digest[:12]} with version {asked.version} of the live items")
        result = await loop.run_in_executor(self.threads, laid.pipeline.run_segment, self.step, queries, candidates, deadline)
        got = result.candidates
        return replace(result, candidates=got.keep(got.items < asked.size, self.step, "newer than the asking replica"))


class Ingress:
    """HTTP in, slates out: the service of ``serve.service`` behind the application of ``serve.http``."""

    def __init__(self, args: dict[str, Any], candidates: DeploymentHandle | None = None, ranker: DeploymentHandle | None = None) -> None:
        settings = ServeSettings.parse(args, "serve arguments")
        handles: dict[Segment, DeploymentHandle] = {}
        if candidates is not None and ranker is not None:
            handles = {"retrieve": candidates, "rank": ranker}

        def remote(bundle: LiveBundle) -> Mapping[Segment, RemoteSegment] | None:
            asked = Asked(str(bundle.digest), bundle.version, len(bundle.space.items))
            return {name: far(handle, asked, with_state=name == "rank") for name, handle in handles.items()} or None

        self.service = LocalService(settings, lambda folder: open_store(settings, folder), remote=remote, meter=RayMeter())
        self.shelf: Shelf[Held] = Shelf(settings, self.service.prepare, self.service.hold)
        self.service.failed = lambda: self.shelf.failed

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.service, echo_request_id=False)  # Serve's own middleware sends the id back

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take up a pointer: load beside what answers, then flip."""
        await self.shelf.reconfigure(user_config)

    def pointer(self) -> dict[str, Any]:
        """What this replica holds, for whoever releases."""
        return self.shelf.state()


def far(handle: DeploymentHandle, asked: Asked, *, with_state: bool) -> RemoteSegment:
    """A segment on another deployment. User states travel only where features are read."""
    method = handle.options(method_name="run")

    async def call(queries: Sequence[Query], candidates: Candidates, deadline: Deadline | None) -> SegmentResult:
        sent = queries if with_state else [replace(query, state=None) for query in queries]
        result: SegmentResult = await method.remote(asked, sent, candidates, None if deadline is None else deadline.left())
        return result

    return call
