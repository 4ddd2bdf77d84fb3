"""The application builder that the YAML of a deployment shape names (``import_path: maple.serve.app:build``)."""

from __future__ import annotations

from typing import Any

from ray import serve

from maple.serve.nodes import Ingress, Segments
from maple.serve.settings import ServeSettings


def build(args: dict[str, Any]) -> serve.Application:
    """The graph of a placement; ``args`` are fields of ``ServeSettings``, a wrong one is a ``ConfigError`` that names it."""
    settings = ServeSettings.parse(args, "serve arguments")
    plain = settings.plain()
    ingress = serve.deployment(serve.ingress()(Ingress), name="Ingress")
    if settings.placement == "fused":
        return ingress.bind(plain)
    candidates = serve.deployment(Segments, name="Candidates").bind(plain, "retrieve")
    ranker = serve.deployment(Segments, name="Ranker").bind(plain, "rank")
    return ingress.bind(plain, candidates, ranker)
