"""Matrix factorisation of implicit feedback: ALS (Hu, Koren and Volinsky 2008), fitted by the ``implicit`` library.

Only item factors are kept. A user is folded in from the history by one exact least-squares step, vectorised over a batch.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from pydantic import Field
from threadpoolctl import threadpool_limits

from maple.config import Section
from maple.data.dataset import Bool, Dataset, Float32, Int32, Int64
from maple.errors import DataError
from maple.hashing import torch_seed
from maple.models.base import FitContext, Metrics, Need, QueryBatch, SearchSpace, Space, State
from maple.models.families import Embedder, EmbedderConfig, history_matrix, strongest, take_array

#: Bytes of gathered item vectors held at once while folding in a batch of histories.
FOLD_BYTES = 64 << 20


class AlsConfig(EmbedderConfig):
    """Size, regularisation and confidence of the factorisation."""

    factors: int = Field(default=64, ge=1, le=2048)
    """Dimensions of the item vectors."""
    regularization: float = Field(default=10.0, gt=0)
    """Added to the diagonal of every least-squares problem (lambda of the paper)."""
    alpha: float = Field(default=1.0, ge=0)
    """Confidence of an interaction of weight x is 1 + alpha x, of none 1."""
    damping: float = Field(default=0.0, ge=0, le=1)
    """Divides alpha by (popularity / mean popularity) ** damping per item: popular items prove less."""
    iterations: int = Field(default=15, ge=1)
    """Sweeps over users and items."""
    binary: bool = True
    """One interaction counts like many, in the fit and in the history."""
    keep_users: bool = False
    """Keep the trained user rows, for queries that name a user code: only to compare with published numbers."""

    @classmethod
    def search_space(cls) -> SearchSpace:
        return {
            "factors": ("choice", [32, 64, 96, 128, 192, 256]),
            "regularization": ("log", 0.5, 300.0),
            "alpha": ("log", 0.5, 40.0),
            "damping": ("uniform", 0.0, 0.6),
            "iterations": ("int", 4, 20),
        }


class Als(Embedder):
    """Weighted least squares on all user-item cells: min sum c_ui (p_ui - x_u'y_i)^2 + lambda (|x_u|^2 + |y_i|^2).

    A query vector is the exact minimiser over x given the item factors Y and the history's confidences c:
    x = (Y'Y + lambda I + Y_h' (C - I) Y_h)^-1 Y_h' c (the paper's eq. 4).
    """

    Config: ClassVar[type[Section]] = AlsConfig
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: AlsConfig
    factors: Float32
    alpha: Float32  # per item
    users: Float32 | None

    def fit(self, data: Dataset, ctx: FitContext) -> Metrics:
        from implicit.cpu.als import AlternatingLeastSquares

        self._enter(Space.of(data))
        config, interactions = self.config, data.matrix(binary=self.config.binary)
        touched = np.diff(interactions.tocsc().indptr)
        if interactions.nnz == 0:
            raise DataError("ALS has nothing to learn from: no event has a positive signal. Check the `signals` of the data settings.")
        common = np.maximum(touched, 1) / touched[touched > 0].mean()
        self.alpha = (config.alpha * common**-config.damping).astype(np.float32)
        confidence = self._confidence(interactions)
        started = time.perf_counter()

        def progress(iteration: int, seconds: float, loss: float | None) -> None:
            if ctx.report is not None:
                ctx.report(iteration + 1, {"seconds": time.perf_counter() - started})

        with threadpool_limits(1, "blas"):
            solver = AlternatingLeastSquares(
                factors=config.factors, regularization=config.regularization, alpha=1.0, iterations=config.iterations,
                num_threads=ctx.threads, random_state=torch_seed(ctx.seed, "als") % 2**32,
            )  # fmt: skip
            solver.fit(confidence, show_progress=False, callback=progress)
        self.factors = np.ascontiguousarray(solver.item_factors, dtype=np.float32)
        self.factors[touched == 0] = 0
        self.users = np.ascontiguousarray(solver.user_factors, dtype=np.float32) if config.keep_users else None
        if not np.isfinite(self.factors).all():
            raise DataError("ALS diverged: its factors are not finite. Raise `regularization` or lower `alpha`.")
        return {"seconds": time.perf_counter() - started}

    def _confidence(self, interactions: sp.csr_matrix) -> sp.csr_matrix:
        out = interactions.copy()
        out.data = 1 + self.alpha[out.indices] * out.data
        return out

    def embed_items(self) -> Float32:
        self.check_fitted()
        return self.factors

    def embed_queries(self, queries: QueryBatch) -> Float32:
        history = self._history(queries)
        vectors = np.zeros((len(queries), self.factors.shape[1]), np.float32)
        sizes = np.diff(history.indptr)
        order = np.argsort(sizes, kind="stable")
        for rows in _blocks(order[sizes[order] > 0], sizes, self.factors.shape[1]):
            places, real = _padded(history.indptr, rows, sizes)
            vectors[rows] = self._fold(history.indices[places], np.where(real, history.data[places], 0), real)
        if queries.users is not None and self.users is not None:
            trained = queries.users >= 0
            vectors[trained] = self.users[queries.users[trained]]
        return vectors

    def _history(self, queries: QueryBatch) -> sp.csr_matrix:
        """Confidences of the histories, float32[B, I]."""
        return self._confidence(history_matrix(queries.histories, self.num_items, self.space.signals, binary=self.config.binary))

    @cached_property
    def _smoothed(self) -> tuple[npt.NDArray[np.float64], Float32]:
        """M = Y'Y + lambda I, float64[D, D], and Y M^-1, float32[I, D]."""
        factors = self.factors.astype(np.float64)
        gram = factors.T @ factors + self.config.regularization * np.eye(factors.shape[1])
        return gram, np.ascontiguousarray(np.linalg.solve(gram, factors.T).T, dtype=np.float32)

    def _fold(self, items: Int32, confidence: Float32, real: Bool) -> Float32:
        """Query vectors float32[b, D] of a padded block [b, H] of histories; a padded place has confidence 0.

        With E = C - I the step is (M + Y_h' E Y_h)^-1 Y_h' c, a D x D system; histories shorter than D take the H x H
        system of the same value, M^-1 Y_h' (I + E K)^-1 c with K = Y_h M^-1 Y_h' (push-through identity).
        """
        gram, smooth = self._smoothed
        right = confidence.astype(np.float64)
        extra = np.where(real, right - 1, 0)
        own = self.factors[items]
        length, width = own.shape[1:]
        if length > width:
            system = gram + np.matmul((own * extra[:, :, None]).transpose(0, 2, 1), own)
            return np.asarray(np.linalg.solve(system, np.matmul(right[:, None, :], own).transpose(0, 2, 1))[:, :, 0], np.float32)
        smoothed = smooth[items]
        system = extra[:, :, None] * np.matmul(own, smoothed.transpose(0, 2, 1))
        system[:, np.arange(length), np.arange(length)] += 1
        weights = np.linalg.solve(system, right[:, :, None])
        return np.asarray(np.matmul(weights.transpose(0, 2, 1).astype(np.float32), smoothed)[:, 0])

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        """The history item with the largest positive share of the folded-in score, the item itself left out.

        The score is the sum over the history of w_i y_i' M^-1 y_j with w_i = c_i - (c_i - 1) y_i' x.
        """
        out = np.full(len(items), -1, np.int32)
        history, vectors = self._history(queries), self.embed_queries(replace(queries, users=None))
        _, smooth = self._smoothed
        for row in range(len(queries)):
            part = slice(int(offsets[row]), int(offsets[row + 1]))
            span = slice(history.indptr[row], history.indptr[row + 1])
            own, confidence = history.indices[span], history.data[span]
            if len(own) and part.stop > part.start:
                weight = confidence - (confidence - 1) * (self.factors[own] @ vectors[row])
                share = (self.factors[np.maximum(items[part], 0)] @ smooth[own].T) * weight
                out[part] = strongest(share, items[part], own)
        return out

    def state(self) -> State:
        self.check_fitted()
        return {"factors": self.factors, "alpha": self.alpha} | ({} if self.users is None else {"users": self.users})

    @classmethod
    def from_state(cls, config: Section, space: Space, state: State) -> Self:
        model = cls._load(config, space)
        model.factors = take_array(state, "factors", np.float32, (len(space.items), model.config.factors))
        model.alpha = take_array(state, "alpha", np.float32, (len(space.items),))
        model.users = take_array(state, "users", np.float32, (None, model.config.factors)) if "users" in state else None
        return model


def _blocks(order: Int64, sizes: Int64, width: int) -> list[Int64]:
    """Rows in ascending history length, cut so that a padded block stays small and wastes little."""
    blocks, start = [], 0
    while start < len(order):
        stop = start
        longest = int(sizes[order[start]])
        while stop < len(order):
            longest = int(sizes[order[stop]])
            per_row = longest * (8 * width + 16 * longest)
            if stop > start and ((stop + 1 - start) * per_row > FOLD_BYTES or longest > 1.25 * sizes[order[start]] + 4):
                break
            stop += 1
        blocks.append(order[start:stop])
        start = stop
    return blocks


def _padded(indptr: Int32, rows: Int64, sizes: Int64) -> tuple[Int64, Bool]:
    """Places of each row's entries [b, H] padded to the longest row, and which places are real."""
    step = np.arange(int(sizes[rows].max()))[None, :]
    real = step < sizes[rows][:, None]
    return np.where(real, indptr[rows][:, None] + step, 0), real
