"""Item-kNN: items are alike when the same users touch them. Four similarities, one class, a sparse matrix of neighbours.

Sarwar et al. 2001 (cosine); Aiolli 2013 (the asymmetric cosine, ``balance``); Robertson and Zaragoza 2009 (BM25); Paudel et
al. 2017 (RP3beta, a random walk of three steps whose end is damped by the popularity of the item it reaches).
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Dataset, Float32, Int32, Int64
from maple.errors import DataError
from maple.index import topk_ragged
from maple.models.base import FitContext, Metrics, Need, QueryBatch, SearchSpace, Space, State
from maple.models.families import ItemItem, history_matrix, similar_rows, take_array

#: Multiply-adds per block of rows of the item-item product: bounds what is held before pruning to some 100 MB.
BLOCK_WORK = 8_000_000


class ItemKnnConfig(Section):
    """Which similarity, and how much of it is kept."""

    similarity: Literal["cosine", "tfidf", "bm25", "rp3beta"] = "rp3beta"
    """cosine of item columns; tfidf and bm25 weigh a user down who touches everything; rp3beta walks item, user, item."""
    neighbours: int = Field(default=200, ge=1)
    """Of each candidate, so many of the history items that speak most for it. (Kept per history item, popular candidates win.)"""
    shrink: float = Field(default=0.0, ge=0)
    """cosine and tfidf: added to both squared norms, so that a similarity seen on few users counts less."""
    balance: float = Field(default=0.5, ge=0, le=1)
    """cosine and tfidf: exponent of the candidate's squared norm; the history item's is 1 minus it. Less favours popular candidates."""
    alpha: float = Field(default=0.6, gt=0)
    """rp3beta: exponent of the transition probabilities."""
    beta: float = Field(default=0.3, ge=0)
    """rp3beta: exponent of the popularity that divides the end of the walk; 0 = no damping."""
    k1: float = Field(default=1.2, gt=0)
    """bm25: how soon repeated interest stops to count."""
    b: float = Field(default=0.75, ge=0, le=1)
    """bm25: how much a popular item's weights are reduced."""
    binary: bool = True
    """One interaction counts like many, in the fit and in the history."""
    recency: float = Field(default=1.0, gt=0, le=1)
    """Weight of a history event per distinct later time in the history; 1 = the whole history counts alike."""

    @classmethod
    def search_space(cls) -> SearchSpace:
        return {
            "similarity": ("choice", ["cosine", "tfidf", "bm25", "rp3beta"]),
            "neighbours": ("choice", [20, 50, 100, 200, 400]),
            "alpha": ("uniform", 0.3, 1.2),
            "beta": ("uniform", 0.0, 0.8),
            "balance": ("uniform", 0.1, 0.7),
            "shrink": ("choice", [0.0, 5.0, 20.0, 50.0]),
            "recency": ("choice", [0.7, 0.8, 0.9, 0.95, 1.0]),
        }


class ItemKnn(ItemItem):
    """Score of an item = sum over the history of its similarity to the history item, among each one's nearest neighbours."""

    Config: ClassVar[type[Section]] = ItemKnnConfig
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ItemKnnConfig
    weights: sp.csr_matrix

    def fit(self, data: Dataset, ctx: FitContext) -> Metrics:
        self._enter(Space.of(data))
        left, right = self._factors(data.matrix(binary=self.config.binary))
        by_candidate = _pruned_product(right.T.tocsr(), left.T.tocsr(), self.config.neighbours, self.tie)
        self.weights = by_candidate.T.tocsr()
        self.known = np.diff(self.weights.indptr) > 0
        return {"neighbours": float(self.weights.nnz)}

    def _factors(self, interactions: sp.csr_matrix) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Matrices [I, U] and [U, I] whose product is the similarity, from item in the history to candidate."""
        config = self.config
        num_items = interactions.shape[1]
        per_item = np.asarray(interactions.sum(axis=0)).ravel().astype(np.float64)
        if config.similarity == "rp3beta":
            to_item, to_user = _rows_to_one(interactions), _rows_to_one(interactions.T.tocsr())
            to_item.data **= config.alpha
            to_user.data **= config.alpha
            damping = _power(per_item, -config.beta)
            return to_user.tocsr(), (to_item @ sp.diags(damping.astype(np.float32))).tocsr()
        weighted = interactions.tocsr(copy=True)
        if config.similarity != "cosine":
            touched = np.diff(interactions.indptr)
            rarity = np.log1p(num_items / np.maximum(touched, 1)).astype(np.float32)
            if config.similarity == "tfidf":
                weighted.data = np.sqrt(weighted.data)
            else:
                length = per_item / max(float(per_item.mean()), 1e-12)
                norm = (config.k1 * (1 - config.b + config.b * length)).astype(np.float32)
                weighted.data = weighted.data * np.float32(config.k1 + 1) / (weighted.data + norm[weighted.indices])
            weighted.data *= np.repeat(rarity, touched)
        if config.similarity == "bm25":
            return weighted.T.tocsr(), weighted
        # |a||b| + shrink is no product of two factors; adding to each squared norm is, and has the same effect
        squared = np.asarray(weighted.multiply(weighted).sum(axis=0)).ravel().astype(np.float64)
        squared = np.where(squared > 0, squared + config.shrink, 0.0)
        of_history, of_candidate = (_power(squared, -each).astype(np.float32) for each in (1 - config.balance, config.balance))
        return (sp.diags(of_history) @ weighted.T).tocsr(), (weighted @ sp.diags(of_candidate)).tocsr()

    def history(self, queries: QueryBatch) -> sp.csr_matrix:
        return history_matrix(queries.histories, self.num_items, self.space.signals, binary=self.config.binary, recency=self.config.recency)

    @cached_property
    def _relations(self) -> sp.csr_matrix:
        return self.weights.maximum(self.weights.T).tocsr()

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        """By the larger of the weights from one item to the other and back."""
        self.check_fitted()
        return similar_rows(self._relations, items, k, self.tie)

    def state(self) -> State:
        self.check_fitted()
        return {"indptr": self.weights.indptr.astype(np.int64), "indices": self.weights.indices, "data": self.weights.data}

    @classmethod
    def from_state(cls, config: Section, space: Space, state: State) -> Self:
        model = cls._load(config, space)
        model.weights = sparse_weights(state, len(space.items))
        model.known = np.diff(model.weights.indptr) > 0
        return model


def sparse_weights(state: State, num_items: int) -> sp.csr_matrix:
    """The matrix float32[I, I] of a state's ``indptr``, ``indices`` and ``data``, checked."""
    indptr = take_array(state, "indptr", np.int64, (num_items + 1,))
    indices = take_array(state, "indices", np.int32, (None,))
    data = take_array(state, "data", np.float32, (len(indices),))
    sound = indptr[0] == 0 and indptr[-1] == len(indices) and (np.diff(indptr) >= 0).all()
    if not sound or (len(indices) and (indices.min() < 0 or indices.max() >= num_items)):
        raise DataError("the item-item weights of the model state point outside the catalogue; fit the model again")
    return sp.csr_matrix((data, indices, indptr), shape=(num_items, num_items))


def _power(values: npt.NDArray[np.float64], exponent: float) -> npt.NDArray[np.float64]:
    """values ** exponent, 0 where the value is 0."""
    return np.where(values > 0, np.where(values > 0, values, 1.0) ** exponent, 0.0)


def _rows_to_one(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Each non-empty row divided by its sum."""
    total = np.asarray(matrix.sum(axis=1)).ravel().astype(np.float64)
    return (sp.diags(_power(total, -1.0).astype(np.float32)) @ matrix).tocsr()


def _pruned_product(left: sp.csr_matrix, right: sp.csr_matrix, keep: int, tie: Int32) -> sp.csr_matrix:
    """The ``keep`` largest positive off-diagonal entries per row of left @ right, without ever holding the whole product."""
    num_items = left.shape[0]
    work = np.concatenate([[0], np.cumsum(np.add.reduceat(np.append(np.diff(right.indptr)[left.indices], 0), left.indptr[:-1]))])
    indices: list[Int32] = []
    data: list[Float32] = []
    sizes: list[Int64] = []
    start = 0
    while start < num_items:
        stop = max(start + 1, int(np.searchsorted(work, work[start] + BLOCK_WORK, side="right")) - 1)
        product = left[start:stop] @ right
        own = (np.arange(stop - start + 1, dtype=np.int64), np.arange(start, stop, dtype=np.int32))
        values = np.where(product.data > 0, product.data, np.float32(-np.inf))
        found, best = topk_ragged(product.indptr.astype(np.int64), product.indices, values, keep, tie=tie, exclude=own)
        order = np.argsort(np.where(found < 0, num_items, found), axis=1)
        found, best = np.take_along_axis(found, order, axis=1), np.take_along_axis(best, order, axis=1)
        indices.append(found[found >= 0])
        data.append(best[found >= 0])
        sizes.append((found >= 0).sum(axis=1))
        start = stop
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    return sp.csr_matrix((np.concatenate(data), np.concatenate(indices), indptr), shape=(num_items, num_items))
