"""The Ray Serve deployments: thin shells that give the service its bundles, its handles and its metrics.

``Ingress`` answers HTTP and holds everything but what runs elsewhere; in the split placement ``Candidates`` and ``Ranker`` run
one segment each of the same pipeline. Every deployment gets the same pointer as ``user_config`` and holds two bundles at most.
A replica that serves never dies of a bundle that it cannot load: it reports it (``pointer``) and goes on with what it has.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from ray.serve.handle import DeploymentHandle

from maple.artifacts import Place
from maple.errors import ArtifactError, ServeError
from maple.recommend.bundle import Bundle, cache_locally, load
from maple.recommend.engine import Candidates, Deadline, Pipeline, Query, RemoteSegment, Segment, SegmentResult
from maple.serve.http import create_app
from maple.serve.meter import RayMeter
from maple.serve.service import Held, LocalService
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_store

log = logging.getLogger("maple.serve")

Step = Literal["retrieve", "rank"]
T = TypeVar("T")


class Shelf(Generic[T]):
    """The bundles a replica holds, made ready by ``prepare``: filled and emptied by pointers, idempotent."""

    def __init__(self, settings: ServeSettings) -> None:
        self.home = Place.at(settings.home)
        self.cache = settings.local_bundles or str(Path(tempfile.gettempdir()) / "maple-bundles")
        self.ready: dict[str, T] = {}
        self.failed: dict[str, str] = {}

    def load(self, digest: str) -> Bundle:
        """The bundle, verified and asked its canaries."""
        return load(Place.at(cache_locally(self.home, digest, self.cache)), digest)

    async def follow(self, pointer: Mapping[str, Any], prepare: Any) -> str:
        """Hold what the pointer names, load what is missing in a thread, drop the rest; the digest that is to answer.

        Raises ``ArtifactError`` only where nothing is held that could answer instead.
        """
        wanted = [pointer["serve"], *([pointer["also"]] if pointer.get("also") else [])]
        failed: dict[str, str] = {}
        for digest in wanted:
            if digest in self.ready:
                continue
            try:
                self.ready[digest] = await asyncio.to_thread(prepare, digest)
            except Exception as error:
                failed[digest] = f"{type(error).__name__}: {error}" if not isinstance(error, ArtifactError) else str(error)
                log.error("bundle %s cannot be served: %s", digest[:12], failed[digest])
        self.failed = failed
        if pointer["serve"] in self.ready:
            keep = set(wanted)
        elif self.ready:
            keep = set(self.ready)
        else:
            raise ArtifactError(failed[pointer["serve"]])
        self.ready = {digest: ready for digest, ready in self.ready.items() if digest in keep}
        return pointer["serve"] if pointer["serve"] in self.ready else ""


class Segments:
    """Runs one segment of the pipeline for the ingress, on whichever bundle the request names."""

    def __init__(self, args: dict[str, Any], step: Step) -> None:
        self.settings = ServeSettings.parse(args, "serve arguments")
        self.step = step
        self.shelf: Shelf[Pipeline] = Shelf(self.settings)
        self.meter = RayMeter()
        self.serving = ""
        self.threads = ThreadPoolExecutor(self.settings.threads, "maple-compute")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take up a pointer."""
        self.serving = await self.shelf.follow(user_config, self._prepare) or self.serving

    def _prepare(self, digest: str) -> Pipeline:
        return self.shelf.load(digest).pipeline(observer=self.meter)

    def pointer(self) -> dict[str, Any]:
        """What this replica holds, for whoever promotes."""
        return {"serve": self.serving, "held": list(self.shelf.ready), "failed": dict(self.shelf.failed)}

    async def run(self, digest: str, queries: Sequence[Query], candidates: Candidates, seconds: float | None) -> SegmentResult:
        """The segment's result within ``seconds`` from now; clocks of different machines are never compared."""
        pipeline = self.shelf.ready.get(digest)
        if pipeline is None:
            raise ServeError(f"this replica does not hold bundle {digest[:12]}")
        deadline = None if seconds is None else Deadline.after(seconds)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, pipeline.run_segment, self.step, queries, candidates, deadline)


class Ingress:
    """HTTP in, slates out: the service of ``serve.service`` behind the application of ``serve.http``."""

    def __init__(self, args: dict[str, Any], candidates: DeploymentHandle | None = None, ranker: DeploymentHandle | None = None) -> None:
        settings = ServeSettings.parse(args, "serve arguments")
        self.shelf: Shelf[Held] = Shelf(settings)
        handles: dict[Segment, DeploymentHandle] = {}
        if candidates is not None and ranker is not None:
            handles = {"retrieve": candidates, "rank": ranker}

        def remote(digest: str) -> Mapping[Segment, RemoteSegment] | None:
            return {name: far(handle, digest, with_state=name == "rank") for name, handle in handles.items()} or None

        self.service = LocalService(settings, lambda folder: open_store(settings, folder), remote=remote, meter=RayMeter())

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.service, echo_request_id=False)  # Serve's own middleware sends the id back

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take up a pointer: load beside what answers, then flip."""
        serve_digest = await self.shelf.follow(user_config, lambda digest: self.service.prepare(self.shelf.load(digest)))
        self.service.failed = self.shelf.failed
        if serve_digest:
            self.service.hold(self.shelf.ready, serve_digest, int(user_config["generation"]))

    def pointer(self) -> dict[str, Any]:
        """What this replica holds, for whoever promotes."""
        held = self.service.held
        return {"serve": held[0] if held else "", "held": held, "failed": dict(self.service.failed)}


def far(handle: DeploymentHandle, digest: str, *, with_state: bool) -> RemoteSegment:
    """A segment on another deployment. User states travel only where features are read."""
    method = handle.options(method_name="run")

    async def call(queries: Sequence[Query], candidates: Candidates, deadline: Deadline | None) -> SegmentResult:
        sent = queries if with_state else [replace(query, state=None) for query in queries]
        result: SegmentResult = await method.remote(digest, sent, candidates, None if deadline is None else deadline.left())
        return result

    return call
