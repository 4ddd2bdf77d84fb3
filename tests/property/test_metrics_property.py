"""The vectorised metrics against a slow reference written from the definitions, and what must hold for any input."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.evaluate import metrics

KS = (1, 2, 5, 8)
WIDTH, ITEMS = 8, 14


@st.composite
def users(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    size = draw(st.integers(1, 6))
    items = st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=WIDTH)
    some = st.lists(st.integers(0, ITEMS - 1), unique=True, min_size=1, max_size=ITEMS)
    return [draw(items) for _ in range(size)], [draw(some) for _ in range(size)]


def padded(lists: list[list[int]]) -> np.ndarray:
    return np.array([row + [-1] * (WIDTH - len(row)) for row in lists], dtype=np.int32)


def ragged(relevant: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in relevant])]).astype(np.int64)
    return offsets, np.array([item for items in relevant for item in items], dtype=np.int32)


def slow(row: list[int], relevant: set[int], k: int) -> dict[str, float]:
    """One user, by the book."""
    top = row[:k]
    hits = [rank for rank, item in enumerate(top, 1) if item in relevant]
    reachable = min(len(relevant), k)
    precisions = sum(sum(1 for item in top[:rank] if item in relevant) / rank for rank in hits)
    return {
        f"recall@{k}": len(hits) / len(relevant),
        f"precision@{k}": len(hits) / k,
        f"ndcg@{k}": sum(1 / math.log2(rank + 1) for rank in hits) / sum(1 / math.log2(rank + 1) for rank in range(1, reachable + 1)),
        f"map@{k}": precisions / reachable,
        f"map_trec@{k}": precisions / len(relevant),
        f"mrr@{k}": 1 / hits[0] if hits else 0.0,
        f"hit@{k}": 1.0 if hits else 0.0,
    }


@given(users())
@settings(max_examples=200, deadline=None)
def test_equal_to_the_slow_reference(case: tuple[list[list[int]], list[list[int]]]) -> None:
    lists, relevant = case
    found = metrics.ranking_metrics(padded(lists), *ragged(relevant), ks=KS)
    for user, (row, wanted) in enumerate(zip(lists, relevant, strict=True)):
        for k in KS:
            for name, value in slow(row, set(wanted), k).items():
                assert math.isclose(found[name][user], value, abs_tol=1e-12), name


@given(users())
@settings(max_examples=60, deadline=None)
def test_within_bounds_monotone_and_independent_of_other_users(case: tuple[list[list[int]], list[list[int]]]) -> None:
    lists, relevant = case
    found = metrics.ranking_metrics(padded(lists), *ragged(relevant), ks=KS)
    alone = [metrics.ranking_metrics(padded([row]), *ragged([wanted]), ks=KS) for row, wanted in zip(lists, relevant, strict=True)]
    for name, values in found.items():
        assert ((values >= 0) & (values <= 1 + 1e-12)).all(), name
        np.testing.assert_array_equal(values, [one[name][0] for one in alone])
    for name in ("recall", "hit", "mrr", "map_trec"):
        for small, large in itertools.pairwise(KS):
            assert (found[f"{name}@{small}"] <= found[f"{name}@{large}"] + 1e-12).all(), name


@given(users())
@settings(max_examples=40, deadline=None)
def test_the_relevant_items_first_are_perfect(case: tuple[list[list[int]], list[list[int]]]) -> None:
    _, relevant = case
    best = [(wanted + [item for item in range(ITEMS) if item not in wanted])[:WIDTH] for wanted in relevant]
    found = metrics.ranking_metrics(padded(best), *ragged(relevant), ks=KS)
    for k in KS:
        for name in ("ndcg", "map", "mrr", "hit"):
            np.testing.assert_allclose(found[f"{name}@{k}"], 1.0)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, -np.inf]), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_rank_of_is_the_mean_place_over_all_orders_of_the_ties(rows: list[list[float]], target: int) -> None:
    found = metrics.rank_of(np.array(rows), np.full(len(rows), target, dtype=np.int32))
    for row, rank in zip(rows, found, strict=True):
        best = 1 + sum(1 for score in row if score > row[target])
        worst = sum(1 for score in row if score >= row[target])
        assert rank == (best + worst) / 2


@given(users(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_diversity_equals_all_pairs_by_hand(case: tuple[list[list[int]], list[list[int]]], seed: int) -> None:
    lists, _ = case
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(ITEMS, 3))
    vectors[random.random(ITEMS) < 0.2] = 0.0
    categories = random.integers(-1, 3, ITEMS).astype(np.int32)
    by_vector = metrics.diversity_by_vector(padded(lists), vectors)
    by_category = metrics.diversity_by_category(padded(lists), categories)
    for user, row in enumerate(lists):
        pairs = [(a, b) for place, a in enumerate(row) for b in row[place + 1 :]]
        if not pairs:
            assert by_vector[user] == by_category[user] == 0.0
            continue
        cosine = [float(vectors[a] @ vectors[b] / (np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b]) or 1.0)) for a, b in pairs]
        assert math.isclose(by_vector[user], 1 - sum(cosine) / len(pairs), abs_tol=1e-9)
        differ = [0.0 if categories[a] == categories[b] >= 0 else 1.0 for a, b in pairs]
        assert math.isclose(by_category[user], sum(differ) / len(pairs), abs_tol=1e-12)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_gini_and_popularity_rank_against_their_definitions(counts: list[int]) -> None:
    array = np.array(counts, dtype=np.int64)
    total = sum(counts)
    if total:
        differences = sum(abs(a - b) for a in counts for b in counts)
        assert math.isclose(metrics.gini(array), differences / (2 * len(counts) * total), abs_tol=1e-9)
    ranks = metrics.popularity_rank(array)
    assert math.isclose(ranks.sum(), len(counts) * (len(counts) + 1) / 2)
    for item, count in enumerate(counts):
        above, level = sum(1 for other in counts if other > count), sum(1 for other in counts if other == count)
        assert ranks[item] == above + (level + 1) / 2
