"""Moving the service to another bundle: prepare it everywhere, decide in the ledger, flip.

In this order a bundle that cannot be served changes nothing, and the ledger is the truth: whatever dies in between, the next
``follow`` brings the replicas to what it says.
"""

from __future__ import annotations

from typing import Protocol

from maple.errors import ServeError
from maple.serve.deploy import Pointer
from maple.train.release import Ledger, Release


class Replicas(Protocol):
    """The running service, as far as releases go; ``serve.deploy.Deployed`` is the one on Ray."""

    def prepare(self, digest: str) -> None:
        """Load a bundle beside the one that answers, in every replica; ``ServeError`` if one cannot, and nothing has changed."""

    def flip(self, pointer: Pointer) -> None:
        """Answer from another bundle that is prepared."""


def pointer_to(release: Release) -> Pointer:
    """What replicas are told about a release; the previous bundle stays loaded, so that rolling back is quick."""
    if release.champion is None:
        raise ServeError("nothing is released yet: publish a bundle with `maple publish`, then `maple promote` it")
    return Pointer(release.champion, release.generation, release.previous)


def promote(ledger: Ledger, replicas: Replicas | None, digest: str, *, expected_generation: int | None = None, note: str = "") -> Release:
    """Release a bundle; ``replicas`` None where the service does not run."""
    now = ledger.read()
    if replicas is not None and digest != now.champion:
        replicas.prepare(digest)
    generation = now.generation if expected_generation is None else expected_generation
    return _carry(replicas, ledger.promote(digest, expected_generation=generation, note=note))


def rollback(ledger: Ledger, replicas: Replicas | None, *, expected_generation: int | None = None, note: str = "") -> Release:
    """Back to the bundle before."""
    now = ledger.read()
    if replicas is not None and now.previous is not None:
        replicas.prepare(now.previous)
    generation = now.generation if expected_generation is None else expected_generation
    return _carry(replicas, ledger.rollback(expected_generation=generation, note=note))


def follow(ledger: Ledger, replicas: Replicas) -> Release:
    """Bring the replicas to what the ledger says now."""
    release = ledger.read()
    replicas.prepare(pointer_to(release).serve)
    return _carry(replicas, release)


def _carry(replicas: Replicas | None, release: Release) -> Release:
    if replicas is not None:
        replicas.flip(pointer_to(release))
    return release
