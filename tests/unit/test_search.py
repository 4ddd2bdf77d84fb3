"""Searching over settings: spaces by known answers, the halving rule against a slow reference, TPE that finds a planted optimum."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.config import Section
from maple.errors import ArtifactError, ConfigError
from maple.models.catalog import MODELS, RANKERS, model_class, ranker_class
from maple.train.search import Halving, Plan, SearchSpace, Trial, best, configured

PLAIN: dict[str, Any] = {
    "regularization": ("log", 1e-4, 10.0),
    "epochs": ("int", 1, 5),
    "layers": ("choice", [(64,), (64, 32)]),
    "learning_rate": ("uniform", 0.0, 1.0),
    "factors": ("choice", [16, 32, 64]),
}
SPACE = SearchSpace.parse(PLAIN, "als")


def test_the_most_rewarding_settings_come_first() -> None:
    assert [d.name for d in SPACE.dimensions] == ["factors", "learning_rate", "layers", "regularization", "epochs"]
    assert [d.name for d in SPACE.first(2).dimensions] == ["factors", "learning_rate"]
    assert [d.name for d in SPACE.only(["epochs", "factors"]).dimensions] == ["factors", "epochs"]
    with pytest.raises(ConfigError, match="Did you mean 'factors'"):
        SPACE.only(["factor"])


def test_a_space_survives_json_and_knows_what_it_holds() -> None:
    assert SearchSpace.parse(json.loads(json.dumps(SPACE.plain())), "again") == SPACE
    good = {"factors": 32, "learning_rate": 0.5, "layers": [64, 32], "regularization": 1.0, "epochs": 5}
    assert SPACE.holds(good)
    for change in (
        {"factors": 33},
        {"epochs": 6},
        {"epochs": 1.5},
        {"regularization": 11.0},
        {"layers": [1]},
        {"epochs": True},
        {"more": 1},
    ):
        assert not SPACE.holds({**good, **change})
    assert not SPACE.holds({name: value for name, value in good.items() if name != "epochs"})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (("log", 0, 1), "0 < low < high"),
        (("uniform", 2, 1), "low < high"),
        (("int", 1, 2.5), "whole numbers"),
        (("log", 1), "two numbers"),
        (("log", 1, math.inf), "two numbers"),
        (("uniform", False, True), "two numbers"),
        (("choice", []), "value"),
        (("choice", "abc"), "value"),
        (("choice", [1, 1]), "twice"),
        (("choice", [object()]), "choices must be"),
        (("grid", [1]), "expected"),
        ("log", "expected"),
        ((), "expected"),
    ],
)
def test_a_wrong_space_names_the_field(spec: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)als: factors.*{says}"):
        SearchSpace.parse({"factors": spec}, "als")


class Training(Section):
    learning_rate: float = 0.5


class Toy(Section):
    factors: int = 32
    training: Training = Training()


def test_settings_of_a_section_are_read_and_set_also_in_its_parts() -> None:
    space = SearchSpace.parse({"training.learning_rate": ("uniform", 0, 1), "factors": ("int", 8, 64)}, "toy")
    assert space.current(Toy()) == {"factors": 32, "training.learning_rate": 0.5}
    changed = configured(Toy(), {"factors": 8, "training.learning_rate": 0.25})
    assert changed == Toy(factors=8, training=Training(learning_rate=0.25))
    assert configured(changed, space.current(Toy())) == Toy()
    with pytest.raises(ConfigError, match=r"training\.rate"):
        configured(Toy(), {"training.rate": 0.25})
    with pytest.raises(ConfigError, match="tower"):
        configured(Toy(), {"tower.rate": 0.25})
    with pytest.raises(ConfigError, match="tower"):
        SearchSpace.parse({"tower.rate": ("int", 1, 2)}, "toy").current(Toy())


@pytest.mark.parametrize("name", [*MODELS, *RANKERS])
def test_the_space_of_every_model_holds_its_sections_fields(name: str) -> None:
    kind = (model_class(name) if name in MODELS else ranker_class(name)).Config
    if not hasattr(kind, "search_space"):
        pytest.skip(f"{name} has nothing to search")
    space = SearchSpace.parse(kind.search_space(), name)
    for number in range(20):
        config = Plan(space, 20, 0).suggest(number, [])
        assert space.current(configured(kind(), config)) == config


def test_an_empty_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="search space is empty"):
        SearchSpace.parse({}, "als")
    with pytest.raises(ConfigError, match="at least one trial"):
        Plan(SPACE, 0, 0)
    with pytest.raises(ConfigError, match="mode"):
        Plan(SPACE, 1, 0, mode="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eta"):
        Halving(eta=1)


def test_random_trials_depend_on_seed_and_number_alone_and_fill_the_space() -> None:
    plan = Plan(SPACE, 500, 0, seed=7)
    drawn = [plan.suggest(number, []) for number in range(500)]
    assert all(SPACE.holds(config) for config in drawn)
    assert drawn[123] == Plan(SPACE, 999, 9, seed=7).suggest(123, [Trial(5, "random", drawn[5])])
    assert drawn[123] != Plan(SPACE, 500, 0, seed=8).suggest(123, [])
    assert {config["epochs"] for config in drawn} == {1, 2, 3, 4, 5}
    assert {tuple(config["layers"]) for config in drawn} == {(64,), (64, 32)}
    # On a log scale half of the draws lie below the geometric mean, 10**-1.5; 500 draws: +-4 standard deviations.
    assert abs(np.mean([config["regularization"] < 10**-1.5 for config in drawn]) - 0.5) < 0.09


def run(plan: Plan, objective: Any) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(plan.total):
        config = plan.suggest(number, trials)
        trials.append(Trial(number, plan.phase(number), config, "complete", ((1, objective(config)),), objective(config)))
    return trials


def bowl(config: dict[str, Any]) -> float:
    return (math.log10(config["rate"]) + 2) ** 2 + (config["size"] - 40) ** 2 / 400 + (0.0 if config["kind"] == "b" else 0.5)


BOWL = SearchSpace.parse({"rate": ("log", 1e-5, 1.0), "size": ("int", 8, 128), "kind": ("choice", ["a", "b", "c"])}, "bowl")


def test_tpe_beats_random_search_on_average_at_the_same_number_of_trials() -> None:
    tpe, random = [], []
    for seed in range(8):
        tpe.append((best(run(Plan(BOWL, 10, 20, seed=seed, mode="min"), bowl), "min") or pytest.fail("none")).value)
        random.append((best(run(Plan(BOWL, 30, 0, seed=seed, mode="min"), bowl), "min") or pytest.fail("none")).value)
    assert np.mean(tpe) < 0.5 * np.mean(random)


def test_tpe_maximises_too_and_given_configurations_go_first() -> None:
    start = {"rate": 1.0, "size": 128, "kind": "a"}
    trials = run(Plan(BOWL, 8, 16, seed=1, mode="max", given=(start,)), lambda config: -bowl(config))
    assert [t.phase for t in trials] == ["given"] + ["random"] * 8 + ["tpe"] * 16
    assert trials[0].config == start
    late = np.mean([t.value for t in trials if t.phase == "tpe"])
    assert late > np.mean([t.value for t in trials if t.phase == "random"])


def test_a_tpe_suggestion_is_a_function_of_the_trials_in_any_order() -> None:
    plan = Plan(BOWL, 10, 10, seed=3, mode="min")
    trials = run(plan, bowl)[:14]
    outside = Trial(50, "given", {"rate": 5.0, "size": 1, "kind": "z"}, "complete", (), 0.0)  # not of this space: ignored
    failed = Trial(51, "tpe", trials[0].config, "failed")
    again = [Trial.parse(json.loads(json.dumps(trial.plain())), "x") for trial in reversed(trials)]
    assert again[::-1] == trials
    asked = plan.suggest(14, trials)
    assert asked == plan.suggest(14, [*again, outside, failed]) == plan.suggest(14, [*trials, Trial(14, "tpe", asked)])
    assert asked != plan.suggest(15, trials)
    assert BOWL.holds(asked)


def test_tpe_with_nothing_known_or_only_running_and_pruned_trials() -> None:
    plan = Plan(BOWL, 0, 5, seed=3, mode="min")
    assert BOWL.holds(plan.suggest(0, []))
    config = Plan(BOWL, 5, 0).suggest(0, [])
    assert BOWL.holds(
        plan.suggest(3, [Trial(0, "tpe", config), Trial(1, "tpe", config, "pruned", ((1, 2.0),)), Trial(2, "tpe", config, "pruned")])
    )


def test_best_counts_complete_trials_only_and_the_earlier_of_equals() -> None:
    assert best([], "max") is None
    trials = [
        Trial(0, "random", {}, "pruned", ((1, 9.0),), 9.0),
        Trial(2, "random", {}, "complete", (), 1.0),
        Trial(1, "random", {}, "complete", (), 1.0),
        Trial(3, "random", {}, "complete", (), 0.5),
        Trial(4, "random", {}, "failed"),
    ]
    assert (best(trials, "max") or trials[0]).number == 1
    assert (best(trials, "min") or trials[0]).number == 3


def test_a_record_that_is_none_says_so() -> None:
    with pytest.raises(ArtifactError, match=r"trials/3\.json"):
        Trial.parse({"number": 3}, "trials/3.json")
    with pytest.raises(ArtifactError, match=r"trials/3\.json"):
        Trial.parse({**Trial(3, "random", {}).plain(), "values": [["x", 1.0]]}, "trials/3.json")


def test_rungs() -> None:
    assert Halving(1, 3).rungs(0, 30) == [1, 3, 9, 27]
    assert Halving(2, 2).rungs(2, 16) == [4, 8, 16]
    assert Halving(5, 2).rungs(0, 4) == []
    assert Halving(1, 3, steps=27).rungs(0, 30) == [1, 3, 9]


def test_a_trial_stops_when_it_falls_out_of_the_best_third() -> None:
    rule = Halving(grace=2, eta=3)
    others = [Trial(n, "random", {}, "complete", ((1, 0.0), (2, value), (3, 1.0))) for n, value in enumerate([0.1, 0.2])]
    assert not rule.stops(Trial(9, "random", {}, values=((1, -1.0),)), others, "max")  # before the first rung
    assert rule.stops(Trial(9, "random", {}, values=((1, 0.0), (2, 0.15))), others, "max")  # third of three, one may stay
    assert not rule.stops(Trial(9, "random", {}, values=((1, 0.0), (2, 0.3))), others, "max")
    assert not rule.stops(Trial(9, "random", {}, values=((1, 0.0), (2, 0.05))), others, "min")
    assert not rule.stops(Trial(9, "random", {}, values=((2, 0.15), (3, -9.0))), others, "max")  # no rung at 3
    assert not rule.stops(Trial(9, "random", {}, values=((2, 0.0),)), others[:1], "max")  # too few to compare with
    assert rule.stops(Trial(9, "random", {}, values=((4, 0.0),)), others, "max")  # a coarse reporter passes rung 2 on the way
    assert not rule.stops(Trial(9, "random", {}), others, "max")


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=9), min_size=1, max_size=12),
    st.lists(st.integers(0, 5).map(float), min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(2, 4),
)
def test_the_halving_rule_equals_a_sorted_list(others: list[list[float]], own: list[float], grace: int, eta: int) -> None:
    trials = [Trial(n, "random", {}, "complete", tuple(enumerate(values, start=1))) for n, values in enumerate(others)]
    trial = Trial(99, "random", {}, values=tuple(enumerate(own, start=1)))
    step = len(own)
    is_rung = any(step == grace * eta**power for power in range(8))
    field = sorted([values[step - 1] for values in others if len(values) >= step] + [own[-1]], reverse=True)
    expected = is_rung and len(field) >= eta and own[-1] < field[math.ceil(len(field) / eta) - 1]
    assert Halving(grace, eta).stops(trial, trials, "max") == expected
