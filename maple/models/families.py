"""What families of models share: a base that knows its space, embedding models, and item-item models.

An *embedder* gives query vectors and item vectors, and gets top-k, scores, similar items and explanations from them.
An *item-item* model gives a matrix of weights from history items to candidates, and gets the same from the sparse
product of a history and the matrix. Shapes: B queries, I items, D dimensions, N candidates, M items asked about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Self

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Bool, Dataset, Float32, Histories, Int32, Int64
from maple.errors import ArtifactError, NotFittedError
from maple.index import Exclude, IndexConfig, ItemIndex, build_index, tie_ranks, topk_ragged, topk_scores
from maple.models.base import FitContext, Mask, Metrics, Need, QueryBatch, Space, State

#: Candidates scored at once by an embedder, rows of dense scores held at once by an item-item model (in bytes).
SCORE_BLOCK = 1 << 18
DENSE_BYTES = 32 << 20


class Model(ABC):
    """The part of a retriever that does not depend on how it scores: settings, the space it was fitted in, ties."""

    Config: ClassVar[type[Section]]
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: Section

    def __init__(self, config: Section | None = None) -> None:
        self.config = config if config is not None else self.Config()
        self._space: Space | None = None

    @abstractmethod
    def fit(self, data: Dataset, ctx: FitContext) -> Metrics:
        """Learn from the whole dataset given."""

    @property
    def space(self) -> Space:
        """The items it knows; ``NotFittedError`` before ``fit`` or ``from_state``."""
        if self._space is None:
            raise NotFittedError(f"{type(self).__name__} has not been fitted; call fit(data, ctx) or load it from a bundle first")
        return self._space

    def check_fitted(self) -> None:
        """``NotFittedError`` before ``fit`` or ``from_state``."""
        self.space  # noqa: B018  (the property raises)

    @property
    def num_items(self) -> int:
        return len(self.space.items)

    @cached_property
    def tie(self) -> Int32:
        """The order of items with equal scores, int32[I]."""
        return tie_ranks(self.space.items.ids.to_pylist())

    def _enter(self, space: Space) -> None:
        """Forget everything derived from an earlier fit and take a new space; the first line of ``fit`` and ``from_state``."""
        for name in [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]:
            delattr(self, name)
        self._space = space

    @classmethod
    def _load(cls, config: Section, space: Space) -> Self:
        """A model with its space and nothing learned yet: the beginning of ``from_state``."""
        model = cls(config)
        model._enter(space)
        return model


def parts(mask: Mask | None) -> tuple[Bool | None, Exclude | None]:
    """The two halves of a mask as the index takes them."""
    return (None, None) if mask is None else (mask.allowed, mask.exclude)


def candidate_rows(offsets: Int64) -> Int64:
    """The query of every ragged candidate, int64[N]."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def no_similar(items: Int32, k: int) -> tuple[Int32, Float32]:
    """The answer of a model without a notion of similar items."""
    return np.full((len(items), k), -1, np.int32), np.full((len(items), k), -np.inf, np.float32)


def self_excluded(items: Int32) -> Exclude:
    """Each asked item as what its own row may not contain."""
    return np.arange(len(items) + 1, dtype=np.int64), items.astype(np.int32)


def take_array(state: State, name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """One array of a state, its type and shape checked (None = any length); ``ArtifactError`` says what is wrong."""
    array = state.get(name)
    if array is None:
        raise ArtifactError(f"the model state has no array {name!r}; it has: {', '.join(sorted(state)) or 'none'}")
    fits = len(shape) == array.ndim and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits:
        wanted = "x".join("?" if size is None else str(size) for size in shape)
        found = "x".join(map(str, array.shape))
        raise ArtifactError(
            f"the model state's {name!r} is {array.dtype} of shape {found}, expected {np.dtype(dtype)} of {wanted}; "
            "the state belongs to another catalogue or version"
        )
    return array


def history_matrix(histories: Histories, num_items: int, signals: Float32, *, binary: bool = False, recency: float = 1.0) -> sp.csr_matrix:
    """Histories as float32[B, I] with columns in order: signals summed per item, or 1 per item when ``binary``.

    ``recency`` < 1 multiplies an event by ``recency ** age``, its age being the number of distinct later times in its history
    (the events of a basket share one); of several events with an item the latest counts when ``binary``. Unknown items and
    events without a signal are ignored.
    """
    weight = signals[histories.events]
    keep = (histories.items >= 0) & (weight > 0)
    rows, items, weight = histories.rows()[keep], histories.items[keep], weight[keep]
    if binary:
        weight = np.ones_like(weight)
    if recency < 1.0:
        weight = weight * np.float32(recency) ** _ages(rows, histories.times[keep], len(histories))
    key = rows * np.int64(num_items) + items
    order = np.argsort(key, kind="stable")
    key, weight = key[order], weight[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    merge = np.maximum if binary else np.add
    data = merge.reduceat(weight, first) if len(key) else weight
    distinct = key[first]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(distinct // num_items, minlength=len(histories)))]).astype(np.int32)
    out = sp.csr_matrix((len(histories), num_items), dtype=np.float32)
    out.indptr, out.indices, out.data = indptr, (distinct % num_items).astype(np.int32), data.astype(np.float32)
    return out


def _ages(rows: Int64, times: Int64, num_rows: int) -> Float32:
    """For each event of histories in time order the number of distinct later times in its row."""
    if len(rows) == 0:
        return np.empty(0, np.float32)
    fresh = np.ones(len(rows), np.int64)
    fresh[1:] = (rows[1:] != rows[:-1]) | (times[1:] != times[:-1])
    step = np.cumsum(fresh)
    last = step[np.searchsorted(rows, np.arange(num_rows), side="right") - 1]
    return (last[rows] - step).astype(np.float32)


# -- embedders --------------------------------------------------------------------------------------------------------


class EmbedderConfig(Section):
    """Settings of every embedding model."""

    index: IndexConfig = Field(default_factory=IndexConfig)
    """How it searches its items."""


class Embedder(Model):
    """A model whose score is the inner product of a query vector and an item vector.

    A zero query vector means no opinion about anything (an empty history), a zero item vector no opinion about the item.
    """

    @abstractmethod
    def embed_queries(self, queries: QueryBatch) -> Float32:
        """float32[B, D]; a row of zeros where the history says nothing."""

    @abstractmethod
    def embed_items(self) -> Float32:
        """float32[I, D]; a row of zeros where nothing is known of the item."""

    @cached_property
    def index(self) -> ItemIndex:
        """The search structure over the item vectors, built on first use."""
        settings = self.config.index if isinstance(self.config, EmbedderConfig) else IndexConfig()
        return build_index(self.embed_items(), self.tie, settings)

    @cached_property
    def _opinion(self) -> Bool:
        return spoken(self.embed_items())

    @cached_property
    def _directions(self) -> Float32:
        """Item vectors of unit length, zero where the item has none."""
        vectors = self.embed_items()
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(length > 0, length, 1), dtype=np.float32)

    @cached_property
    def _neighbours(self) -> ItemIndex:
        settings = self.config.index if isinstance(self.config, EmbedderConfig) else IndexConfig()
        return build_index(self._directions, self.tie, settings)

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        vectors = self.embed_queries(queries)
        allowed, exclude = parts(mask)
        if not self._opinion.all():
            allowed = self._opinion if allowed is None else self._opinion & allowed
        items, scores = self.index.search(vectors, k, allowed=allowed, exclude=exclude)
        silent = ~spoken(vectors)
        items[silent], scores[silent] = -1, -np.inf
        return items, scores

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        vectors, table = self.embed_queries(queries), self.embed_items()
        rows = candidate_rows(offsets)
        out = np.empty(len(items), np.float32)
        for start in range(0, len(items), SCORE_BLOCK):
            part = slice(start, start + SCORE_BLOCK)
            out[part] = np.einsum("nd,nd->n", vectors[rows[part]], table[items[part]])
        out[~(spoken(vectors)[rows] & (items >= 0) & self._opinion[items])] = -np.inf
        return out

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        """By the cosine of item vectors."""
        self.check_fitted()
        known = (items >= 0) & self._opinion[items]
        queries = np.where(known[:, None], self._directions[items], np.float32(0))
        found, scores = self._neighbours.search(queries, k, allowed=self._opinion, exclude=self_excluded(items))
        found[~known], scores[~known] = -1, -np.inf
        return found, scores

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        """The history item with the largest cosine to the candidate, other than itself, if it is positive."""
        out = np.full(len(items), -1, np.int32)
        history = history_matrix(queries.histories, self.num_items, self.space.signals, binary=True)
        for row in range(len(offsets) - 1):
            candidates = items[offsets[row] : offsets[row + 1]]
            own = history.indices[history.indptr[row] : history.indptr[row + 1]]
            if len(own) and len(candidates):
                cosine = self._directions[np.maximum(candidates, 0)] @ self._directions[own].T
                out[offsets[row] : offsets[row + 1]] = strongest(cosine, candidates, own)
        return out


def spoken(vectors: Float32) -> Bool:
    """Which vectors are not all zero, bool[rows]."""
    return np.asarray((vectors != 0).any(axis=1), dtype=np.bool_)


def strongest(contribution: npt.NDArray[Any], candidates: Int32, history: Int32) -> Int32:
    """For each candidate the history item of the largest positive contribution [candidates, history] that is not itself, else -1."""
    contribution = np.where(candidates[:, None] == history[None, :], -np.inf, contribution)
    best = contribution.argmax(axis=1)
    found = (contribution[np.arange(len(candidates)), best] > 0) & (candidates >= 0)
    return np.where(found, history[best], -1).astype(np.int32)


# -- item-item models -------------------------------------------------------------------------------------------------


class ItemItem(Model):
    """A model whose score of an item is the sum, over the history, of history weight times the matrix's weight.

    ``weights`` is float32[I, I], from history item (row) to candidate (column): sparse, where an absent entry says nothing,
    or dense. ``known`` bool[I]: the items it has an opinion about.
    """

    weights: sp.csr_matrix | Float32
    known: Bool

    @abstractmethod
    def history(self, queries: QueryBatch) -> sp.csr_matrix:
        """The histories as float32[B, I] with sorted columns and no explicit zeros."""

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        history = self.history(queries)
        allowed, exclude = parts(mask)
        if isinstance(self.weights, np.ndarray):
            return self._topk_dense(history, self.weights, k, allowed, exclude)
        found, best = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
        rows = max(1, DENSE_BYTES // (8 * max(1, self.num_items)))
        for start in range(0, len(queries), rows):
            product = (history[start : start + rows] if len(queries) > rows else history) @ self.weights
            stop = start + product.shape[0]
            excluded = None if exclude is None else (exclude[0][start : stop + 1], exclude[1])
            found[start:stop], best[start:stop] = topk_ragged(
                product.indptr.astype(np.int64), product.indices, product.data, k, tie=self.tie, allowed=allowed, exclude=excluded
            )
        return found, best

    def _topk_dense(
        self, history: sp.csr_matrix, weights: Float32, k: int, allowed: Bool | None, exclude: Exclude | None
    ) -> tuple[Int32, Float32]:
        num_queries = history.shape[0]
        found, best = np.full((num_queries, k), -1, np.int32), np.full((num_queries, k), -np.inf, np.float32)
        rows = max(1, DENSE_BYTES // (4 * max(1, self.num_items)))
        for start in range(0, num_queries, rows):
            scores = self._dense(history[start : start + rows], weights)
            stop = start + len(scores)
            excluded = None if exclude is None else (exclude[0][start : stop + 1], exclude[1])
            found[start:stop], best[start:stop] = topk_scores(scores, k, tie=self.tie, allowed=allowed, exclude=excluded)
        return found, best

    def _dense(self, history: sp.csr_matrix, weights: Float32) -> Float32:
        scores = np.asarray(history @ weights, dtype=np.float32)
        scores[:, ~self.known] = -np.inf
        scores[np.diff(history.indptr) == 0] = -np.inf
        return scores

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        history = self.history(queries)
        if not isinstance(self.weights, np.ndarray):
            return np.asarray(_score_sparse(*_csr(history), *_csr(self.weights), offsets, items, self.num_items))
        out = np.empty(len(items), np.float32)
        rows = max(1, DENSE_BYTES // (4 * max(1, self.num_items)))
        for start in range(0, len(queries), rows):
            scores = self._dense(history[start : start + rows], self.weights)
            stop = start + len(scores)
            part = slice(int(offsets[start]), int(offsets[stop]))
            out[part] = scores[candidate_rows(offsets[start : stop + 1]), items[part]]
        out[items < 0] = -np.inf
        return out

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        """By the weight from the asked item to others, where it is positive."""
        self.check_fitted()
        return similar_rows(self.weights, items, k, self.tie)

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        """The history item that adds most to the candidate's score, itself left out, if what it adds is positive."""
        history = self.history(queries)
        if not isinstance(self.weights, np.ndarray):
            return np.asarray(_explain_sparse(*_csr(history), *_csr(self.weights), offsets, items, self.num_items))
        out = np.full(len(items), -1, np.int32)
        for row in range(len(offsets) - 1):
            candidates = items[offsets[row] : offsets[row + 1]]
            span = slice(history.indptr[row], history.indptr[row + 1])
            own, strength = history.indices[span], history.data[span]
            if len(own) and len(candidates):
                added = (self.weights[np.ix_(own, np.maximum(candidates, 0))] * strength[:, None]).T
                out[offsets[row] : offsets[row + 1]] = strongest(added, candidates, own)
        return out


def similar_rows(weights: sp.csr_matrix | Float32, items: Int32, k: int, tie: Int32) -> tuple[Int32, Float32]:
    """The k largest positive weights in the row of each item, itself left out; nothing for an item of -1."""
    rows = weights[np.maximum(items, 0)]
    if isinstance(rows, np.ndarray):
        found, best = topk_scores(np.where(rows > 0, rows, np.float32(-np.inf)), k, tie=tie, exclude=self_excluded(items))
    else:
        scores = np.where(rows.data > 0, rows.data, np.float32(-np.inf))
        offsets, columns = rows.indptr.astype(np.int64), rows.indices.astype(np.int32)
        found, best = topk_ragged(offsets, columns, scores, k, tie=tie, exclude=self_excluded(items))
    found[items < 0], best[items < 0] = -1, -np.inf
    return found, best


def _csr(matrix: sp.csr_matrix) -> tuple[npt.NDArray[Any], Int32, Float32]:
    return matrix.indptr, matrix.indices, matrix.data


@numba.njit(cache=True, nogil=True)
def _score_sparse(
    rows: Any, own: Any, strength: Any, indptr: Any, indices: Any, data: Any, offsets: Any, candidates: Any, num_items: int
) -> Any:
    out = np.empty(len(candidates), np.float32)
    total = np.zeros(num_items, np.float32)
    stamp = np.zeros(num_items, np.int64)
    for row in range(len(rows) - 1):
        if offsets[row + 1] == offsets[row]:
            continue
        for place in range(rows[row], rows[row + 1]):
            for entry in range(indptr[own[place]], indptr[own[place] + 1]):
                item = indices[entry]
                if stamp[item] != row + 1:
                    stamp[item], total[item] = row + 1, 0.0
                total[item] += strength[place] * data[entry]
        for place in range(offsets[row], offsets[row + 1]):
            item = candidates[place]
            out[place] = total[item] if item >= 0 and stamp[item] == row + 1 else -np.inf
    return out


@numba.njit(cache=True, nogil=True)
def _explain_sparse(
    rows: Any, own: Any, strength: Any, indptr: Any, indices: Any, data: Any, offsets: Any, candidates: Any, num_items: int
) -> Any:
    out = np.full(len(candidates), -1, np.int32)
    largest = np.zeros(num_items, np.float32)
    cause = np.zeros(num_items, np.int32)
    stamp = np.zeros(num_items, np.int64)
    for row in range(len(rows) - 1):
        for place in range(offsets[row], offsets[row + 1]):
            if candidates[place] >= 0:
                stamp[candidates[place]], largest[candidates[place]], cause[candidates[place]] = row + 1, 0.0, -1
        for place in range(rows[row], rows[row + 1]):
            for entry in range(indptr[own[place]], indptr[own[place] + 1]):
                item, added = indices[entry], strength[place] * data[entry]
                if stamp[item] == row + 1 and added > largest[item] and item != own[place]:
                    largest[item], cause[item] = added, own[place]
        for place in range(offsets[row], offsets[row + 1]):
            if candidates[place] >= 0:
                out[place] = cause[candidates[place]]
    return out
