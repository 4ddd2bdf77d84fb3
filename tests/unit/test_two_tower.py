"""Two-tower: known structure is found, order matters where it should, examples never leak, cold items, numpy against torch, state."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.data.dataset import Dataset, Histories
from maple.errors import ArtifactError, ConfigError, DataError, NotFittedError
from maple.models.base import FitContext, QueryBatch, Space
from maple.models.examples import HiddenExamples, NextExamples, pool_weights
from maple.models.nets import TwoTowerNet
from maple.models.two_tower import TwoTower, TwoTowerConfig

DAY = 86_400_000_000
TRAINING = {"epochs": 15, "batch_size": 64, "learning_rate": 0.02, "warmup_steps": 0, "patience": 25, "device": "cpu"}
CONFIG = TwoTowerConfig.parse({"size": "small", "embedding": 12, "hidden": 16, "negatives": 8, "training": TRAINING}, "test")


def dataset(sequences: list[list[int]], num_items: int, table: dict[str, list[object]] | None = None) -> Dataset:
    """Users who buy item after item, one a day; item ids sort like their numbers, so that codes are the numbers."""
    rows = [(user, place, item) for user, items in enumerate(sequences) for place, item in enumerate(items)]
    events = pa.table({
        "event_id": [f"e{place:06d}" for place in range(len(rows))],
        "user_id": [f"u{user:04d}" for user, _, _ in rows],
        "item_id": [f"i{item:04d}" for _, _, item in rows],
        "event": ["purchase"] * len(rows),
        "timestamp": pa.array([place * DAY for _, place, _ in rows], pa.int64()).cast(pa.timestamp("us", tz="UTC")),
        "value": pa.nulls(len(rows), pa.float32()),
        "price": pa.nulls(len(rows), pa.float32()),
    })  # fmt: skip
    return Dataset.from_tables(events, pa.table({"item_id": [f"i{item:04d}" for item in range(num_items)]} | (table or {})))


def two_worlds(seed: int = 0, users: int = 80, table: dict[str, list[object]] | None = None, num_items: int = 20) -> Dataset:
    """Even users buy even items, odd users odd items, of the first 20."""
    rng = np.random.default_rng(seed)
    return dataset([list(2 * rng.permutation(10)[:7] + user % 2) for user in range(users)], num_items, table)


def query(*histories: list[int]) -> QueryBatch:
    made = Histories.of([(items, [3] * len(items), [place * DAY for place in range(len(items))]) for items in histories])
    return QueryBatch(made, np.full(len(histories), 100 * DAY))


def fitted(data: Dataset, seed: int = 0, **changes: object) -> TwoTower:
    model = TwoTower(CONFIG.with_(**changes))
    model.fit(data, FitContext(seed=seed))
    return model


@pytest.mark.parametrize("examples", ["next", "hidden"])
@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_users_get_the_items_of_their_world(examples: str, softmax: str) -> None:
    items, scores = fitted(two_worlds(), examples=examples, softmax=softmax).topk(query([0, 2], [5], [17, 3, 1]), 8)
    assert (items[0] % 2 == 0).all()
    assert (items[1:] % 2 == 1).all()
    assert (np.diff(scores, axis=1) <= 0).all()


def test_the_next_item_depends_on_the_last_one() -> None:
    """Users walk round a ring of items; the answer to a walk is the next place, not the most common one."""
    rng = np.random.default_rng(0)
    walks = [[(start + step) % 12 for step in range(6)] for start in rng.integers(0, 12, 150)]
    model = fitted(dataset(walks, 12), horizon=1, recency=0.3)
    items, _ = model.topk(query(*([(start + step) % 12 for step in range(3)] for start in range(12))), 1)
    assert (items[:, 0] == (np.arange(12) + 3) % 12).mean() > 0.9


def test_the_bias_is_popularity() -> None:
    rng = np.random.default_rng(0)
    chance = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    walks = [list(rng.choice(6, 6, p=chance)) for _ in range(120)]
    for softmax in ("full", "sampled"):
        model = fitted(dataset(walks, 6), softmax=softmax, negatives=2, training=TRAINING | {"batch_size": 16, "epochs": 5})
        items, _ = model.topk(query([4], [2], [3]), 2)
        assert set(items.ravel()) == {0, 1}


def test_a_new_item_is_known_by_its_category() -> None:
    """Items 20 and 21 have no event, only a category; item 22 has nothing."""
    table: dict[str, list[object]] = {"category": [*(["even", "odd"] * 11), None], "price": [5.0] * 20 + [None] * 3}
    model = fitted(two_worlds(table=table, num_items=23), id_dropout=0.3)
    scores = model.score(query([0, 2, 4], [1, 3]), np.array([20, 21, 22, 20, 21, 22, -1], np.int32), np.array([0, 3, 7]))
    assert scores[0] > scores[1]
    assert scores[4] > scores[3]
    assert np.isneginf(scores[[2, 5, 6]]).all()
    similar, _ = model.similar(np.array([20, 22], np.int32), 5)
    assert (similar[0] % 2 == 0).all()
    assert (similar[1] == -1).all()


def test_without_a_known_history_there_is_no_opinion() -> None:
    model = fitted(two_worlds())
    items, scores = model.topk(query([], [-1], [0]), 3)
    assert (items[:2] == -1).all()
    assert np.isneginf(scores[:2]).all()
    assert (items[2] >= 0).all()


@pytest.mark.parametrize("examples", ["next", "hidden"])
def test_numpy_towers_equal_torch_towers(examples: str) -> None:
    table: dict[str, list[object]] = {"category": ["a", "b"] * 10, "price": [float(place) for place in range(20)]}
    data = two_worlds(table=table)
    seen: list[tuple[TwoTowerNet, dict[str, torch.Tensor]]] = []

    class Spy(TwoTower):
        def loss(self, net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            assert isinstance(net, TwoTowerNet)
            seen.append((net, batch))
            return super().loss(net, batch)

    model = Spy(CONFIG.with_(examples=examples))
    model.fit(data, FitContext())
    net = seen[-1][0].eval()
    histories = query([0, 2, 7, 7], [1], [4, 9, 11]).histories
    pools = pool_weights(histories, 20, data.signals, model._recency)
    with torch.no_grad():
        raw = net.items(torch.arange(20), torch.arange(20))
        users = torch.nn.functional.normalize(net.users([torch.from_numpy(pool.toarray()) @ raw for pool in pools]), dim=1)
        expected = users @ torch.nn.functional.normalize(raw, dim=1).T / model.config.temperature + net.bias.weight[:20, 0]
    got = model.embed_queries(query([0, 2, 7, 7], [1], [4, 9, 11])) @ model.embed_items().T
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5 * np.abs(got).max())


def test_the_state_gives_the_model_again() -> None:
    data = two_worlds()
    model = fitted(data)
    again = TwoTower.from_state(TwoTowerConfig.parse(model.config.plain(), "state"), Space.of(data), model.state())
    for one, other in zip(model.topk(query([0, 3], [5]), 6), again.topk(query([0, 3], [5]), 6), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ArtifactError, match="vectors"):
        TwoTower.from_state(model.config, Space.of(two_worlds(num_items=21)), model.state())


def test_a_second_fit_forgets_the_first_and_the_seed_decides() -> None:
    short = {"training": TRAINING | {"epochs": 3}}
    model = fitted(two_worlds(1), **short)
    model.topk(query([0]), 3)
    model.fit(two_worlds(), FitContext())
    fresh = fitted(two_worlds(), **short)
    np.testing.assert_array_equal(model.embed_items(), fresh.embed_items())
    np.testing.assert_array_equal(model.topk(query([0]), 3)[1], fresh.topk(query([0]), 3)[1])
    assert not np.array_equal(fresh.embed_items(), fitted(two_worlds(), seed=1, **short).embed_items())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(NotFittedError):
        TwoTower().topk(query([0]), 3)
    with pytest.raises(NotFittedError):
        TwoTower().state()
    lonely = dataset([[0], [1], [2]], 3)
    with pytest.raises(DataError, match="examples: hidden"):
        TwoTower(CONFIG).fit(lonely, FitContext())
    with pytest.raises(DataError, match="two different items"):
        TwoTower(CONFIG.with_(examples="hidden")).fit(lonely, FitContext())
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        TwoTowerConfig.parse({"temprature": 1}, "two-tower")


def test_serving_does_not_import_torch() -> None:
    code = "import sys, maple.models.two_tower; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_search_dimension_is_a_setting() -> None:
    for name, space in TwoTowerConfig.search_space().items():
        value = space[1][0] if space[0] == "choice" else space[1]  # type: ignore[index]
        head, _, tail = name.partition(".")
        TwoTowerConfig.parse({head: {tail: value} if tail else value}, "search")


# -- examples ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_cut_shows_the_past_and_asks_for_the_future(sequences: list[list[int]], horizon: int, seed: int) -> None:
    """With recency 1 the history of an example is exactly the items before some cut, and its positives exactly those after it."""
    data = dataset([*sequences, [0, 1]], 7)
    rng = np.random.default_rng(seed)
    source = NextExamples(data, horizon=horizon, history=100, cuts_per_user=9, recency=1.0, repeats=True, holdout=0.0, rng=rng)
    possible = {
        (frozenset(items[:cut]), frozenset(items[cut : cut + horizon])) for items in [*sequences, [0, 1]] for cut in range(1, len(items))
    }
    found = set()
    for one in source.epoch(3, rng):
        for row in range(one.pools[0].shape[0]):
            found.add((frozenset(one.pools[0][row].indices.tolist()), frozenset(one.items[one.rows == row].tolist())))
    assert found == possible


@given(st.integers(0, 2**31))
@settings(max_examples=4, deadline=None)
def test_held_out_positives_never_train(seed: int) -> None:
    """Every item belongs to one user and comes once, so a held-out target that shows up in training is a leak."""
    sequences = [list(range(10 * user, 10 * user + 10)) for user in range(70)]
    data = dataset(sequences, 700)
    rng = np.random.default_rng(seed)
    after = NextExamples(data, horizon=3, history=100, cuts_per_user=9, recency=0.9, repeats=True, holdout=0.5, rng=rng)
    hidden = HiddenExamples(data, hide=0.5, holdout=0.5, rng=rng)
    for source in (after, hidden):
        valid = source.valid()
        assert valid is not None
        shown: set[int] = set()
        for _ in range(3):
            for one in source.epoch(16, rng):
                shown |= set(one.items.tolist())
                shown |= {int(item) for pool in one.pools for item in pool.indices}
        assert not shown & set(valid.items.tolist())
        assert not set(valid.items.tolist()) & {int(item) for pool in valid.pools for item in pool.indices}


def test_hidden_items_are_not_in_the_history() -> None:
    data = two_worlds()
    rng = np.random.default_rng(0)
    for one in HiddenExamples(data, hide=0.5, holdout=0.0, rng=rng).epoch(16, rng):
        dense = one.pools[0].toarray()
        assert (dense[one.rows, one.items] == 0).all()
        np.testing.assert_allclose(np.linalg.norm(dense[np.unique(one.rows)], axis=1), 1, rtol=1e-5)


def test_without_repeats_a_positive_is_new() -> None:
    data = dataset([[0, 1, 0, 2], [1, 1, 1]], 3)
    rng = np.random.default_rng(0)
    source = NextExamples(data, horizon=5, history=10, cuts_per_user=9, recency=1.0, repeats=False, holdout=0.0, rng=rng)
    positives = [(one.rows.tolist(), one.items.tolist()) for one in source.epoch(99, rng)]
    assert sorted(positives[0][1]) == [1, 2, 2, 2]


def test_pooling_known_answer() -> None:
    """Items 0, 1, 0 a day apart with recency 1/2: weights 1 + 1/4 and 1/2, square roots, unit length; beside it the even pool."""
    signals = np.zeros(10, np.float32)
    signals[3] = 1
    recent, even = pool_weights(query([0, 1, 0], []).histories, 2, signals, 0.5)
    np.testing.assert_allclose(recent.toarray(), [[np.sqrt(1.25 / 1.75), np.sqrt(0.5 / 1.75)], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(even.toarray(), [[np.sqrt(2 / 3), np.sqrt(1 / 3)], [0, 0]], rtol=1e-6)
