"""Recommending is a list of stages over a ragged batch: what a query is, what candidates are, and the pipeline that runs them.

The same pipeline object runs in offline evaluation (many queries), in batch jobs and behind HTTP (one query). A stage
conserves: what it keeps and what it drops (with a reason) is what came in plus what it says it added; no duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maple.data.dataset import Float32, Histories, Int8, Int32, Int64
from maple.models.base import Array, QueryBatch


@dataclass(frozen=True, eq=False)
class Query:
    """One request: a user is their history. Item codes are those of the bundle that answers; -1 = unknown to it."""

    user: str
    items: Int32  # the history, oldest first
    events: Int8
    times: Int64  # microseconds
    now: int  # microseconds
    k: int = 10
    state: Any = None  # features.states.UserState: the folded views of this user, None = no features yet
    attributes: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Any] = field(default_factory=dict)
    exclude: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    filters: Mapping[str, Any] = field(default_factory=dict)  # column -> accepted values
    request_id: str = ""


def batch(queries: Sequence[Query]) -> QueryBatch:
    """The queries as models see them."""
    histories = Histories.of([(query.items, query.events, query.times) for query in queries])
    return QueryBatch(histories, np.array([query.now for query in queries], dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Dropped:
    """Items that a stage dropped: query row, item code, stage and reason, aligned; one (stage, reason) per chunk."""

    rows: Int64
    items: Int32
    stage: str
    reason: str


@dataclass(frozen=True, eq=False)
class Candidates:
    """Ragged candidates of B queries. ``score`` orders them; ``columns`` are aligned arrays [N]; ``order`` is best first after a rank."""

    offsets: Int64
    items: Int32
    score: Float32
    columns: Mapping[str, Array] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    degraded: tuple[str, ...] = ()  # what went wrong and was answered around, e.g. "ranker: deadline"

    @staticmethod
    def empty(num_queries: int) -> Candidates:
        return Candidates(np.zeros(num_queries + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.items)

    def rows(self) -> Int64:
        """The query of every candidate, int64[N]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
