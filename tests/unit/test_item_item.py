"""Item-kNN and EASE against slow references, and how a history is weighed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import maple.models.knn as knn
from maple.artifacts import tensor_bytes
from maple.data.dataset import Dataset, Histories
from maple.errors import DataError
from maple.models.base import FitContext, Mask, QueryBatch, Space
from maple.models.families import history_matrix
from maple.models.knn import ItemKnn, ItemKnnConfig
from maple.models.linear import Ease, EaseConfig, ease_weights
from maple.schema import EVENT_CODES

PURCHASE, VIEW, IMPRESSION = EVENT_CODES["purchase"], EVENT_CODES["view"], EVENT_CODES["impression"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    import pyarrow as pa

    from maple.schema import TIMESTAMP

    rng = np.random.default_rng(2)
    count = 600
    table = pa.table(
        {
            "event_id": [f"{n:04d}" for n in range(count)],
            "user_id": [f"u{n:02d}" for n in rng.integers(0, 30, count)],
            "item_id": [f"i{n:02d}" for n in np.minimum(rng.geometric(0.06, count) - 1, 44)],
            "event": rng.choice(["purchase", "view"], count).tolist(),
            "timestamp": pa.array(np.arange(count) * 1_000_000, TIMESTAMP),
            "value": pa.nulls(count, pa.float32()),
            "price": pa.nulls(count, pa.float32()),
        }
    )
    return Dataset.from_tables(table, pa.table({"item_id": [f"i{n:02d}" for n in range(47)]}))


def slow_similarity(interactions: np.ndarray, config: ItemKnnConfig) -> np.ndarray:
    """Each formula cell by cell."""
    num_users, num_items = interactions.shape
    out = np.zeros((num_items, num_items))
    per_item, per_user, touched = interactions.sum(axis=0), interactions.sum(axis=1), (interactions > 0).sum(axis=1)
    rarity = np.array([np.log(1 + num_items / max(count, 1)) for count in touched])
    for i in range(num_items):
        for j in range(num_items):
            a, b = interactions[:, i], interactions[:, j]
            if i == j or not a.any() or not b.any():
                continue
            if config.similarity == "rp3beta":
                walk = sum(
                    (a[u] / per_item[i]) ** config.alpha * (b[u] / per_user[u]) ** config.alpha
                    for u in range(num_users) if a[u] and b[u]
                )  # fmt: skip
                out[i, j] = walk / per_item[j] ** config.beta
                continue
            if config.similarity == "tfidf":
                a, b = np.sqrt(a) * rarity, np.sqrt(b) * rarity
            if config.similarity == "bm25":
                mean = per_item.mean()
                a, b = (x * (config.k1 + 1) / (x + config.k1 * (1 - config.b + config.b * x.sum() / mean)) * rarity for x in (a, b))
                out[i, j] = a @ b
            else:
                out[i, j] = a @ b / ((a @ a + config.shrink) ** (1 - config.balance) * (b @ b + config.shrink) ** config.balance)
    return out


CONFIGS = [
    ItemKnnConfig(similarity="cosine"), ItemKnnConfig(similarity="cosine", shrink=3, binary=False, balance=0.2),
    ItemKnnConfig(similarity="tfidf", binary=False),
    ItemKnnConfig(similarity="bm25", binary=False, b=0.5), ItemKnnConfig(similarity="rp3beta", alpha=0.8, beta=0.3),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.similarity}-{config.shrink:g}")
@pytest.mark.parametrize("neighbours", [3, 100])
def test_similarities_equal_the_slow_reference_pruned_per_candidate(data, config, neighbours, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK_WORK", 500)  # many blocks
    model = ItemKnn(config.with_(neighbours=neighbours))
    model.fit(data, FitContext())
    want = slow_similarity(data.matrix(binary=config.binary).toarray().astype(np.float64), config)
    got = model.weights.toarray()
    assert ((got > 0).sum(axis=0) <= neighbours).all()
    for candidate in range(want.shape[1]):
        kept = np.sort(got[got[:, candidate] > 0, candidate])[::-1]
        best = np.sort(want[want[:, candidate] > 0, candidate])[::-1][:neighbours]
        np.testing.assert_allclose(kept, best, rtol=2e-5)
        inside = got[:, candidate] > 0
        np.testing.assert_allclose(got[inside, candidate], want[inside, candidate], rtol=2e-5)


def test_similar_is_the_largest_similarity_either_way(data):
    model = ItemKnn(ItemKnnConfig(similarity="cosine", neighbours=4))
    model.fit(data, FitContext())
    want = slow_similarity(data.matrix(binary=True).toarray().astype(np.float64), model.config)
    found, scores = model.similar(np.arange(47, dtype=np.int32), 4)
    for item in range(47):
        best = np.sort(want[item][want[item] > 0])[::-1][:4]
        np.testing.assert_allclose(scores[item][found[item] >= 0], best, rtol=2e-5)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_history_matrix_equals_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    signals = np.zeros(10, np.float32)
    signals[PURCHASE], signals[VIEW] = 1.0, 0.25
    sizes = rng.integers(0, 9, 4)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    items = rng.integers(-1, 5, offsets[-1]).astype(np.int32)
    events = rng.choice([PURCHASE, VIEW, IMPRESSION], offsets[-1]).astype(np.int8)
    times = np.concatenate([np.sort(rng.integers(0, 5, size)) for size in sizes]).astype(np.int64)
    histories = Histories(offsets, items, events, times)
    for binary in (True, False):
        for recency in (1.0, 0.5):
            want = np.zeros((4, 5), np.float32)
            for row in range(4):
                span = range(offsets[row], offsets[row + 1])
                real = [place for place in span if items[place] >= 0 and signals[events[place]] > 0]
                for place in real:
                    age = len({times[other] for other in real if times[other] > times[place]})
                    value = recency**age * (1.0 if binary else signals[events[place]])
                    cell = (row, items[place])
                    want[cell] = max(want[cell], value) if binary else want[cell] + value
            got = history_matrix(histories, 5, signals, binary=binary, recency=recency)
            got.check_format(full_check=True)
            assert got.has_canonical_format
            np.testing.assert_allclose(got.toarray(), want, rtol=1e-6)


def test_ease_is_its_formula(data):
    interactions = data.matrix(binary=True)
    weights = ease_weights(interactions, 7.0)
    gram = (interactions.T @ interactions).toarray().astype(np.float64)
    inverse = np.linalg.inv(gram + 7.0 * np.eye(len(gram)))
    want = np.eye(len(gram)) - inverse / np.diag(inverse)[None, :]
    np.fill_diagonal(want, 0)
    np.testing.assert_allclose(weights, want, atol=1e-6)
    assert weights.flags.c_contiguous


def test_ease_in_more_than_one_block_of_rows():
    rng = np.random.default_rng(0)
    interactions = sp.csr_matrix((rng.random((400, 300)) < 0.1).astype(np.float32))
    inverse = np.linalg.inv((interactions.T @ interactions).toarray() + 50.0 * np.eye(300))
    want = -inverse / np.diag(inverse)[None, :]
    np.fill_diagonal(want, 0)
    np.testing.assert_allclose(ease_weights(interactions, 50.0), want, atol=1e-6)


def test_ease_models_the_head_and_says_nothing_of_the_tail(data):
    model = Ease(EaseConfig(l2=10, max_items=12))
    model.fit(data, FitContext())
    touched = np.asarray((data.matrix() > 0).sum(axis=0)).ravel()
    assert model.known.sum() == 12
    assert touched[model.known].min() >= touched[~model.known].max()
    queries = QueryBatch.at(data, np.arange(5, dtype=np.int32), np.full(5, 10**12), 100)
    found, _ = model.topk(queries, 47)
    assert set(found[found >= 0].tolist()) <= set(np.flatnonzero(model.known).tolist())


def test_sparse_ease_keeps_the_strongest_and_with_all_kept_ranks_alike(data):
    dense, all_kept, few = (Ease(EaseConfig(l2=10, keep=keep)) for keep in (0, 47, 5))
    for model in (dense, all_kept, few):
        model.fit(data, FitContext())
    np.testing.assert_array_equal(all_kept.weights.toarray(), dense.weights)
    kept = few.weights.toarray()
    for candidate in range(47):
        magnitudes = np.sort(np.abs(dense.weights[:, candidate]))[::-1]
        mine = np.sort(np.abs(kept[:, candidate]))[::-1]
        np.testing.assert_array_equal(mine[:5], magnitudes[:5])
        assert (mine[5:] == 0).all()
    queries = QueryBatch.at(data, np.arange(8, dtype=np.int32), np.full(8, 10**12), 100)
    np.testing.assert_array_equal(all_kept.topk(queries, 10, Mask.seen(queries))[0], dense.topk(queries, 10, Mask.seen(queries))[0])


def test_nothing_to_learn_from_is_said(data):
    silent = data.where(np.zeros(len(data.log), bool))
    with pytest.raises(DataError, match="nothing to learn from"):
        Ease().fit(silent, FitContext())


def test_weights_that_point_outside_the_catalogue_are_refused(data):
    model = ItemKnn()
    model.fit(data, FitContext())
    state = model.state()
    state["indices"] = state["indices"].copy()
    state["indices"][3] = 47
    with pytest.raises(DataError, match="outside the catalogue"):
        ItemKnn.from_state(model.config, Space.of(data), state)
    assert tensor_bytes(model.state())
