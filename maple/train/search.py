"""Searching over settings, without a cluster: what may vary, which setting to try next, which trial is not worth finishing.

Everything is a function of the trials known so far, so a search that was killed goes on from its records alone:
``suggest`` draws trial n from the run's seed and n (random phase), or by TPE from all results (Bergstra et al. 2011, as
Optuna implements it); ``Halving.stops`` is the asynchronous successive-halving rule (Li et al. 2020, algorithm 2, in the
stopping form: a trial goes on until it falls out of the best 1/eta of its rung).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from maple.config import Section
from maple.errors import ArtifactError, ConfigError, unknown_name
from maple.hashing import rng, torch_seed

Kind: TypeAlias = Literal["log", "uniform", "int", "choice"]
Mode: TypeAlias = Literal["max", "min"]
Phase: TypeAlias = Literal["given", "random", "tpe"]
State: TypeAlias = Literal["running", "complete", "pruned", "failed"]
Config: TypeAlias = dict[str, Any]
S = TypeVar("S", bound=Section)

#: Fragments of setting names in the order in which tuning them pays: embedding size, learning rate, layers, regularisation.
_FIRST: tuple[tuple[str, ...], ...] = (
    ("factor", "dim", "embedding", "size"),
    ("learning_rate", "lr"),
    ("layer", "deep", "depth", "hidden", "cross", "width"),
    ("regular", "decay", "dropout", "l2", "alpha"),
)


@dataclass(frozen=True)
class Dimension:
    """One setting that varies: a float in [low, high] on a log or linear scale, an integer in [low, high], or one of ``choices``."""

    name: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    def sample(self, generator: np.random.Generator) -> Any:
        """A random value, as a plain Python object."""
        if self.kind == "log":
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
            return min(max(value, self.low), self.high)
        if self.kind == "uniform":
            return float(generator.uniform(self.low, self.high))
        if self.kind == "int":
            return int(generator.integers(int(self.low), int(self.high) + 1))
        return self.choices[int(generator.integers(len(self.choices)))]

    def holds(self, value: Any) -> bool:
        """Whether a value lies in this dimension."""
        if self.kind == "choice":
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (self.kind != "int" or value == int(value))

    def outer(self, value: Any) -> float | int:
        """The value as Optuna sees it: a choice is its place, so that lists may be choices."""
        return self.choices.index(value) if self.kind == "choice" else value

    def inner(self, value: Any) -> Any:
        """The inverse of ``outer``."""
        return self.choices[int(value)] if self.kind == "choice" else value

    def distribution(self) -> Any:
        """The Optuna distribution of ``outer`` values."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(tuple(range(len(self.choices))))
        if self.kind == "int":
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.kind == "log")


@dataclass(frozen=True)
class SearchSpace:
    """The settings that vary, most rewarding first."""

    dimensions: tuple[Dimension, ...]

    @staticmethod
    def parse(plain: Mapping[str, Sequence[Any]], where: str) -> SearchSpace:
        """From ``{field: ("log"|"uniform"|"int", low, high) or ("choice", [...])}``; ``ConfigError`` names the field."""
        if not plain:
            raise ConfigError(f"{where}: the search space is empty; name at least one setting to vary")
        found = [_dimension(name, spec, f"{where}: {name}") for name, spec in plain.items()]
        return SearchSpace(tuple(sorted(found, key=lambda dimension: _importance(dimension.name))))

    def only(self, names: Sequence[str]) -> SearchSpace:
        """The space of some settings; ``ConfigError`` for an unknown one."""
        known = [dimension.name for dimension in self.dimensions]
        for name in names:
            if name not in known:
                raise ConfigError(unknown_name("setting to search", name, known))
        return SearchSpace(tuple(dimension for dimension in self.dimensions if dimension.name in names))

    def first(self, count: int) -> SearchSpace:
        """The ``count`` most rewarding settings."""
        return SearchSpace(self.dimensions[:count])

    def plain(self) -> dict[str, list[Any]]:
        """JSON-ready, the inverse of ``parse``."""
        return {d.name: [d.kind, list(d.choices)] if d.kind == "choice" else [d.kind, d.low, d.high] for d in self.dimensions}

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration names exactly these settings, each inside its range."""
        return set(config) == {d.name for d in self.dimensions} and all(d.holds(config[d.name]) for d in self.dimensions)

    def sample(self, generator: np.random.Generator) -> Config:
        """A random configuration."""
        return {dimension.name: dimension.sample(generator) for dimension in self.dimensions}

    def current(self, section: Section) -> Config:
        """What a section has at these settings now: say, the defaults, to be tried first. A dotted name reaches into a part."""
        out: Config = {}
        for dimension in self.dimensions:
            value: Any = section.plain()
            for part in dimension.name.split("."):
                if not isinstance(value, dict) or part not in value:
                    raise ConfigError(f"the search space names {dimension.name!r}, which {type(section).__name__} does not have")
                value = value[part]
            out[dimension.name] = value
        return out


def configured(section: S, config: Mapping[str, Any]) -> S:
    """A validated copy of a section with the settings of a configuration. A dotted name reaches into a part."""
    plain = section.plain()
    for name, value in config.items():
        *parents, last = name.split(".")
        part = plain
        for parent in parents:
            if not isinstance(part.get(parent), dict):
                raise ConfigError(f"the setting {name!r} to search is not in {type(section).__name__}")
            part = part[parent]
        part[last] = value
    return type(section).parse(plain, type(section).__name__)


def _importance(name: str) -> tuple[int, str]:
    for rank, fragments in enumerate(_FIRST):
        if any(fragment in name for fragment in fragments):
            return rank, name
    return len(_FIRST), name


def _dimension(name: str, spec: Sequence[Any], where: str) -> Dimension:
    if isinstance(spec, str) or not isinstance(spec, Sequence) or not spec or spec[0] not in ("log", "uniform", "int", "choice"):
        raise ConfigError(f'{where}: expected ("log"|"uniform"|"int", low, high) or ("choice", [values]), found {spec!r}')
    kind: Kind = spec[0]
    if kind == "choice":
        if len(spec) != 2 or isinstance(spec[1], str) or not isinstance(spec[1], Sequence) or not spec[1]:
            raise ConfigError(f'{where}: expected ("choice", [value, ...]), found {spec!r}')
        try:
            choices = tuple(json.loads(json.dumps(list(spec[1]), allow_nan=False)))  # what the records will give back: tuples are lists
        except (TypeError, ValueError):
            raise ConfigError(f"{where}: choices must be numbers, texts, booleans, nulls or lists of them, found {spec[1]!r}") from None
        if any(choices.index(choice) != place for place, choice in enumerate(choices)):
            raise ConfigError(f"{where}: a choice is named twice: {spec[1]!r}")
        return Dimension(name, kind, choices=choices)
    bounds = spec[1:]
    if len(bounds) != 2 or any(isinstance(b, bool) or not isinstance(b, int | float) or not math.isfinite(b) for b in bounds):
        raise ConfigError(f'{where}: expected ("{kind}", low, high) with two numbers, found {spec!r}')
    low, high = bounds
    if low >= high or (kind == "log" and low <= 0) or (kind == "int" and (low != int(low) or high != int(high))):
        rule = {"log": "0 < low < high", "uniform": "low < high", "int": "whole numbers with low < high"}[kind]
        raise ConfigError(f"{where}: a {kind} range needs {rule}, found {low} to {high}")
    return Dimension(name, kind, int(low) if kind == "int" else float(low), int(high) if kind == "int" else float(high))


# -- trials ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One configuration and how it went. ``values`` are (step, value) as reported, steps rising; ``value`` is the final one."""

    number: int
    phase: Phase
    config: Config
    state: State = "running"
    values: tuple[tuple[int, float], ...] = ()
    value: float | None = None
    started: str = ""  # UTC, ISO 8601
    seconds: float | None = None
    error: str = ""
    run_id: str = ""  # of the tracking server

    def plain(self) -> dict[str, Any]:
        """JSON-ready, the inverse of ``parse``."""
        return asdict(self) | {"values": [list(pair) for pair in self.values]}

    @staticmethod
    def parse(plain: Mapping[str, Any], where: str) -> Trial:
        """A recorded trial; ``ArtifactError`` if it is none."""
        try:
            trial = Trial(**plain)
            return replace(trial, values=tuple((int(step), float(value)) for step, value in trial.values))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{where} is not the record of a trial ({error}). Remove it: the trial is then run again.") from None

    def at(self, step: int) -> float | None:
        """The first value reported at ``step`` or later; None before that."""
        return next((value for reported, value in self.values if reported >= step), None)


def best(trials: Sequence[Trial], mode: Mode) -> Trial | None:
    """The complete trial with the best final value, the earlier one of equals; None where no trial is complete."""
    done = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    return min(done, key=lambda trial: (_loss(trial.value or 0.0, mode), trial.number), default=None)


def _loss(value: float, mode: Mode) -> float:
    return -value if mode == "max" else value


@dataclass(frozen=True)
class Halving:
    """When to stop a trial early: at steps ``grace * eta**i`` it must be among the best 1/eta of all trials that got there.

    A rung judges only once eta trials have reached it, so the first few are never stopped for want of company. ``steps`` is how many
    a whole trial takes: there is no rung at the end, where nothing is left to save.
    """

    grace: int = 1
    eta: int = 3
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.grace < 1 or self.eta < 2 or (self.steps is not None and self.steps < 1):
            raise ConfigError(f"early stopping needs grace >= 1, eta >= 2 and steps >= 1, found {self.grace}, {self.eta} and {self.steps}")

    def rungs(self, after: int, upto: int) -> list[int]:
        """The rungs in (after, upto]."""
        out, rung = [], self.grace
        while rung <= upto and (self.steps is None or rung < self.steps):
            if rung > after:
                out.append(rung)
            rung *= self.eta
        return out

    def stops(self, trial: Trial, others: Sequence[Trial], mode: Mode) -> bool:
        """Whether ``trial``, whose last report is new, has just fallen out of a rung."""
        if not trial.values:
            return False
        before = trial.values[-2][0] if len(trial.values) > 1 else 0
        for rung in self.rungs(before, trial.values[-1][0]):
            own = trial.at(rung)
            rivals = [other.at(rung) for other in others if other.number != trial.number]
            arrived = [value for value in rivals if value is not None]
            if own is None or len(arrived) + 1 < self.eta:
                continue
            better = sum(_loss(value, mode) < _loss(own, mode) for value in arrived)
            if better >= math.ceil((len(arrived) + 1) / self.eta):
                return True
        return False


# -- what to try next --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A whole search: ``given`` configurations first, then random ones, then TPE, each count in trials."""

    space: SearchSpace
    random_trials: int
    tpe_trials: int
    seed: int = 0
    mode: Mode = "max"
    given: tuple[Config, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.random_trials < 0 or self.tpe_trials < 0 or self.total < 1:
            raise ConfigError(f"a search needs at least one trial, found {self.random_trials} random and {self.tpe_trials} TPE trials")
        if self.mode not in ("max", "min"):
            raise ConfigError(f"mode must be max or min, found {self.mode!r}")
        names = {dimension.name for dimension in self.space.dimensions}
        for config in self.given:
            if set(config) != names:
                raise ConfigError(f"a given configuration must set exactly {', '.join(sorted(names))}; it sets {', '.join(sorted(config))}")

    @property
    def total(self) -> int:
        return len(self.given) + self.random_trials + self.tpe_trials

    def phase(self, number: int) -> Phase:
        """The phase of trial ``number``, counted from 0."""
        if number < len(self.given):
            return "given"
        return "random" if number < len(self.given) + self.random_trials else "tpe"

    def suggest(self, number: int, trials: Sequence[Trial]) -> Config:
        """The configuration of trial ``number``: a function of the plan, ``number`` and the other trials alone."""
        phase = self.phase(number)
        if phase == "given":
            return dict(json.loads(json.dumps(self.given[number])))
        if phase == "random":
            return self.space.sample(rng(self.seed, f"search/{number}"))
        return _tpe(self, number, [trial for trial in trials if trial.number != number])


def _tpe(plan: Plan, number: int, trials: Sequence[Trial]) -> Config:
    """Ask Optuna's TPE, told all trials anew: running ones count as bad where they are (constant liar), failed ones not at all."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dimensions = plan.space.dimensions
    distributions = {dimension.name: dimension.distribution() for dimension in dimensions}
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "running": TrialState.RUNNING}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=1, multivariate=True, constant_liar=True, seed=torch_seed(plan.seed, f"search/{number}") % 2**32
        )
        study = optuna.create_study(direction="maximize" if plan.mode == "max" else "minimize", sampler=sampler)
        for trial in sorted(trials, key=lambda trial: trial.number):
            if trial.state not in states or not plan.space.holds(trial.config):
                continue
            study.add_trial(
                create_trial(
                    state=states[trial.state],
                    value=trial.value if trial.state == "complete" else None,
                    params={dimension.name: dimension.outer(trial.config[dimension.name]) for dimension in dimensions},
                    distributions=distributions,
                    intermediate_values=dict(trial.values),
                )
            )
        asked = study.ask(fixed_distributions=distributions).params
    return {dimension.name: dimension.inner(asked[dimension.name]) for dimension in dimensions}
