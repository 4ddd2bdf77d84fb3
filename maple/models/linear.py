"""Linear item-item models solved in closed form: EASE (Steck 2019, "Embarrassingly shallow autoencoders for sparse data")."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from pydantic import Field
from threadpoolctl import threadpool_limits

from maple.config import Section
from maple.data.dataset import Dataset, Float32, Int32
from maple.errors import DataError
from maple.index import topk_scores
from maple.models.base import FitContext, Metrics, Need, QueryBatch, SearchSpace, Space, State
from maple.models.families import ItemItem, history_matrix, take_array
from maple.models.knn import sparse_weights


class EaseConfig(Section):
    """Regularisation, and what is kept of the dense solution."""

    l2: float = Field(default=300.0, gt=0)
    """Added to the diagonal of the co-occurrence matrix (lambda of the paper); more = nearer to plain co-occurrence."""
    max_items: int = Field(default=8_000, ge=1)
    """Only the items with the most interactions are modelled (memory is 8 bytes times its square); the rest get no opinion."""
    keep: int = Field(default=0, ge=0)
    """Keep only the weights of largest magnitude into each item, so many; 0 = the whole dense matrix."""
    binary: bool = True
    """One interaction counts like many, in the fit and in the history."""
    recency: float = Field(default=1.0, gt=0, le=1)
    """Weight of a history event per distinct later time in the history; 1 = the whole history counts alike."""

    @classmethod
    def search_space(cls) -> SearchSpace:
        return {"l2": ("log", 10.0, 5000.0), "recency": ("choice", [0.8, 0.9, 0.95, 0.98, 1.0])}


class Ease(ItemItem):
    """B = I - P diag(P)^-1 with P = (X'X + l2 I)^-1 (eq. 8), zero diagonal; score = history times B.

    Cost: one Cholesky inverse of an item-by-item matrix, I^3 flops. An item without interactions gets no opinion.
    """

    Config: ClassVar[type[Section]] = EaseConfig
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: EaseConfig

    def fit(self, data: Dataset, ctx: FitContext) -> Metrics:
        self._enter(Space.of(data))
        interactions = data.matrix(binary=self.config.binary)
        touched = np.diff(interactions.tocsc().indptr).astype(np.float32)
        touched[touched == 0] = -np.inf
        chosen = topk_scores(touched[None], min(self.config.max_items, len(touched)), tie=self.tie)[0][0]
        chosen = np.sort(chosen[chosen >= 0])
        if len(chosen) == 0:
            raise DataError("EASE has nothing to learn from: no event has a positive signal. Check the `signals` of the data settings.")
        with threadpool_limits(ctx.threads, "blas"):
            solved = ease_weights(interactions[:, chosen].tocsr(), self.config.l2)
        self.known = np.zeros(len(touched), bool)
        self.known[chosen] = True
        self.weights = self._spread(solved, chosen)
        return {"items": float(len(chosen)), "weights": float(np.count_nonzero(solved))}

    def _spread(self, solved: Float32, chosen: Int32) -> sp.csr_matrix | Float32:
        """The solution over the chosen items as a matrix over all items, pruned as the settings say."""
        num_items, keep = self.num_items, self.config.keep
        if not keep and len(chosen) == num_items:
            return solved
        if not keep:
            full = np.zeros((num_items, num_items), np.float32)
            full[np.ix_(chosen, chosen)] = solved
            return full
        strongest, _ = topk_scores(np.abs(solved.T), min(keep, len(chosen)), tie=self.tie[chosen])  # per column: what leads to an item
        column = np.repeat(np.arange(len(chosen)), strongest.shape[1])
        row = strongest.ravel()
        value = solved[row, column]
        solid = value != 0
        shape = (num_items, num_items)
        out = sp.csr_matrix((value[solid], (chosen[row[solid]], chosen[column[solid]])), shape=shape, dtype=np.float32)
        out.sort_indices()
        return out

    def history(self, queries: QueryBatch) -> sp.csr_matrix:
        return history_matrix(queries.histories, self.num_items, self.space.signals, binary=self.config.binary, recency=self.config.recency)

    def state(self) -> State:
        self.check_fitted()
        if isinstance(self.weights, np.ndarray):
            return {"weights": self.weights, "known": self.known}
        sparse = self.weights
        return {"indptr": sparse.indptr.astype(np.int64), "indices": sparse.indices, "data": sparse.data, "known": self.known}

    @classmethod
    def from_state(cls, config: Section, space: Space, state: State) -> Self:
        model = cls._load(config, space)
        size = len(space.items)
        model.known = take_array(state, "known", np.bool_, (size,))
        model.weights = take_array(state, "weights", np.float32, (size, size)) if "weights" in state else sparse_weights(state, size)
        return model


def ease_weights(interactions: sp.csr_matrix, l2: float) -> Float32:
    """B float32[I, I] of the paper's eq. 8, in double precision; the Gram matrix is the only large array besides it."""
    gram = np.asfortranarray((interactions.T @ interactions).toarray(), dtype=np.float64)
    gram[np.diag_indices_from(gram)] += l2
    factor, failed = scipy.linalg.lapack.dpotrf(gram, lower=True, overwrite_a=True)
    if failed == 0:
        inverse, failed = scipy.linalg.lapack.dpotri(factor, lower=True, overwrite_c=True)
    if failed:
        raise DataError(f"EASE's matrix is not positive definite at l2 = {l2}; raise l2, or check the data for non-finite values")
    diagonal = inverse.diagonal().copy()
    out = np.empty(inverse.shape, np.float32)
    for start in range(0, len(diagonal), 256):  # the inverse is in the lower triangle; fill both, by rows, without a second copy
        stop = min(start + 256, len(diagonal))
        lower = np.where(
            np.arange(len(diagonal))[None, :] <= np.arange(start, stop)[:, None], inverse[start:stop], inverse[:, start:stop].T
        )
        out[start:stop] = -lower / diagonal[None, :]
    np.fill_diagonal(out, 0.0)
    return out
