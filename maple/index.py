"""Top-k: the exact blocked product and FAISS behind one function, and top-k of dense or ragged scores.

One compiled scan finds the k best of a row in a single pass: a heap under the order (score descending, tie rank
ascending), masks looked at only for items that would enter the heap. Ties break by a fixed pseudo-random rank of the
item id (``tie_ranks``), so that results are reproducible and never flatter a code order. -1 / -inf pad short rows, an
item scored -inf is never returned, NaN is an error. Shapes: B queries, I items, D dimensions, N candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Bool, Float32, Int32, Int64
from maple.errors import ArtifactError, ConfigError, DataError
from maple.hashing import stable_hash

#: Ragged items that each query may not get: offsets int64[B+1] and codes int32; -1 is ignored.
Exclude: TypeAlias = tuple[Int64, Int32]

#: Bytes of scores held at once by a blocked product.
BLOCK_BYTES = 32 << 20


class IndexConfig(Section):
    """How an embedding model searches its items."""

    kind: Literal["auto", "exact", "flat", "ivf"] = "auto"
    """auto: exact below ``exact_below`` items, else ivf. exact: a blocked product. flat, ivf: FAISS."""
    exact_below: int = Field(default=200_000, ge=0)
    """Number of items from which ``auto`` turns to FAISS."""
    lists: int = Field(default=0, ge=0)
    """Inverted lists of ivf; 0 = about four times the square root of the number of items."""
    probes: int = Field(default=32, ge=1)
    """Lists looked into per query; more is slower and nearer to exact."""


def tie_ranks(ids: Iterable[str]) -> Int32:
    """A fixed pseudo-random rank per item id, int32[I]: of equal scores the lower rank comes first."""
    hashes = np.fromiter((stable_hash("tie", text) for text in ids), dtype=np.uint64)
    ranks = np.empty(len(hashes), np.int32)
    ranks[np.argsort(hashes, kind="stable")] = np.arange(len(hashes), dtype=np.int32)
    return ranks


def topk_scores(
    scores: Float32, k: int, *, tie: Int32 | None = None, allowed: Bool | None = None, exclude: Exclude | None = None
) -> tuple[Int32, Float32]:
    """The k best columns of each row of dense scores [B, I]: (int32[B, k], float32[B, k]), best first.

    ``allowed`` bool[I] restricts all rows, ``exclude`` one row each. Raises ``DataError`` where a score is NaN.
    """
    num_queries, num_items = scores.shape
    items, best = _blank(num_queries, k)
    _scan_into(scores, 0, items, best, _ties(tie, num_items), _allowed(allowed), _exclude(exclude, num_queries))
    return items, best


def topk_product(
    queries: Float32,
    items: Float32,
    k: int,
    *,
    tie: Int32 | None = None,
    allowed: Bool | None = None,
    exclude: Exclude | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Int32, Float32]:
    """The k best items of each query by inner product, exact: queries [B, D] x items [I, D] in blocks of queries."""
    num_queries, num_items = len(queries), len(items)
    found, best = _blank(num_queries, k)
    ties, mask, excluded = _ties(tie, num_items), _allowed(allowed), _exclude(exclude, num_queries)
    rows = max(1, block_bytes // (4 * max(1, num_items)))
    for start in range(0, num_queries, rows):
        block = queries[start : start + rows]
        scores = (items @ block[0])[None] if len(block) == 1 else block @ items.T
        _scan_into(scores, start, found, best, ties, mask, excluded)
    return found, best


def topk_ragged(
    offsets: Int64, items: Int32, scores: Float32, k: int, *, tie: Int32, allowed: Bool | None = None, exclude: Exclude | None = None
) -> tuple[Int32, Float32]:
    """The k best of ragged candidates: row b has ``items[offsets[b]:offsets[b+1]]`` with their scores, each item once."""
    num_queries = len(offsets) - 1
    found, best = _blank(num_queries, k)
    if k > 0:
        bad = _scan_ragged(offsets, items, scores, tie, *_allowed(allowed), *_exclude(exclude, num_queries), found, best)
        _refuse_nan(bad)
    return found, best


# -- indexes: one search for all --------------------------------------------------------------------------------------


class ItemIndex(Protocol):
    """Finds the best items of query vectors."""

    def search(self, queries: Float32, k: int, *, allowed: Bool | None = None, exclude: Exclude | None = None) -> tuple[Int32, Float32]:
        """(int32[B, k], float32[B, k]) by inner product, best first, padded with -1 and -inf."""


@dataclass(frozen=True, eq=False)
class ExactIndex:
    """All items by a blocked product: always right, and fast enough to some hundred thousand items."""

    items: Float32
    tie: Int32

    def search(self, queries: Float32, k: int, *, allowed: Bool | None = None, exclude: Exclude | None = None) -> tuple[Int32, Float32]:
        return topk_product(queries, self.items, k, tie=self.tie, allowed=allowed, exclude=exclude)


@dataclass(frozen=True, eq=False)
class FaissIndex:
    """A FAISS inner-product index: flat (exact) or ivf (approximate). Derived from the item vectors, so it can be rebuilt."""

    index: Any
    tie: Int32
    probes: int = field(default=32)

    @staticmethod
    def build(
        items: Float32, tie: Int32, kind: Literal["flat", "ivf"] = "ivf", *, lists: int = 0, probes: int = 32, seed: int = 0
    ) -> FaissIndex:
        """Train and fill an index over items [I, D]."""
        faiss = _faiss()
        vectors = np.ascontiguousarray(items, dtype=np.float32)
        num_items, width = vectors.shape
        quantizer = faiss.IndexFlatIP(width)
        index = quantizer
        if kind == "ivf" and num_items >= 64:
            lists = min(lists or round(4 * num_items**0.5), max(1, num_items // 39))
            index = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = seed & 0x7FFFFFFF
            index.train(vectors)
        index.add(vectors)
        return FaissIndex(index, tie, probes)

    def to_bytes(self) -> bytes:
        """The index as FAISS's own serialisation; ``from_bytes`` is the inverse."""
        return bytes(_faiss().serialize_index(self.index).tobytes())

    @staticmethod
    def from_bytes(data: bytes, tie: Int32, probes: int = 32) -> FaissIndex:
        """The index again; ``ArtifactError`` where the bytes are not one for these items."""
        try:
            index = _faiss().deserialize_index(np.frombuffer(data, dtype=np.uint8))
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ArtifactError(f"the search index cannot be read ({why}); build it again from the item vectors") from None
        if index.ntotal != len(tie):
            raise ArtifactError(f"the search index holds {index.ntotal} items, the bundle {len(tie)}; build it again from the item vectors")
        return FaissIndex(index, tie, probes)

    def search(self, queries: Float32, k: int, *, allowed: Bool | None = None, exclude: Exclude | None = None) -> tuple[Int32, Float32]:
        """As ``ExactIndex.search``; looks ``max(excluded)`` places deeper so that exclusions leave k items."""
        faiss = _faiss()
        num_queries, num_items = len(queries), len(self.tie)
        if not np.isfinite(queries).all():
            raise DataError(_NAN.format(rows=int((~np.isfinite(queries).all(axis=1)).sum())))
        deepest = 0 if exclude is None or num_queries == 0 else int(np.diff(exclude[0]).max())
        depth = min(num_items, k + deepest)
        if depth == 0 or num_queries == 0:
            return _blank(num_queries, k)
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(num_items, faiss.swig_ptr(bits))
        if hasattr(self.index, "nprobe"):
            params = faiss.SearchParametersIVF(sel=selector, nprobe=min(self.probes, self.index.nlist))
        else:
            params = faiss.SearchParameters(sel=selector) if selector is not None else None
        scores, found = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), depth, params=params)
        hit = found >= 0
        offsets = np.concatenate([[0], np.cumsum(hit.sum(axis=1))]).astype(np.int64)
        return topk_ragged(offsets, found[hit].astype(np.int32), scores[hit], k, tie=self.tie, exclude=exclude)


def build_index(items: Float32, tie: Int32, config: IndexConfig, seed: int = 0) -> ItemIndex:
    """The index that the settings ask for over items [I, D]."""
    kind = config.kind
    if kind == "auto":
        kind = "exact" if len(items) < config.exact_below else "ivf"
    if kind == "exact":
        return ExactIndex(np.ascontiguousarray(items, dtype=np.float32), tie)
    return FaissIndex.build(items, tie, kind, lists=config.lists, probes=config.probes, seed=seed)


def _faiss() -> Any:
    import faiss  # 0.2 s and a thread pool: only for those who search with it

    return faiss


# -- the scan ---------------------------------------------------------------------------------------------------------

_NAN = "{rows} rows of scores contain NaN: the model diverged or its state is damaged. Fit it again, or load another bundle."


def _blank(num_queries: int, k: int) -> tuple[Int32, Float32]:
    if k < 0:
        raise ConfigError(f"k is {k}; it must be 0 or more")
    return np.full((num_queries, k), -1, np.int32), np.full((num_queries, k), -np.inf, np.float32)


def _ties(tie: Int32 | None, num_items: int) -> Int32:
    return np.arange(num_items, dtype=np.int32) if tie is None else tie


def _allowed(allowed: Bool | None) -> tuple[bool, Bool]:
    return (False, np.empty(0, np.bool_)) if allowed is None else (True, allowed)


def _exclude(exclude: Exclude | None, num_queries: int) -> Exclude:
    if exclude is None:
        return np.zeros(num_queries + 1, np.int64), np.empty(0, np.int32)
    assert len(exclude[0]) == num_queries + 1, "exclude has one ragged row per query"
    return exclude


def _refuse_nan(bad: int) -> None:
    if bad:
        raise DataError(_NAN.format(rows=bad))


def _scan_into(
    scores: npt.NDArray[Any], start: int, items: Int32, best: Float32, tie: Int32, allowed: tuple[bool, Bool], exclude: Exclude
) -> None:
    """Fill rows ``start`` onwards of the answer from a block of dense scores; ``exclude`` belongs to the whole answer."""
    rows = slice(start, start + len(scores))
    if items.shape[1] == 0 or len(scores) == 0:
        return
    block = np.ascontiguousarray(scores, dtype=np.float32)
    offsets = exclude[0][start : start + len(scores) + 1]
    _refuse_nan(_scan_dense(block, tie, *allowed, offsets, exclude[1], items[rows], best[rows]))


@numba.njit(cache=True, nogil=True)
def _sift(items: Any, scores: Any, tie: Any, place: int, size: int) -> None:
    """Let the entry at ``place`` sink; the root of the heap is the worst entry."""
    item, score = items[place], scores[place]
    rank = tie[item]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (scores[other] < scores[child] or (scores[other] == scores[child] and tie[items[other]] > tie[items[child]])):
            child = other
        if scores[child] < score or (scores[child] == score and tie[items[child]] > rank):
            items[place], scores[place] = items[child], scores[child]
            place = child
        else:
            break
    items[place], scores[place] = item, score


@numba.njit(cache=True, nogil=True)
def _sort(items: Any, scores: Any, tie: Any, size: int) -> None:
    """Turn a heap of ``size`` entries into best first."""
    while size > 1:
        size -= 1
        items[0], items[size] = items[size], items[0]
        scores[0], scores[size] = scores[size], scores[0]
        _sift(items, scores, tie, 0, size)


@numba.njit(cache=True, nogil=True)
def _offer(items: Any, scores: Any, tie: Any, size: int, k: int, item: int, score: float) -> int:
    """Put one entry into a heap of at most k, which becomes a heap when it is full; returns its size."""
    if size < k:
        items[size], scores[size] = item, score
        size += 1
        if size == k:
            for place in range(k // 2 - 1, -1, -1):
                _sift(items, scores, tie, place, k)
    else:
        items[0], scores[0] = item, score
        _sift(items, scores, tie, 0, k)
    return size


@numba.njit(cache=True, nogil=True)
def _finish(items: Any, scores: Any, tie: Any, size: int, k: int) -> None:
    if size < k:
        for place in range(size // 2 - 1, -1, -1):
            _sift(items, scores, tie, place, size)
    _sort(items, scores, tie, size)


@numba.njit(cache=True, nogil=True)
def _scan_dense(
    scores: Any, tie: Any, use_allowed: bool, allowed: Any, offsets: Any, excluded: Any, out_items: Any, out_scores: Any
) -> int:
    """Top-k of each dense row into the outputs; returns how many rows hold a NaN."""
    num_rows, num_items = scores.shape
    k = out_items.shape[1]
    stamp = np.zeros(num_items if len(excluded) else 0, np.int32)
    bad = 0
    for row in range(num_rows):
        for place in range(offsets[row], offsets[row + 1]):
            if 0 <= excluded[place] < num_items:
                stamp[excluded[place]] = row + 1
        barred = offsets[row + 1] > offsets[row]
        items, best = out_items[row], out_scores[row]
        size, nan = 0, False
        for item in range(num_items):
            score = scores[row, item]
            if size == k and (score < best[0] or (score == best[0] and tie[item] > tie[items[0]])):
                continue
            if score != score:
                nan = True
                continue
            if score == -np.inf or (use_allowed and not allowed[item]) or (barred and stamp[item] == row + 1):
                continue
            size = _offer(items, best, tie, size, k, item, score)
        _finish(items, best, tie, size, k)
        bad += nan
    return bad


@numba.njit(cache=True, nogil=True)
def _scan_ragged(
    starts: Any, candidates: Any, scores: Any, tie: Any, use_allowed: bool, allowed: Any,
    offsets: Any, excluded: Any, out_items: Any, out_scores: Any,
) -> int:  # fmt: skip
    """Top-k of ragged rows into the outputs; returns how many rows hold a NaN. Candidates of -1 are passed over."""
    num_items = len(tie)
    k = out_items.shape[1]
    stamp = np.zeros(num_items if len(excluded) else 0, np.int32)
    bad = 0
    for row in range(len(starts) - 1):
        for place in range(offsets[row], offsets[row + 1]):
            if 0 <= excluded[place] < num_items:
                stamp[excluded[place]] = row + 1
        barred = offsets[row + 1] > offsets[row]
        items, best = out_items[row], out_scores[row]
        size, nan = 0, False
        for place in range(starts[row], starts[row + 1]):
            item, score = candidates[place], scores[place]
            if item < 0 or (size == k and (score < best[0] or (score == best[0] and tie[item] > tie[items[0]]))):
                continue
            if score != score:
                nan = True
                continue
            if score == -np.inf or (use_allowed and not allowed[item]) or (barred and stamp[item] == row + 1):
                continue
            size = _offer(items, best, tie, size, k, item, score)
        _finish(items, best, tie, size, k)
        bad += nan
    return bad
