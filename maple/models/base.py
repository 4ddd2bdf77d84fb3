"""What a model is: ``fit``, ``topk`` / ``score``, ``state``. Batches only; a user is their history.

-1 is an unknown item, -inf is no opinion, NaN is a failure, always. Shapes: B queries, I items, D dimensions, N candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

import numpy.typing as npt
import pyarrow as pa

from maple.config import Section
from maple.data.dataset import Bool, Dataset, Float32, Histories, Int32, Int64, Vocab

Array: TypeAlias = npt.NDArray[Any]
State: TypeAlias = dict[str, Array]
Metrics: TypeAlias = dict[str, float]

#: What a search may try: field -> ("log", low, high) | ("uniform", low, high) | ("int", low, high) | ("choice", [values]).
#: A model's ``Config`` that can be searched has a classmethod ``search_space() -> SearchSpace``.
SearchSpace: TypeAlias = dict[str, tuple[Any, ...]]


class Need(StrEnum):
    """What a model needs from the data or the caller beyond a history."""

    ITEM_TABLE = "item table"
    USER_TABLE = "user table"
    TIME = "time"
    OTHER_USERS = "other users' histories"  # offline only


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """B users as their histories. ``now`` int64[B] microseconds. ``users`` int32[B] allows trained user rows (offline comparison only)."""

    histories: Histories
    now: Int64
    users: Int32 | None = None
    attributes: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: Array) -> QueryBatch:
        """Some of the queries, in that order."""
        return QueryBatch(
            self.histories.take(rows), self.now[rows], None if self.users is None else self.users[rows],
            {name: column[rows] for name, column in self.attributes.items()},
        )  # fmt: skip

    @staticmethod
    def at(data: Dataset, users: Int32, now: Int64, limit: int, *, known: bool = False) -> QueryBatch:
        """The users of a dataset as they were strictly before ``now``; ``known`` passes their codes on as well."""
        return QueryBatch(data.histories(users, now, limit), now, users if known else None)


@dataclass(frozen=True, eq=False)
class Mask:
    """What may not be returned. ``allowed`` bool[I] for all queries; ``exclude`` ragged items per query (offsets int64[B+1], int32)."""

    allowed: Bool | None = None
    exclude: tuple[Int64, Int32] | None = None

    @staticmethod
    def seen(queries: QueryBatch) -> Mask:
        """Mask each query's own history."""
        return Mask(exclude=(queries.histories.offsets, queries.histories.items))


@dataclass(frozen=True)
class FitContext:
    """What a fit may use besides data: the run's seed, threads, a place for progress. ``report`` gets metrics per step or epoch."""

    seed: int = 0
    threads: int = 1
    report: Callable[[int, Metrics], None] | None = None


@dataclass(frozen=True, eq=False)
class Space:
    """What a loaded model must know of its bundle: the items in code order, their table, the signal weights."""

    items: Vocab
    item_table: pa.Table
    signals: Float32

    @staticmethod
    def of(data: Dataset) -> Space:
        return Space(data.items, data.item_table, data.signals)


@runtime_checkable
class Retriever(Protocol):
    """A model that finds and scores items for histories."""

    Config: ClassVar[type[Section]]
    needs: ClassVar[frozenset[Need]]
    config: Section

    def fit(self, data: Dataset, ctx: FitContext) -> Metrics:
        """Learn from the whole dataset given; returns training metrics."""

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        """The best k items per query: (int32[B, k], float32[B, k]), best first; -1 and -inf where there are fewer."""

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        """Scores float32[N] of ragged candidates: ``items[offsets[b]:offsets[b+1]]`` belong to query b; -inf is no opinion."""

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        """The k items most like each given item, itself left out: (int32[M, k], float32[M, k]), padded with -1 and -inf."""

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        """For each candidate the history item that speaks most for it, int32[N], -1 where there is none."""

    def state(self) -> State:
        """Everything learned, as arrays."""

    @classmethod
    def from_state(cls, config: Section, space: Space, state: State) -> Self:
        """The model again, from what ``state`` gave."""


@runtime_checkable
class Ranker(Protocol):
    """A model that scores candidates from feature columns. ``columns`` are aligned arrays of N; int32 codes or float32, NaN = missing."""

    Config: ClassVar[type[Section]]
    config: Section

    def fit(self, columns: Mapping[str, Array], labels: Float32, groups: Int64, ctx: FitContext) -> Metrics:
        """Learn from rows; ``labels`` float32[N, tasks], ``groups`` int64[N]: the query of each row, sorted."""

    def score(self, columns: Mapping[str, Array]) -> Float32:
        """float32[N, tasks], higher is better."""

    def state(self) -> State: ...

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self: ...
