"""ALS: the fold-in is the exact least-squares step, for short and long histories alike, and its reasons add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import maple.models.factorization as factorization
from maple.data.dataset import Dataset, Histories, Log, Vocab
from maple.errors import DataError
from maple.models.base import FitContext, QueryBatch
from maple.models.factorization import Als, AlsConfig
from maple.models.families import history_matrix
from maple.schema import EVENT_CODES

PURCHASE = EVENT_CODES["purchase"]


def random_data(seed: int, num_users: int = 60, num_items: int = 40, count: int = 700) -> Dataset:
    import pyarrow as pa

    rng = np.random.default_rng(seed)
    user = np.sort(rng.integers(0, num_users, count)).astype(np.int32)
    item = rng.integers(0, num_items, count).astype(np.int32)
    blank = np.full(count, np.nan, np.float32)
    log = Log(user, item, np.full(count, PURCHASE, np.int8), np.arange(count, dtype=np.int64), blank, blank)
    users, items = Vocab.of(f"u{n:03d}" for n in range(num_users)), Vocab.of(f"i{n:03d}" for n in range(num_items))
    return Dataset(users, items, log, pa.table({"item_id": items.ids}), pa.table({"user_id": users.ids}))


def slow_fold(model: Als, history: np.ndarray) -> np.ndarray:
    """Equation 4 of Hu et al. with dense D x D matrices, one user: history is float[I] of interaction weights."""
    factors = model.factors.astype(np.float64)
    confidence = 1 + model.alpha * history
    preference = (history > 0).astype(np.float64)
    system = factors.T @ (confidence[:, None] * factors) + model.config.regularization * np.eye(factors.shape[1])
    return np.linalg.solve(system, factors.T @ (confidence * preference))


@pytest.fixture(scope="module")
def models():
    data = random_data(0)
    made = []
    for binary in (True, False):
        model = Als(AlsConfig(factors=6, regularization=0.7, alpha=3.0, iterations=5, binary=binary, damping=0.3))
        model.fit(data, FitContext(seed=1))
        made.append(model)
    return made


@given(st.lists(st.lists(st.integers(-1, 39), max_size=30), max_size=12), st.sampled_from([200, 4000, 1 << 26]))
@settings(max_examples=60, deadline=None)
def test_fold_in_is_the_exact_step(models, histories, fold_bytes):
    queries = QueryBatch(
        Histories.of([(row, [PURCHASE] * len(row), range(len(row))) for row in histories]), np.full(len(histories), 99, np.int64)
    )
    kept = factorization.FOLD_BYTES
    factorization.FOLD_BYTES = fold_bytes
    try:
        for model in models:
            vectors = model.embed_queries(queries)
            weights = history_matrix(queries.histories, 40, model.space.signals, binary=model.config.binary).toarray()
            want = np.stack([slow_fold(model, row) for row in weights]) if len(weights) else np.zeros((0, 6))
            np.testing.assert_allclose(vectors, want, rtol=1e-3, atol=1e-5)
    finally:
        factorization.FOLD_BYTES = kept


def test_the_shares_of_the_history_add_up_to_the_score(models):
    model = models[0]
    items = [3, 9, 20, 31]
    queries = QueryBatch(Histories.of([(items, [PURCHASE] * 4, range(4))]), np.array([9]))
    vector = model.embed_queries(queries)[0].astype(np.float64)
    confidence = 1 + model.alpha[items]
    weight = confidence - (confidence - 1) * (model.factors[items] @ vector)
    shares = (model.factors @ model._smoothed[1][items].T) * weight
    np.testing.assert_allclose(shares.sum(axis=1), model.factors @ vector, rtol=1e-3, atol=1e-5)
    candidates = np.arange(40, dtype=np.int32)
    reasons = model.explain(queries, candidates, np.array([0, 40]))
    for item in candidates:
        others = [place for place, own in enumerate(items) if own != item]
        best = max(others, key=lambda place: shares[item, place])
        assert reasons[item] == (items[best] if shares[item, best] > 0 else -1)


def test_trained_rows_agree_with_the_fold_in_once_converged():
    data = random_data(3)
    model = Als(AlsConfig(factors=4, regularization=5.0, alpha=2.0, iterations=60, keep_users=True))
    model.fit(data, FitContext(seed=2))
    users = np.arange(60, dtype=np.int32)
    now = np.full(60, 10**6)
    folded = model.embed_queries(QueryBatch.at(data, users, now, 1000))
    trained = model.embed_queries(QueryBatch.at(data, users, now, 1000, known=True))
    np.testing.assert_array_equal(trained, model.users)
    assert not np.array_equal(folded, trained)
    np.testing.assert_allclose(folded @ model.factors.T, trained @ model.factors.T, atol=0.01)


def test_damping_divides_the_confidence_of_popular_items():
    data = random_data(4)
    model = Als(AlsConfig(factors=2, iterations=2, alpha=3.0, damping=0.5))
    model.fit(data, FitContext())
    touched = np.asarray((data.matrix() > 0).sum(axis=0)).ravel()
    np.testing.assert_allclose(model.alpha, 3.0 / np.sqrt(touched / touched.mean()), rtol=1e-5)
    assert (np.sort(model.alpha)[::-1] == model.alpha[np.argsort(touched, kind="stable")]).all()


def test_users_are_not_kept_unless_asked_for(models):
    assert set(models[0].state()) == {"factors", "alpha"}


def test_progress_is_reported_per_iteration():
    steps = []
    Als(AlsConfig(factors=2, iterations=3)).fit(random_data(1), FitContext(report=lambda step, metrics: steps.append((step, set(metrics)))))
    assert steps == [(1, {"seconds"}), (2, {"seconds"}), (3, {"seconds"})]


def test_nothing_to_learn_from_is_said():
    data = random_data(1)
    with pytest.raises(DataError, match="nothing to learn from"):
        Als().fit(data.where(np.zeros(len(data.log), bool)), FitContext())
