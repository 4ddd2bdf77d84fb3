"""Ranking: hydrate candidates with feature columns, then score them with the ranker, tasks weighted into one score.

The ranker's columns are fixed when it is fitted and stored with it; a pipeline that does not give them all is refused when
it is put together, never in the middle of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from maple.data.dataset import Int32, Int64
from maple.errors import ArtifactError
from maple.features.catalogue import Catalogue
from maple.features.extras import NO_EXTRAS, Extras, Requests
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.states import ItemColumnsReader, StateLayout, StateReader, empty_state, hydrate
from maple.models.base import Array, Ranker
from maple.recommend.engine import Candidates, Query, StageError, batch


class FeatureHydrator(Protocol):
    """Gives the feature columns of candidates: what the ranker sees besides the sources' opinions."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns it gives, always all of them."""

    def columns(self, queries: Sequence[Query], offsets: Int64, items: Int32) -> Mapping[str, Array]:
        """Aligned with ``items`` int32[N], ragged by ``offsets`` int64[B+1]: float32[N], NaN = missing, or int32[N] codes."""


class StateFeatures:
    """Features at request time: each query's folded user state (a user without one has no events), and stored item features.

    What a query says of its user goes before the attributes that the state has."""

    def __init__(self, spec: FeatureSpec, catalogue: Catalogue, items: ItemColumnsReader, extras: Extras = NO_EXTRAS) -> None:
        self.names = (*spec.columns, *extras.names)
        self._reader, self._items, self._layout, self._extras = StateReader(spec, catalogue), items, StateLayout(spec), extras

    def columns(self, queries: Sequence[Query], offsets: Int64, items: Int32) -> Mapping[str, Array]:
        states = [empty_state(query.user, self._layout) if query.state is None else query.state for query in queries]
        attributes = [{**state.attributes, **query.attributes} for state, query in zip(states, queries, strict=True)]
        folded = hydrate(self._reader, self._items, states, _moments(queries), offsets, items)
        return folded | self._extras.columns(_requests(queries, attributes), offsets, items)


class LogFeatures:
    """Features of any past moment: users by their id in a data set's log, which is read strictly before each query's ``now``."""

    def __init__(self, reader: LogReader, items: ItemColumnsReader, extras: Extras = NO_EXTRAS) -> None:
        self.names = (*reader.spec.columns, *extras.names)
        self._reader, self._items, self._extras = reader, items, extras

    def columns(self, queries: Sequence[Query], offsets: Int64, items: Int32) -> Mapping[str, Array]:
        users = self._reader.data.users.encode([query.user for query in queries])
        folded = hydrate(self._reader, self._items, users, _moments(queries), offsets, items)
        return folded | self._extras.columns(_requests(queries, [query.attributes for query in queries]), offsets, items)


def _requests(queries: Sequence[Query], attributes: Sequence[Mapping[str, Any]]) -> Requests:
    return Requests(_moments(queries), batch(queries).histories, [query.context for query in queries], attributes)


def _moments(queries: Sequence[Query]) -> Int64:
    return np.array([query.now for query in queries], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Hydrate:
    """The stage that adds the feature columns."""

    features: FeatureHydrator
    name: str = "features"
    adds: bool = False
    essential: bool = False

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        columns = self.features.columns(queries, candidates.offsets, candidates.items)
        clash = columns.keys() & candidates.columns.keys()
        if clash:
            raise StageError(f"stage {self.name!r} would overwrite the columns {', '.join(sorted(clash))}")
        return candidates.with_columns(columns)


@dataclass(frozen=True, eq=False)
class Score:
    """The stage that scores with the ranker: score = sum over tasks of weight x the model's column for the task.

    ``columns`` are the names the ranker was fitted on. Queries without known history keep the sources' order where ``cold`` is
    "popular". Feature columns are left behind (they would travel to the ingress for nothing); the sources' columns stay, and
    each task's score is kept as ``task.<name>``.
    """

    ranker: Ranker
    columns: tuple[str, ...]
    weights: Mapping[str, float]
    cold: str = "rank"
    name: str = "ranker"
    adds: bool = False
    essential: bool = False

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        missing = [name for name in self.columns if name not in candidates.columns]
        if missing:
            raise StageError(f"the ranker needs columns that the candidates do not have: {', '.join(missing[:5])}")
        tasks = np.asarray(self.ranker.score({name: candidates.columns[name] for name in self.columns}), dtype=np.float32)
        if tasks.shape != (len(candidates), len(self.weights)):
            raise StageError(f"the ranker gave {tasks.shape} scores for {len(candidates)} candidates and {len(self.weights)} tasks")
        if not np.isfinite(tasks).all():
            raise StageError("the ranker gave a score that is not a finite number")
        score = tasks @ np.fromiter(self.weights.values(), np.float32)
        if self.cold == "popular":
            stays = np.repeat([query.cold for query in queries], np.diff(candidates.offsets))
            score = np.where(stays, candidates.score, score)
        kept = {name: column for name, column in candidates.columns.items() if name in _KEPT or name.startswith("source.")}
        kept |= {f"task.{name}": tasks[:, place] for place, name in enumerate(self.weights)}
        return replace(candidates, score=score.astype(np.float32), columns=kept)


_KEPT = ("source", "sources")


def check_columns(needed: Sequence[str], given: Sequence[str]) -> None:
    """``ArtifactError`` if the ranker was fitted on columns that this pipeline does not give."""
    missing = [name for name in needed if name not in set(given)]
    if missing:
        raise ArtifactError(
            f"the ranker was fitted on columns that this pipeline does not give: {', '.join(missing)}. "
            "Its sources or features were changed after it was fitted; fit the ranker again and publish a new bundle."
        )
