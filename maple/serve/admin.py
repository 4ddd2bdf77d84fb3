"""The operator's interface: a process of its own on loopback, never on the public port. Status, promote, roll back."""

from __future__ import annotations

import json
from collections.abc import Callable

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response

from maple.errors import ArtifactError, MapleError
from maple.serve import rollout
from maple.serve.api import Id, RequestError, Text, Wire
from maple.serve.http import Boundary, read_request, refused
from maple.train.release import Ledger, Release

BODY_BYTES = 16 << 10


class PromoteRequest(Wire):
    """Which bundle to release, and the generation that the decision was made on."""

    digest: Id
    expected_generation: int | None = None
    note: Text = ""


class RollbackRequest(Wire):
    """Back to the bundle before, if the ledger is still at the generation that the decision was made on."""

    expected_generation: int | None = None
    note: Text = ""


def create_admin(ledger: Ledger, replicas: Callable[[], rollout.Replicas | None]) -> FastAPI:
    """The admin application over a ledger; ``replicas`` finds the running service, None where it does not run."""
    app = FastAPI(title="Maple admin", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/status")
    def status() -> Response:
        """The release now and how it came about, newest first."""
        history = [release.plain() for release in reversed(ledger.history())]
        return Response(json.dumps({"release": ledger.read().plain(), "history": history[:100]}), media_type="application/json")

    @app.post("/promote")
    async def promote(request: Request) -> Response:
        """Release a bundle: prepared in every replica, decided in the ledger, flipped."""
        wanted = await read_request(request, PromoteRequest, BODY_BYTES)
        return await _change(
            lambda: rollout.promote(ledger, replicas(), wanted.digest, expected_generation=wanted.expected_generation, note=wanted.note)
        )

    @app.post("/rollback")
    async def rollback(request: Request) -> Response:
        """Back to the bundle before."""
        wanted = await read_request(request, RollbackRequest, BODY_BYTES)
        return await _change(lambda: rollout.rollback(ledger, replicas(), expected_generation=wanted.expected_generation, note=wanted.note))

    app.exception_handler(RequestError)(refused)
    app.add_middleware(Boundary)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])  # no page of another site may speak to it
    return app


def run(home: str, port: int) -> None:
    """Serve the admin application of a home on loopback until interrupted. It changes the ledger; whoever serves follows it."""
    import uvicorn

    uvicorn.run(create_admin(Ledger.open(home), lambda: None), host="127.0.0.1", port=port, log_level="warning")


async def _change(change: Callable[[], Release]) -> Response:
    try:
        release = await run_in_threadpool(change)
    except ArtifactError as error:
        raise RequestError(422, "unusable_bundle", str(error), "digest", "look at /status and at the bundles of the home") from None
    except MapleError as error:
        raise RequestError(409, "not_changed", str(error), "", "look at /status and decide again") from None
    return Response(json.dumps(release.plain()), media_type="application/json")
