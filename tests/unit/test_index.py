"""Top-k against a slow reference, the edge cases of masks and padding, and FAISS against the exact product."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.errors import ArtifactError, ConfigError, DataError
from maple.index import ExactIndex, FaissIndex, IndexConfig, build_index, tie_ranks, topk_product, topk_ragged, topk_scores


def slow_topk(scores, k, tie, allowed, exclude):
    """Sort every row as Python tuples."""
    items = np.full((len(scores), k), -1, np.int32)
    best = np.full((len(scores), k), -np.inf, np.float32)
    for row, values in enumerate(scores):
        barred = set() if exclude is None else set(exclude[1][exclude[0][row] : exclude[0][row + 1]].tolist())
        keep = [i for i, v in enumerate(values) if v != -np.inf and i not in barred and (allowed is None or allowed[i])]
        for place, item in enumerate(sorted(keep, key=lambda i: (-values[i], tie[i]))[:k]):
            items[row, place], best[row, place] = item, values[item]
    return items, best


@st.composite
def problems(draw):
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.choice(np.array([-np.inf, -2.5, -1, 0, 0.5, 1, 7, np.inf], np.float32), size=(rows, columns))
    allowed = rng.random(columns) < 0.7 if draw(st.booleans()) else None
    exclude = None
    if draw(st.booleans()):
        sizes = rng.integers(0, 5, rows)
        exclude = (np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), rng.integers(-1, columns, sizes.sum()).astype(np.int32))
    return scores, draw(st.integers(0, 30)), rng.permutation(columns).astype(np.int32), allowed, exclude


@given(problems())
@settings(max_examples=300, deadline=None)
def test_dense_and_ragged_equal_the_slow_reference(problem):
    scores, k, tie, allowed, exclude = problem
    want_items, want_scores = slow_topk(scores, k, tie, allowed, exclude)
    items, best = topk_scores(scores, k, tie=tie, allowed=allowed, exclude=exclude)
    np.testing.assert_array_equal(items, want_items)
    np.testing.assert_array_equal(best, want_scores)
    rows, columns = scores.shape
    shuffled = np.argsort(np.random.default_rng(0).random(scores.shape), axis=1)
    offsets = np.arange(rows + 1, dtype=np.int64) * columns
    flat_items = shuffled.astype(np.int32).ravel()
    flat_scores = np.take_along_axis(scores, shuffled, axis=1).ravel()
    items, best = topk_ragged(offsets, flat_items, flat_scores, k, tie=tie, allowed=allowed, exclude=exclude)
    np.testing.assert_array_equal(items, want_items)
    np.testing.assert_array_equal(best, want_scores)


@given(st.integers(0, 2**32 - 1), st.integers(0, 7), st.integers(1, 40), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_product_is_the_reference_of_its_scores_whatever_the_blocks(seed, rows, columns, width, k):
    rng = np.random.default_rng(seed)
    queries = rng.integers(-3, 4, (rows, width)).astype(np.float32)  # small integers: products are exact, ties are many
    items = rng.integers(-3, 4, (columns, width)).astype(np.float32)
    tie = rng.permutation(columns).astype(np.int32)
    exclude = (np.arange(rows + 1, dtype=np.int64), rng.integers(-1, columns, rows).astype(np.int32))
    want = slow_topk(queries @ items.T, k, tie, None, exclude)
    for block_bytes in (1, 4 * columns * 2, 1 << 20):
        got = topk_product(queries, items, k, tie=tie, exclude=exclude, block_bytes=block_bytes)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_nan_is_an_error_wherever_it_stands():
    for place in (0, 5, 9):
        scores = np.arange(10, dtype=np.float32)[None].repeat(2, axis=0)[:, ::-1].copy()
        scores[1, place] = np.nan
        with pytest.raises(DataError, match="1 rows of scores contain NaN"):
            topk_scores(scores, 2)
    with pytest.raises(DataError, match="NaN"):
        topk_ragged(np.array([0, 2]), np.array([0, 1], np.int32), np.array([1, np.nan], np.float32), 1, tie=np.arange(2, dtype=np.int32))


def test_masked_items_that_would_win_never_appear_and_short_rows_are_padded():
    scores = np.array([[5, 4, 3, 2]], np.float32)
    items, best = topk_scores(
        scores, 6, allowed=np.array([True, False, True, True]), exclude=(np.array([0, 3]), np.array([0, -1, 99], np.int32))
    )
    assert items.tolist() == [[2, 3, -1, -1, -1, -1]]
    assert best.tolist() == [[3, 2, -np.inf, -np.inf, -np.inf, -np.inf]]


def test_negative_k_is_refused():
    with pytest.raises(ConfigError, match="k is -1"):
        topk_scores(np.zeros((1, 2), np.float32), -1)


def test_tie_ranks_are_a_permutation_that_depends_on_the_id_alone():
    ids = [f"item {n}" for n in range(500)]
    ranks = tie_ranks(ids)
    assert sorted(ranks.tolist()) == list(range(500))
    kept = ranks[::2]
    np.testing.assert_array_equal(np.argsort(tie_ranks(ids[::2])), np.argsort(kept))
    assert abs(np.corrcoef(ranks, np.arange(500))[0, 1]) < 0.15  # no hint of the order of the catalogue


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(30, 16))
    items = (centres[rng.integers(0, 30, 3000)] + 0.3 * rng.normal(size=(3000, 16))).astype(np.float32)
    queries = (centres[rng.integers(0, 30, 20)] + 0.3 * rng.normal(size=(20, 16))).astype(np.float32)
    return queries, items, tie_ranks(str(n) for n in range(3000))


def test_flat_faiss_is_the_exact_search_under_masks(vectors):
    queries, items, tie = vectors
    rng = np.random.default_rng(4)
    allowed = rng.random(3000) < 0.5
    exclude = (np.arange(21, dtype=np.int64) * 10, rng.integers(-1, 3000, 200).astype(np.int32))
    flat = FaissIndex.build(items, tie, "flat")
    for kwargs in ({}, {"allowed": allowed}, {"exclude": exclude}, {"allowed": allowed, "exclude": exclude}):
        want, got = ExactIndex(items, tie).search(queries, 25, **kwargs), flat.search(queries, 25, **kwargs)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_ivf_finds_most_of_the_exact_answer_and_all_of_it_when_it_probes_every_list(vectors):
    queries, items, tie = vectors
    exact = ExactIndex(items, tie).search(queries, 20)[0]

    def recall(found):
        return np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])

    ivf = FaissIndex.build(items, tie, "ivf", lists=50, probes=8)
    assert recall(ivf.search(queries, 20)[0]) > 0.9
    assert recall(FaissIndex(ivf.index, tie, probes=50).search(queries, 20)[0]) == 1.0
    assert (ivf.search(queries, 20, allowed=np.zeros(3000, bool))[0] == -1).all()


def test_ivf_built_twice_is_the_same_and_survives_its_bytes(vectors):
    queries, items, tie = vectors
    one, two = (FaissIndex.build(items, tie, "ivf", lists=40, seed=5) for _ in range(2))
    assert one.to_bytes() == two.to_bytes()
    again = FaissIndex.from_bytes(one.to_bytes(), tie)
    np.testing.assert_array_equal(again.search(queries, 10)[0], one.search(queries, 10)[0])
    with pytest.raises(ArtifactError, match="cannot be read"):
        FaissIndex.from_bytes(one.to_bytes()[:200], tie)
    with pytest.raises(ArtifactError, match="holds 3000 items"):
        FaissIndex.from_bytes(one.to_bytes(), tie[:10])


def test_auto_chooses_by_size(vectors):
    _, items, tie = vectors
    assert isinstance(build_index(items, tie, IndexConfig()), ExactIndex)
    assert isinstance(build_index(items, tie, IndexConfig(exact_below=3000)), FaissIndex)
    assert isinstance(build_index(items, tie, IndexConfig(kind="flat")), FaissIndex)
