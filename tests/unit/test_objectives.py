"""What tuning searches for: the value of ordered rows, problems by name, and objectives that know a good setting from a bad one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import taste_shop
from hypothesis import given
from hypothesis import strategies as st

from maple.config import Section
from maple.data.dataset import Dataset
from maple.data.splits import Boundaries, split_of
from maple.errors import ConfigError
from maple.models.base import FitContext
from maple.models.catalog import MODELS
from maple.models.factorization import AlsConfig
from maple.recommend.settings import PipelineSettings
from maple.train.objectives import Problem, RankerData, RankerProblem, SourceData, grouped_ndcg, problem_of, ranker_objective
from maple.train.rows import Rows


class FixedForTests:
    """A model whose settings nobody may search."""

    class Config(Section):
        size: int = 1


SOURCES = [
    {"name": "collaborative", "model": "als", "config": {"factors": 8}},
    {"name": "popular", "model": "popularity"},
    {"name": "mine", "model": "frequency"},
]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return taste_shop.dataset()


@pytest.fixture(scope="module")
def cut(data: Dataset) -> Boundaries:
    return split_of(data)


def settings(**more: object) -> PipelineSettings:
    return PipelineSettings.parse({"sources": SOURCES, **more}, "test")


def problem(name: str, data: Dataset, cut: Boundaries, chosen: PipelineSettings | None = None, epochs: int = 2) -> Problem:
    return problem_of(name, data, cut, chosen or settings(), epochs, FitContext(seed=4))


def rows_of(groups: list[list[int]]) -> Rows:
    """Rows from labels per group; the groups' numbers have gaps."""
    labels = np.array([[label] for group in groups for label in group], np.float32).reshape(-1, 1)
    numbers = np.repeat(3 * np.arange(len(groups)), [len(group) for group in groups]).astype(np.int64)
    return Rows({"x": np.arange(len(labels), dtype=np.float32)}, labels, numbers)


# -- NDCG of rows ------------------------------------------------------------------------------------------------------


def test_grouped_ndcg_known_answers() -> None:
    rows = rows_of([[1, 0, 0], [0, 1, 1], [0, 0]])
    gain = [1 / math.log2(2 + place) for place in range(3)]
    # First group: the positive is third. Second: its positives are first and third. The last has no positive and is left out.
    scores = np.array([0.1, 0.9, 0.5, 0.5, 0.9, 0.2, 3.0, 2.0])
    expected = (gain[2] / gain[0] + (gain[0] + gain[2]) / (gain[0] + gain[1])) / 2
    assert grouped_ndcg(scores, rows, 10) == pytest.approx(expected)
    assert grouped_ndcg(scores, rows, 1) == pytest.approx((0 + 1) / 2)
    assert grouped_ndcg(rows.labels[:, 0], rows, 2) == pytest.approx(1.0)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_grouped_ndcg_is_the_slow_one(groups: list[list[int]], k: int, seed: int) -> None:
    groups = [*groups, [1, 0]]
    rows = rows_of(groups)
    scores = np.random.default_rng(seed).permutation(len(rows)).astype(np.float32)
    values, start = [], 0
    for group in groups:
        ranked = [label for _, label in sorted(zip(scores[start : start + len(group)], group, strict=True), reverse=True)][:k]
        start += len(group)
        if sum(group):
            best = sum(1 / math.log2(2 + place) for place in range(min(k, sum(group))))
            values.append(sum(label / math.log2(2 + place) for place, label in enumerate(ranked)) / best)
    assert grouped_ndcg(scores, rows, k) == pytest.approx(float(np.mean(values)))


# -- problems ----------------------------------------------------------------------------------------------------------


def test_a_problem_that_is_none_says_what_there_is(data: Dataset, cut: Boundaries) -> None:
    with pytest.raises(ConfigError, match=r"tune\.models: unknown source 'colaborative'\. Did you mean 'collaborative'\?"):
        problem("colaborative", data, cut)
    with pytest.raises(ConfigError, match=r"unknown source 'als'\. .*Known: collaborative, mine, popular\."):
        problem("als", data, cut)  # the model's name is not the source's
    with pytest.raises(ConfigError, match=r"unknown source 'ranker'\."):
        problem("ranker", data, cut)
    with pytest.raises(ConfigError, match=r"unknown source 'rankr'\. Did you mean 'ranker'\?"):
        problem("rankr", data, cut, settings(ranker={"model": "dcn"}))


def test_a_model_without_a_search_space_has_nothing_to_tune(data: Dataset, cut: Boundaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "fixed-for-tests", f"{__name__}:FixedForTests")
    chosen = settings(sources=[{"name": "fixed", "model": "fixed-for-tests"}])
    with pytest.raises(ConfigError, match=r"tune\.models: 'fixed' has nothing to tune; leave it out"):
        problem("fixed", data, cut, chosen)


def test_a_sources_problem_starts_from_the_settings_and_knows_only_what_was_before_t1(data: Dataset, cut: Boundaries) -> None:
    found = problem("collaborative", data, cut)
    assert "factors" not in found.default, "what the page gives is not searched"
    assert found.data.config["factors"] == 8
    assert found.metric == "ndcg@20"
    assert found.space.holds(found.default)
    assert found.halving is not None
    given = found.data
    assert isinstance(given, SourceData)
    assert given.train.span[1] < cut.t1
    assert given.queries.histories.times.max() < cut.t1
    assert (given.queries.now == cut.t1).all()
    assert given.mask is None
    assert problem("collaborative", data, cut, settings(repeats=False)).data.mask is not None
    # Who is asked for what: the target pairs of [T1, T2).
    user, item = data.between(cut.t1, cut.t2).target_pairs()
    pairs = set(zip(user.tolist(), item.tolist(), strict=True))
    asked = np.repeat(given.relevant.users, np.diff(given.relevant.offsets))
    assert set(zip(asked.tolist(), given.relevant.items.tolist(), strict=True)) <= pairs


def test_a_page_that_gives_everything_leaves_nothing_to_tune(data: Dataset, cut: Boundaries) -> None:
    everything = {name: value for name, value in AlsConfig().plain().items() if name in AlsConfig.search_space()}
    whole = settings(sources=[{"name": "collaborative", "model": "als", "config": everything}])
    with pytest.raises(ConfigError, match="gives every setting of 'collaborative'"):
        problem("collaborative", data, cut, whole)


def test_a_good_setting_of_als_beats_a_bad_one(data: Dataset, cut: Boundaries) -> None:
    found = problem("collaborative", data, cut)
    told: list[tuple[int, float]] = []
    good = found.objective(found.default, found.data, lambda step, value: told.append((step, value)))
    bad = found.objective({**found.default, "factors": 1, "regularization": 1e6}, found.data, lambda step, value: None)
    # Tastes are four disjoint groups of 20 items: ten of twenty places at random hit a group, one factor cannot name four.
    assert good > 1.5 * bad
    assert [step for step, _ in told] == [1, 2]
    assert told[-1][1] == good
    assert good == found.objective(found.default, found.data, lambda step, value: None), "the same setting, the same value"


# -- the ranker --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(data: Dataset, cut: Boundaries) -> RankerProblem:
    """200 queries of 12 rows; the label is where ``signal`` is largest, ``noise`` says nothing."""
    draw = np.random.default_rng(3)
    groups = np.repeat(np.arange(200), 12)
    signal, noise = draw.normal(size=(2, 2400)).astype(np.float32)
    labels = np.zeros((2400, 1), np.float32)
    labels[np.arange(200) * 12 + signal.reshape(200, 12).argmax(axis=1)] = 1
    ranker = {"model": "dcn", "config": {"ensemble": 1, "deep": [8], "rank": 4, "training": {"epochs": 50, "learning_rate": 0.01}}}
    made = problem("ranker", data, cut, settings(ranker=ranker), epochs=3)
    assert isinstance(made, RankerProblem)
    return made.with_rows(Rows({"signal": signal, "noise": noise}, labels, groups))


def test_held_out_queries_are_others_and_nothing_is_lost(ranked: RankerProblem) -> None:
    given = ranked.data
    assert isinstance(given, RankerData)
    train, held = set(given.train.groups.tolist()), set(given.held_out.groups.tolist())
    assert not train & held
    assert train | held == set(range(200))
    assert 30 < len(held) < 70
    assert len(given.train) + len(given.held_out) == 2400
    for part in (given.train, given.held_out):
        assert (np.diff(part.groups) >= 0).all()
        assert (np.bincount(part.groups, part.labels[:, 0])[sorted(set(part.groups))] == 1).all()
        assert all(len(column) == len(part) for column in part.columns.values())


def test_the_same_queries_are_held_out_in_every_trial_and_others_under_another_seed(ranked: RankerProblem) -> None:
    given = ranked.data
    whole = Rows({}, np.ones((2400, 1), np.float32), np.repeat(np.arange(200), 12))
    again = ranked.with_rows(whole).data.held_out.groups
    assert again.tolist() == given.held_out.groups.tolist()
    other = replace(ranked, data=replace(given, ctx=FitContext(seed=5))).with_rows(whole).data.held_out.groups
    assert other.tolist() != again.tolist()


def test_the_rankers_value_is_that_of_queries_it_has_not_seen(ranked: RankerProblem) -> None:
    told: list[tuple[int, float]] = []
    assert ranked.halving is not None
    value = ranked.objective(ranked.default, ranked.data, lambda step, value: told.append((step, value)))
    assert [step for step, _ in told] == [1, 2, 3], "the tuning's epochs, not the settings' fifty"
    assert value > 0.7
    # Held-out labels are not learned from: shuffled, they change the value and not the training.
    given = ranked.data
    random = np.random.default_rng(0).permuted(given.held_out.labels.reshape(-1, 12), axis=1).reshape(-1, 1)
    blind: list[tuple[int, float]] = []
    blinded = replace(given, held_out=replace(given.held_out, labels=random))
    worse = ranker_objective(ranked.default, blinded, lambda step, value: blind.append((step, value)))
    assert blind == told
    assert worse < 0.6 < value


def test_the_question_is_told_by_its_settings(data: Dataset, cut: Boundaries) -> None:
    first, same = problem("collaborative", data, cut), problem("collaborative", data, cut)
    other = problem("collaborative", data, cut, settings(sources=[{"name": "collaborative", "model": "als", "config": {"factors": 9}}]))
    assert first.plain() == same.plain()
    assert first.plain() != other.plain()
