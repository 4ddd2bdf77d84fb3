"""The metrics, as pure numpy over lists of int32 item codes: accuracy by exact definitions, and what lies beyond accuracy.

Definitions, macro-averaged over users with at least one relevant item (``rel`` = a user's distinct relevant items):

    recall@k     hits in the first k / |rel|
    precision@k  hits in the first k / k
    ndcg@k       sum of 1 / log2(rank + 1) over hits, divided by that sum for min(k, |rel|) hits at the top (binary gain)
    map@k        sum of precision@rank over hits / min(k, |rel|)
    map_trec@k   the same sum / |rel| (the trec_eval variant)
    mrr@k        1 / rank of the first hit, 0 without one
    hit@k        1 if there is a hit

Shapes: B users, K list positions, I items, D dimensions. -1 pads a list; it is never a hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maple.data.dataset import Bool, Float32, Int32, Int64
from maple.errors import DataError

Float64: TypeAlias = npt.NDArray[np.float64]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]

#: Metrics of the lists themselves, whatever the users did next.
LIST_LEVEL = ("coverage", "gini", "diversity", "novelty", "popularity_rank", "fill")

_CHUNK = 4096  # rows at a time where a temporary is B x K x something


def check_lists(lists: Int32, num_items: int | None = None) -> None:
    """``DataError`` unless lists are integers [B, K] with codes >= -1 (below ``num_items``), padded at the end only, without duplicates."""
    if lists.ndim != 2 or not np.issubdtype(lists.dtype, np.integer):
        raise DataError(f"recommendation lists must be integers of shape [users, positions], got {lists.dtype} of shape {lists.shape}")
    if lists.size == 0:
        return
    if int(lists.min()) < -1:
        row = int(np.argmax((lists < -1).any(axis=1)))
        raise DataError(f"list {row} holds item code {int(lists[row].min())}; codes are >= 0, and -1 pads")
    if num_items is not None and int(lists.max()) >= num_items:
        row = int(np.argmax((lists >= num_items).any(axis=1)))
        raise DataError(f"list {row} holds item code {int(lists[row].max())}, but the catalogue has only {num_items} items")
    gap = ((lists[:, :-1] < 0) & (lists[:, 1:] >= 0)).any(axis=1)
    if gap.any():
        raise DataError(f"list {int(np.argmax(gap))} has an item after a pad (-1); pads belong at the end")
    ordered = np.sort(lists, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        row = int(np.argmax(twice))
        values, counts = np.unique(lists[row][lists[row] >= 0], return_counts=True)
        raise DataError(f"list {row} holds item {int(values[np.argmax(counts)])} more than once; a hit may count only once")


def hit_matrix(lists: Int32, relevant_offsets: Int64, relevant_items: Int32) -> Bool:
    """For each position of each list whether its item is relevant, bool[B, K].

    ``relevant_items[relevant_offsets[b]:relevant_offsets[b + 1]]`` belong to user b. ``DataError`` if the two disagree in
    length, or a user has no relevant item, or one twice.
    """
    sizes = np.diff(relevant_offsets)
    if len(sizes) != len(lists) or int(relevant_offsets[0]) != 0 or int(relevant_offsets[-1]) != len(relevant_items):
        raise DataError(
            f"{len(lists)} lists, but the relevant items are of {len(sizes)} users (offsets {int(relevant_offsets[0])}.."
            f"{int(relevant_offsets[-1])} over {len(relevant_items)} items); both must describe the same users in the same order"
        )
    if (sizes <= 0).any():
        raise DataError(f"user row {int(np.argmax(sizes <= 0))} has no relevant item; leave such users out before measuring")
    if len(relevant_items) == 0:
        return np.zeros(lists.shape, dtype=bool)
    if int(relevant_items.min()) < 0:
        raise DataError("a relevant item has a negative code; leave unknown items out before measuring, and count them")
    base = max(int(relevant_items.max()), int(lists.max(initial=-1))) + 1
    keys = np.sort(np.repeat(np.arange(len(sizes), dtype=np.int64), sizes) * base + relevant_items)
    if (keys[1:] == keys[:-1]).any():
        raise DataError("a user has a relevant item twice; relevant items are distinct")
    wanted = np.arange(len(lists), dtype=np.int64)[:, None] * base + lists
    found = np.minimum(np.searchsorted(keys, wanted.ravel()), len(keys) - 1).reshape(lists.shape)
    return np.asarray((keys[found] == wanted) & (lists >= 0))


def ranking_metrics(lists: Int32, relevant_offsets: Int64, relevant_items: Int32, ks: Sequence[int] = (5, 10, 20)) -> dict[str, Float64]:
    """Every accuracy metric of this file's docstring at every k, per user: ``{"ndcg@10": float64[B], ...}``.

    ``lists`` int32[B, K], best first, K >= max(ks). ``DataError`` where lists or relevant items are not as described above.
    """
    check_lists(lists)
    check_ks(ks, lists.shape[1])
    width = max(ks)
    hits = hit_matrix(lists[:, :width], relevant_offsets, relevant_items).astype(np.float64)
    sizes = np.diff(relevant_offsets).astype(np.float64)
    ranks = np.arange(1, width + 1, dtype=np.float64)
    discounts = 1.0 / np.log2(ranks + 1.0)
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    found = np.cumsum(hits, axis=1)
    gain = np.cumsum(hits * discounts, axis=1)
    precision_sum = np.cumsum(hits * found / ranks, axis=1)
    first = np.where(hits.any(axis=1), np.argmax(hits, axis=1) + 1.0, np.inf)
    out: dict[str, Float64] = {}
    for k in ks:
        reachable = np.minimum(sizes, k)
        out[f"recall@{k}"] = found[:, k - 1] / sizes
        out[f"precision@{k}"] = found[:, k - 1] / k
        out[f"ndcg@{k}"] = gain[:, k - 1] / ideal[reachable.astype(np.int64)]
        out[f"map@{k}"] = precision_sum[:, k - 1] / reachable
        out[f"map_trec@{k}"] = precision_sum[:, k - 1] / sizes
        out[f"mrr@{k}"] = np.where(first <= k, 1.0 / first, 0.0)
        out[f"hit@{k}"] = (first <= k).astype(np.float64)
    return out


def check_ks(ks: Sequence[int], width: int) -> None:
    """``DataError`` unless every cut-off is a positive integer within the lists' width, and there is at least one."""
    if not ks or any(k < 1 for k in ks) or len(set(ks)) != len(ks):
        raise DataError(f"cut-offs must be distinct positive integers, got {list(ks)}")
    if max(ks) > width:
        raise DataError(f"metrics at {max(ks)} need lists of at least {max(ks)} positions, these have {width}; ask for longer ones")


def rank_of(scores: Floats, targets: Int32) -> Float64:
    """The rank of each row's target column, float64[B]: 1 + #greater + #equal / 2, so a constant scorer lands in the middle.

    ``scores`` float[B, N], ``targets`` int[B]. NaN anywhere is a ``DataError``.
    """
    if scores.ndim != 2 or targets.shape != (len(scores),):
        raise DataError(f"scores must be [B, N] and targets [B], got {scores.shape} and {targets.shape}")
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= scores.shape[1]):
        raise DataError(f"a target is outside the {scores.shape[1]} scored columns")
    if np.isnan(scores).any():
        row = int(np.argmax(np.isnan(scores).any(axis=1)))
        raise DataError(f"row {row} of the scores holds NaN; a model that has no opinion answers -inf, NaN is a failure")
    own = scores[np.arange(len(scores)), targets][:, None]
    greater = (scores > own).sum(axis=1)
    equal = (scores == own).sum(axis=1) - 1
    return np.asarray(1.0 + greater + equal / 2.0, dtype=np.float64)


def rank_metrics(ranks: Float64, ks: Sequence[int] = (5, 10, 20)) -> dict[str, Float64]:
    """``hit@k``, ``ndcg@k`` and ``mrr@k`` per user where each has one relevant item at a (possibly fractional) rank: leave-one-out."""
    out: dict[str, Float64] = {}
    for k in ks:
        hit = ranks <= k
        out[f"hit@{k}"] = hit.astype(np.float64)
        out[f"ndcg@{k}"] = np.where(hit, 1.0 / np.log2(ranks + 1.0), 0.0)
        out[f"mrr@{k}"] = np.where(hit, 1.0 / ranks, 0.0)
    return out


# -- beyond accuracy; an empty list earns 0 everywhere, so that serving nothing never looks good -----------------------


def exposure(lists: Int32, num_items: int) -> Int64:
    """How often each item is in a list, int64[I]."""
    return np.bincount(lists[lists >= 0], minlength=num_items).astype(np.int64)


def coverage(lists: Int32, num_items: int) -> float:
    """Distinct recommended items / catalogue size."""
    return float((exposure(lists, num_items) > 0).sum() / num_items)


def gini(counts: Int64) -> float:
    """Gini coefficient of exposure over the whole catalogue: 0 = every item equally often, towards 1 = one item takes all."""
    total, size = int(counts.sum()), len(counts)
    if total == 0:
        return 0.0
    ascending = np.sort(counts).astype(np.float64)
    return float(2.0 * (np.arange(1, size + 1) * ascending).sum() / (size * total) - (size + 1) / size)


def fill(lists: Int32) -> Float64:
    """The share of a list's positions that hold an item, float64[B]."""
    return np.asarray((lists >= 0).mean(axis=1), dtype=np.float64)


def diversity_by_vector(lists: Int32, vectors: Float32) -> Float64:
    """Mean cosine distance (1 - cosine, in [0, 2]) over the pairs of each list, float64[B]; 0 for fewer than two items.

    ``vectors`` float[I, D]. A zero vector has distance 1 to everything: nothing is known of its likeness.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise DataError(f"the vector of item {int(np.argmin(np.isfinite(norms[:, 0])))} is not finite; diversity needs finite item vectors")
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    out = np.zeros(len(lists))
    for start in range(0, len(lists), _CHUNK):
        part = lists[start : start + _CHUNK]
        picked = unit[np.maximum(part, 0)] * (part >= 0)[:, :, None]
        total = picked.sum(axis=1, dtype=np.float64)
        own = np.einsum("bkd,bkd->b", picked, picked, dtype=np.float64)
        similarity = (np.einsum("bd,bd->b", total, total) - own) / 2.0  # |sum v|^2 = sum |v|^2 + 2 * sum of the pairs' cosines
        out[start : start + _CHUNK] = _per_pair(similarity, part)
    return out


def diversity_by_category(lists: Int32, categories: Int32) -> Float64:
    """The share of each list's pairs that differ in category, float64[B]; 0 for fewer than two items.

    ``categories`` int32[I]; -1 (unknown) differs from everything.
    """
    out = np.zeros(len(lists))
    for start in range(0, len(lists), _CHUNK):
        part = lists[start : start + _CHUNK]
        label = np.where(part >= 0, categories[np.maximum(part, 0)], -1)
        known = label >= 0
        same = (label[:, :, None] == label[:, None, :]) & known[:, :, None]
        equal_pairs = (same.sum(axis=(1, 2)) - known.sum(axis=1)) / 2.0
        out[start : start + _CHUNK] = _per_pair(equal_pairs, part)
    return out


def _per_pair(similarity: Float64, lists: Int32) -> Float64:
    """1 - (summed similarity of the pairs / number of pairs), 0 where there is no pair."""
    size = (lists >= 0).sum(axis=1)
    pairs = size * (size - 1) / 2.0
    return np.where(pairs > 0, 1.0 - similarity / np.maximum(pairs, 1.0), 0.0)


def self_information(users_per_item: Int64, num_users: int) -> Float64:
    """-log2 of the share of users who have each item, bits, float64[I] (Zhou et al. 2010); nobody's item counts as one user's."""
    if num_users < 1 or int(users_per_item.max(initial=0)) > num_users:
        raise DataError(f"an item cannot have {int(users_per_item.max(initial=0))} users where there are {num_users}")
    return np.asarray(-np.log2(np.maximum(users_per_item, 1) / num_users), dtype=np.float64)


def popularity_rank(users_per_item: Int64) -> Float64:
    """Each item's place by popularity, float64[I]: 1 = most popular, equals share their mean place."""
    _, group, sizes = np.unique(-users_per_item, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return np.asarray((last - (sizes - 1) / 2.0)[group.reshape(-1)], dtype=np.float64)


def mean_over_list(lists: Int32, values: Floats) -> Float64:
    """The mean of an item value (self-information, popularity rank, price ...) over each list, float64[B]; 0 for an empty list."""
    present = lists >= 0
    total = np.where(present, values[np.maximum(lists, 0)], 0.0).sum(axis=1)
    return np.asarray(total / np.maximum(present.sum(axis=1), 1), dtype=np.float64)
