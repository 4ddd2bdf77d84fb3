"""Metrics: what is refused, edge cases, known answers beyond accuracy, and resampling."""

from __future__ import annotations

import numpy as np
import pytest

from maple.errors import DataError
from maple.evaluate import metrics
from maple.evaluate.bootstrap import bootstrap_means, interval, sign_flip_p
from maple.hashing import rng

ONE = (np.array([0, 1], dtype=np.int64), np.array([2], dtype=np.int32))


def lists(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int32)


@pytest.mark.parametrize(
    ("rows", "offsets", "items", "ks", "says"),
    [
        (lists([1, 1, 2]), [0, 1], [2], (3,), "more than once"),
        (lists([1, -1, 2]), [0, 1], [2], (3,), "after a pad"),
        (lists([1, -2, -2]), [0, 1], [2], (3,), "-1 pads"),
        (lists([1, 2, 3]), [0, 1], [2], (5,), "at least 5 positions"),
        (lists([1, 2, 3]), [0, 1], [2], (0,), "positive"),
        (lists([1, 2, 3]), [0, 1], [2], (), "positive"),
        (lists([1, 2, 3]), [0, 0], [], (3,), "user row 0 has no relevant item"),
        (lists([1, 2, 3], [1, 2, 3]), [0, 1], [2], (3,), "2 lists"),
        (lists([1, 2, 3]), [0, 2], [2], (3,), "same users"),
        (lists([1, 2, 3]), [0, 2], [2, 2], (3,), "relevant item twice"),
        (lists([1, 2, 3]), [0, 1], [-1], (3,), "negative code"),
        (np.array([[0.5, 1.0]]), [0, 1], [2], (1,), "integers"),
        (np.array([1, 2, 3]), [0, 1], [2], (1,), "shape"),
    ],
)
def test_wrong_input_is_named(rows: np.ndarray, offsets: list[int], items: list[int], ks: tuple[int, ...], says: str) -> None:
    with pytest.raises(DataError, match=says):
        metrics.ranking_metrics(rows, np.array(offsets, dtype=np.int64), np.array(items, dtype=np.int32), ks)


def test_an_item_beyond_the_catalogue_is_named() -> None:
    with pytest.raises(DataError, match=r"list 1 holds item code 9.*only 5 items"):
        metrics.check_lists(lists([0, 1], [9, 1]), 5)


def test_an_empty_list_scores_zero_and_pads_never_hit() -> None:
    found = metrics.ranking_metrics(lists([-1, -1, -1]), *ONE, ks=(1, 3))
    assert all(values.tolist() == [0.0] for values in found.values())


def test_no_users_gives_empty_arrays() -> None:
    empty = np.empty((0, 3), np.int32)
    found = metrics.ranking_metrics(empty, np.zeros(1, np.int64), np.empty(0, np.int32), ks=(3,))
    assert found["ndcg@3"].shape == (0,)


def test_rank_of_a_constant_scorer_is_the_middle_and_nan_is_refused() -> None:
    assert metrics.rank_of(np.zeros((2, 101)), np.array([0, 100])).tolist() == [51.0, 51.0]
    assert metrics.rank_of(np.array([[3.0, 2.0, 1.0]]), np.array([2])).tolist() == [3.0]
    with pytest.raises(DataError, match="row 1 of the scores holds NaN"):
        metrics.rank_of(np.array([[1.0, 2.0], [np.nan, 1.0]]), np.array([0, 0]))
    with pytest.raises(DataError, match="outside"):
        metrics.rank_of(np.zeros((1, 3)), np.array([3]))


def test_rank_metrics_equal_ranking_metrics_for_one_relevant_item() -> None:
    random = rng(0, "ranks")
    scores = random.random((50, 30))
    targets = random.integers(0, 30, 50).astype(np.int32)
    by_list = metrics.ranking_metrics(np.argsort(-scores, axis=1).astype(np.int32), np.arange(51), targets, ks=(1, 10))
    for name, values in metrics.rank_metrics(metrics.rank_of(scores, targets), ks=(1, 10)).items():
        np.testing.assert_allclose(values, by_list[name])


def test_coverage_exposure_fill_and_gini() -> None:
    rows = lists([0, 1, -1], [1, 2, 3])
    assert metrics.coverage(rows, 8) == 0.5
    assert metrics.exposure(rows, 5).tolist() == [1, 2, 1, 1, 0]
    np.testing.assert_allclose(metrics.fill(rows), [2 / 3, 1.0])
    assert metrics.gini(np.array([4, 4, 4, 4])) == pytest.approx(0.0)
    assert metrics.gini(np.array([0, 0, 0, 9])) == pytest.approx(0.75)
    assert metrics.gini(np.zeros(3, np.int64)) == 0.0


def test_diversity_known_answers() -> None:
    vectors = np.array([[1, 0], [2, 0], [0, 3], [-1, 0], [0, 0]], dtype=np.float32)
    rows = lists([0, 1, -1], [0, 2, -1], [0, 3, -1], [0, 4, -1], [0, -1, -1], [0, 1, 2])
    np.testing.assert_allclose(metrics.diversity_by_vector(rows, vectors), [0, 1, 2, 1, 0, 2 / 3], atol=1e-7)
    categories = np.array([7, 7, 8, -1, -1], dtype=np.int32)
    rows = lists([0, 1, -1], [0, 2, -1], [3, 4, -1], [0, 1, 2])
    np.testing.assert_allclose(metrics.diversity_by_category(rows, categories), [0, 1, 1, 2 / 3])
    with pytest.raises(DataError, match="vector of item 1 is not finite"):
        metrics.diversity_by_vector(rows, np.array([[1.0], [np.nan]]))


def test_novelty_known_answers() -> None:
    users_per_item = np.array([8, 4, 1, 0], dtype=np.int64)
    information = metrics.self_information(users_per_item, 8)
    assert information.tolist() == [0.0, 1.0, 3.0, 3.0]
    assert metrics.popularity_rank(np.array([5, 9, 5, 1])).tolist() == [2.5, 1.0, 2.5, 4.0]
    np.testing.assert_allclose(metrics.mean_over_list(lists([0, 1], [2, -1], [-1, -1]), information), [0.5, 3.0, 0.0])
    with pytest.raises(DataError, match="cannot have 9 users"):
        metrics.self_information(np.array([9]), 8)


# -- resampling --------------------------------------------------------------------------------------------------------


def test_bootstrap_spread_is_the_standard_error_and_the_seed_decides() -> None:
    values = rng(1, "values").normal(size=(400, 2))
    means = bootstrap_means(values, 4000, 7, "test")
    np.testing.assert_allclose(means.std(axis=0), values.std(axis=0) / 20, rtol=0.06)
    np.testing.assert_allclose(means.mean(axis=0), values.mean(axis=0), atol=0.005)
    np.testing.assert_array_equal(means, bootstrap_means(values, 4000, 7, "test"))
    assert (means != bootstrap_means(values, 4000, 8, "test")).all()
    assert (means != bootstrap_means(values, 4000, 7, "other")).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for run in range(200):
        sample = rng(run, "cover").exponential(size=(200, 1))
        low, high = interval(bootstrap_means(sample, 400, run, "cover"))
        covered += bool(low[0] <= 1.0 <= high[0])
    assert 174 <= covered <= 199  # 95 % less the known shortfall of the percentile method for a skewed mean; +-4 sigma


def test_sign_flips_reject_as_often_as_they_say_and_see_a_real_difference() -> None:
    rejected = sum(bool(sign_flip_p(rng(run, "null").normal(size=(60, 1)), 199, run, "flip")[0] <= 0.05) for run in range(200))
    assert 2 <= rejected <= 21  # 99.9 % binomial band around 5 % of 200
    shifted = rng(0, "shift").normal(0.8, 1.0, size=(60, 1))
    assert sign_flip_p(shifted, 999, 0, "flip")[0] == 0.001
    assert sign_flip_p(np.zeros((10, 1)), 99, 0, "flip")[0] == 1.0


def test_sign_flips_match_the_exact_test_on_few_users() -> None:
    differences = np.array([[1.0], [2.0], [3.0], [-0.5], [1.5]])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    exact = (np.abs(signs @ differences[:, 0]) >= abs(differences.sum()) - 1e-9).mean()
    assert sign_flip_p(differences, 20_000, 3, "exact")[0] == pytest.approx(exact, abs=0.01)
