"""The models by name: one line each. A name is resolved on use, so that a bundle without torch models never imports torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from maple.errors import ConfigError, unknown_name
from maple.models.base import Ranker, Retriever

#: Models that find items for a history, as "module:class".
MODELS: dict[str, str] = {
    "popularity": "maple.models.popularity:Popularity",
    "frequency": "maple.models.frequency:Frequency",
    "item-knn": "maple.models.knn:ItemKnn",
    "ease": "maple.models.linear:Ease",
    "als": "maple.models.factorization:Als",
    "two-tower": "maple.models.two_tower:TwoTower",
}

#: Models that score candidates from feature columns.
RANKERS: dict[str, str] = {
    "dcn": "maple.models.ctr:DCNv2",
}


def model_class(name: str) -> type[Retriever]:
    """The retriever of a name; ``ConfigError`` names the nearest known one."""
    if name not in MODELS:
        raise ConfigError(unknown_name("model", name, MODELS))
    found: type[Retriever] = _resolve(MODELS[name])
    return found


def ranker_class(name: str) -> type[Ranker]:
    """The ranker of a name; ``ConfigError`` names the nearest known one."""
    if name not in RANKERS:
        raise ConfigError(unknown_name("ranker", name, RANKERS))
    found: type[Ranker] = _resolve(RANKERS[name])
    return found


def _resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
