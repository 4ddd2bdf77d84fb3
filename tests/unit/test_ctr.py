"""DCN-v2: toy problems with known answers, preprocessing, numpy against torch, state, seeds, errors."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.artifacts import tensor_bytes
from maple.errors import ConfigError, DataError, NotFittedError
from maple.models.base import FitContext, Ranker
from maple.models.columns import Columns
from maple.models.ctr import DCNv2, DCNv2Config, Sizes, auc, forward, ndcg
from maple.models.nn import arrays

TRAINING = {"epochs": 25, "batch_size": 256, "learning_rate": 0.02, "warmup_steps": 0, "patience": 5, "device": "cpu"}
CONFIG = DCNv2Config.parse({"ensemble": 1, "deep": [16], "rank": 8, "embedding": 4, "training": TRAINING}, "test")


def groups_of(num_groups: int, size: int) -> np.ndarray:
    return np.repeat(np.arange(num_groups), size).astype(np.int64)


def first_place(scores: np.ndarray, labels: np.ndarray, size: int) -> float:
    """How often the best score of a group is its positive."""
    return float((scores.reshape(-1, size).argmax(1) == labels.reshape(-1, size).argmax(1)).mean())


def products(seed: int, num_groups: int = 240, size: int = 8) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The relevant candidate of a group is the one with the largest product of two numbers: no linear score finds it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_groups, size, 3)).astype(np.float32)
    labels = np.zeros((num_groups, size), dtype=np.float32)
    labels[np.arange(num_groups), (x[..., 0] * x[..., 1]).argmax(1)] = 1
    flat = x.reshape(-1, 3)
    return {"a": flat[:, 0], "b": flat[:, 1], "noise": flat[:, 2]}, labels.reshape(-1, 1), groups_of(num_groups, size)


def test_crosses_learn_a_product_and_a_linear_score_does_not() -> None:
    columns, labels, groups = products(0)
    unseen, truth, _ = products(1)
    crossed = DCNv2(CONFIG.with_(deep=[], cross_layers=1))
    crossed.fit(columns, labels, groups, FitContext())
    straight = DCNv2(CONFIG.with_(deep=[], cross_layers=0))
    straight.fit(columns, labels, groups, FitContext())
    assert first_place(crossed.score(unseen)[:, 0], truth, 8) > 0.85
    assert first_place(straight.score(unseen)[:, 0], truth, 8) < 0.5


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("loss", ["listwise", "bce"])
def test_a_crossing_of_two_codes_is_learned(structure: str, loss: str) -> None:
    """XOR of two codes: neither says anything alone."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, (2000, 2)).astype(np.int32)
    labels = (codes[:, 0] ^ codes[:, 1]).astype(np.float32)[:, None]
    model = DCNv2(CONFIG.with_(structure=structure, loss=loss, wide=False))
    model.fit({"left": codes[:, 0], "right": codes[:, 1]}, labels, groups_of(200, 10), FitContext())
    scores = model.score({"left": np.array([0, 0, 1, 1], np.int32), "right": np.array([0, 1, 0, 1], np.int32)})[:, 0]
    assert min(scores[1], scores[2]) > max(scores[0], scores[3]) + (0.5 if loss == "bce" else 0.05)


def test_it_does_not_lose_to_its_best_single_feature() -> None:
    """One strong column, one weaker that adds to it, noise: the ranker beats the strong column alone."""
    rng = np.random.default_rng(4)
    strong, weak = rng.gamma(0.5, 4, (400, 30)), rng.normal(size=(400, 30))
    utility = np.log1p(strong) + 0.4 * weak + rng.gumbel(size=(400, 30)) * 0.5
    labels = (utility >= np.sort(utility, axis=1)[:, -3:-2]).astype(np.float32).reshape(-1, 1)
    columns = {"strong": strong.ravel().astype(np.float32), "weak": weak.ravel().astype(np.float32)}
    columns |= {f"noise_{place}": rng.normal(size=400 * 30).astype(np.float32) for place in range(8)}
    train, test = slice(0, 300 * 30), slice(300 * 30, None)
    model = DCNv2(CONFIG)
    model.fit({name: column[train] for name, column in columns.items()}, labels[train], groups_of(300, 30), FitContext())
    starts = np.arange(0, 100 * 30 + 1, 30)
    learned = ndcg(labels[test, 0], model.score({name: column[test] for name, column in columns.items()})[:, 0], starts, 10)
    assert learned > ndcg(labels[test, 0], columns["strong"][test], starts, 10) + 0.02


def test_bce_scores_are_probabilities_of_each_task() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=8_000).astype(np.float32)
    chance = np.stack([1 / (1 + np.exp(-2 * x)), np.full(len(x), 0.2)], axis=1)
    labels = (rng.random(chance.shape) < chance).astype(np.float32)
    model = DCNv2(CONFIG.with_(loss="bce", training=TRAINING | {"patience": 3}))
    metrics = model.fit({"x": x}, labels, np.arange(len(x)), FitContext())
    scores = model.score({"x": np.array([-1, 0, 1], np.float32)})
    np.testing.assert_allclose(scores[:, 0], [0.12, 0.5, 0.88], atol=0.06)
    np.testing.assert_allclose(scores[:, 1], 0.2, atol=0.06)
    assert metrics["auc"] > 0.6


@given(
    st.sampled_from(["parallel", "stacked"]), st.integers(0, 3), st.integers(0, 9), st.booleans(), st.sampled_from([(), (5,), (6, 4)]),
    st.integers(0, 4), st.integers(0, 2), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_numpy_forward_equals_torch_forward(
    structure: str, layers: int, rank: int, wide: bool, deep: tuple[int, ...], num_codes: int, extra: int, seed: int
) -> None:
    config = CONFIG.with_(structure=structure, cross_layers=layers, rank=rank, wide=wide, deep=list(deep))
    torch.manual_seed(seed)
    net = DCNv2(config).build(Sizes(num_numbers=1 + extra, num_codes=num_codes, table_rows=7, tasks=2)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(11, 1 + extra)).astype(np.float32)
    codes = rng.integers(0, 7, (11, num_codes)).astype(np.int32)
    with torch.no_grad():
        expected = net(torch.from_numpy(numbers), torch.from_numpy(codes.astype(np.int64))).numpy()
    tolerance = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(forward(numbers, codes, arrays(net), config), expected, rtol=1e-5, atol=tolerance)


@pytest.fixture(scope="module")
def mixed() -> tuple[DCNv2, dict[str, np.ndarray]]:
    """A fitted two-task ensemble over numbers with gaps and codes."""
    rng = np.random.default_rng(0)
    n = 1200
    columns = {
        "price": np.where(rng.random(n) < 0.2, np.nan, rng.lognormal(3, 1, n)).astype(np.float32),
        "constant": np.full(n, 7, np.float32),
        "empty": np.full(n, np.nan, np.float32),
        "flag": rng.random(n) < 0.5,
        "brand": rng.integers(-1, 20, n).astype(np.int32),
    }
    labels = np.stack([columns["brand"] % 2 == 0, np.isnan(columns["price"])], axis=1).astype(np.float32)
    model = DCNv2(CONFIG.with_(ensemble=2))
    model.fit(columns, labels, groups_of(120, 10), FitContext(seed=3))
    return model, columns


def test_a_missing_value_is_information(mixed: tuple[DCNv2, dict[str, np.ndarray]]) -> None:
    model, columns = mixed
    one = {name: column[:2].copy() for name, column in columns.items()}
    one["price"] = np.array([np.nan, 20], np.float32)
    for name in ("flag", "brand"):
        one[name][:] = one[name][0]
    scores = model.score(one)
    assert scores[0, 1] > scores[1, 1] + 1
    one["price"][0] = np.inf
    np.testing.assert_array_equal(model.score(one), scores)


def test_unseen_codes_are_the_unknown_code(mixed: tuple[DCNv2, dict[str, np.ndarray]]) -> None:
    model, columns = mixed
    three = {name: np.repeat(column[:1], 3) for name, column in columns.items()}
    three["brand"] = np.array([-1, 20, 2**31 - 1], np.int32)
    scores = model.score(three)
    assert np.isfinite(scores).all()
    assert np.array_equal(scores[0], scores[1])
    assert np.array_equal(scores[0], scores[2])


def test_the_state_gives_the_model_again(mixed: tuple[DCNv2, dict[str, np.ndarray]]) -> None:
    import safetensors.numpy

    model, columns = mixed
    state = safetensors.numpy.load(tensor_bytes(model.state()))
    again = DCNv2.from_state(DCNv2Config.parse(model.config.plain(), "state"), state)
    np.testing.assert_array_equal(again.score(columns), model.score(columns))
    assert isinstance(again, Ranker)


def test_a_score_does_not_depend_on_its_batch(mixed: tuple[DCNv2, dict[str, np.ndarray]]) -> None:
    model, columns = mixed
    whole = model.score(columns)
    some = model.score({name: column[100:107] for name, column in columns.items()})
    np.testing.assert_allclose(some, whole[100:107], rtol=1e-4, atol=1e-5)
    assert model.score({name: column[:0] for name, column in columns.items()}).shape == (0, 2)


def test_the_seed_decides(mixed: tuple[DCNv2, dict[str, np.ndarray]]) -> None:
    columns, labels, groups = products(0, 40)
    short = CONFIG.with_(training={"epochs": 2, "device": "cpu"})

    def scores(seed: int) -> np.ndarray:
        model = DCNv2(short)
        model.fit(columns, labels, groups, FitContext(seed=seed))
        return model.score(columns)

    assert np.array_equal(scores(1), scores(1))
    assert not np.array_equal(scores(1), scores(2))


def test_serving_does_not_import_torch() -> None:
    code = "import sys, maple.models.ctr; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_say_what_to_do() -> None:
    columns, labels, groups = products(0, 20)
    with pytest.raises(NotFittedError):
        DCNv2().score(columns)
    with pytest.raises(NotFittedError):
        DCNv2().state()
    with pytest.raises(DataError, match="sorted"):
        DCNv2().fit(columns, labels, groups[::-1].copy(), FitContext())
    with pytest.raises(DataError, match="no positive label"):
        DCNv2().fit(columns, labels * 0, groups, FitContext())
    with pytest.raises(DataError, match="between 0 and 1"):
        DCNv2(CONFIG.with_(blend=0.5)).fit(columns, labels * 3, groups, FitContext())
    with pytest.raises(DataError, match="no ranker rows"):
        DCNv2().fit({name: column[:0] for name, column in columns.items()}, labels[:0], groups[:0], FitContext())
    with pytest.raises(DataError, match="floats or integer codes"):
        DCNv2().fit(columns | {"text": np.full(len(labels), "x")}, labels, groups, FitContext())
    model = DCNv2(CONFIG.with_(training={"epochs": 1, "device": "cpu"}))
    model.fit(columns, labels, groups, FitContext())
    with pytest.raises(DataError, match="not given: b"):
        model.score({"a": columns["a"], "noise": columns["noise"]})
    with pytest.raises(DataError, match="trained as numbers"):
        model.score(columns | {"a": columns["a"].astype(np.int32)})
    with pytest.raises(ConfigError, match="Did you mean 'rank'"):
        DCNv2Config.parse({"rnk": 3}, "ranker")


def test_every_search_dimension_is_a_setting() -> None:
    for name, space in DCNv2Config.search_space().items():
        value = space[1][0] if space[0] == "choice" else space[1]  # type: ignore[index]
        head, _, tail = name.partition(".")
        assert DCNv2Config.parse({head: {tail: value} if tail else value}, "search")


# -- preprocessing and metrics -----------------------------------------------------------------------------------------


def test_numbers_are_robustly_standardised() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(50, 10, 5000).astype(np.float32)
    x[0] = 1e30
    fitted = Columns.fit({"x": x}, max_codes=10, min_count=1)
    numbers, _ = fitted.transform({"x": np.array([50, 60, 1e30, -1e30, np.nan], np.float32)})
    np.testing.assert_allclose(numbers[:, 0], [0, 1, 5, -5, 0], atol=0.06)
    assert fitted.width == 1


def test_heavy_tails_are_logged() -> None:
    x = np.random.default_rng(0).lognormal(0, 2, 5000).astype(np.float32)
    fitted = Columns.fit({"x": x}, max_codes=10, min_count=1)
    assert fitted.log_scale[0] > 0
    numbers = fitted.transform({"x": np.sort(x)})[0][:, 0]
    assert (np.diff(numbers) >= 0).all()
    assert (np.abs(numbers) < 5).mean() > 0.99


def test_rare_codes_share_the_unknown_row_and_columns_share_no_row() -> None:
    left = np.array([0] * 5 + [1] * 4 + [2] * 3 + [9], np.int32)
    right = np.array([0] * 12 + [-1], np.int32)
    fitted = Columns.fit({"left": left, "right": right}, max_codes=2, min_count=2)
    _, rows = fitted.transform({"left": left, "right": right})
    assert rows[-1, 0] == rows[9, 0] == fitted.unknown_rows[0]
    assert len({rows[0, 0], rows[5, 0], rows[9, 0]}) == 3
    assert not set(rows[:, 0]) & set(rows[:, 1])
    assert fitted.table_rows == 3 + 2


def test_auc_and_ndcg_known_answers() -> None:
    assert auc(np.array([1, 0, 1, 0], np.float32), np.array([3, 2, 1, 0], np.float32)) == 0.75
    assert auc(np.array([1, 0], np.float32), np.zeros(2, np.float32)) == 0.5
    assert np.isnan(auc(np.ones(2, np.float32), np.zeros(2, np.float32)))
    labels = np.array([0, 1, 0, 0, 0, 1], np.float32)
    scores = np.array([3, 2, 1, 3, 2, 5], np.float32)
    assert ndcg(labels, scores, np.array([0, 3, 6]), 10) == pytest.approx((1 / np.log2(3) + 1) / 2)
    assert ndcg(labels, scores, np.array([0, 3, 6]), 1) == 0.5


def test_speed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 candidates with 60 number columns at the default size; a figure to read, not an assertion."""
    rng = np.random.default_rng(0)
    columns = {f"x{place}": rng.normal(size=1000).astype(np.float32) for place in range(60)}
    model = DCNv2(DCNv2Config.parse({"ensemble": 1, "training": {"epochs": 1, "device": "cpu"}}, "speed"))
    model.fit(columns, (columns["x0"] > 1).astype(np.float32)[:, None], groups_of(20, 50), FitContext())
    times = []
    for _ in range(20):
        start = time.perf_counter()
        assert model.score(columns).shape == (1000, 1)
        times.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\nDCN-v2: 1,000 x 60 in {1000 * min(times):.2f} ms (median {1000 * float(np.median(times)):.2f} ms)")
