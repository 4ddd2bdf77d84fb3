"""Is one recommender better than another? Paired differences on the same users, and the one table that terminal and report share.

Every p-value is of one two-sided test, not corrected for looking at many metrics or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maple.errors import DataError, unknown_name
from maple.evaluate.bootstrap import bootstrap_means, interval, sign_flip_p
from maple.evaluate.harness import Evaluation
from maple.evaluate.metrics import LIST_LEVEL

#: Metrics of which less is better; of all others more is (of ``popularity_rank`` more is less popular).
LESS_IS_BETTER = frozenset({"gini"})

FIRST_COLUMNS = ("ndcg", "recall", "precision", "map", "mrr", "hit", "coverage", "diversity", "novelty", "popularity_rank")


@dataclass(frozen=True)
class Difference:
    """A metric's mean over the same users: this recommender less the baseline. ``low`` / ``high``: 95 % paired bootstrap interval.

    ``lift`` is the relative difference, None where the baseline is 0; ``p_value`` comes from the sign-flip randomisation test;
    wins, ties and losses count users.
    """

    metric: str
    mean: float
    baseline: float
    difference: float
    lift: float | None
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int


def compare(
    evaluation: Evaluation, baseline: Evaluation, *, metrics: Sequence[str] | None = None, seed: int = 0, draws: int = 2000
) -> dict[str, Difference]:
    """Paired differences by metric (default: all per-user metrics that both have), over the same users.

    ``DataError`` unless both evaluations asked the same of the same users.
    """
    differing = evaluation.protocol.same_question(baseline.protocol)
    if differing:
        raise DataError(
            f"these evaluations cannot be compared: they differ in {', '.join(differing)}. "
            "Evaluate both on the same snapshot, window and masking."
        )
    shared = [name for name in evaluation.per_user if name in baseline.per_user]
    names = shared if metrics is None else list(metrics)
    for name in names:
        if name not in shared:
            raise DataError(unknown_name("per-user metric", name, shared))
    if not names:
        return {}
    ours = np.stack([evaluation.per_user[name] for name in names], axis=1)
    theirs = np.stack([baseline.per_user[name] for name in names], axis=1)
    paired = ours - theirs
    low, high = interval(bootstrap_means(paired, draws, seed, "compare/bootstrap"))
    p_values = sign_flip_p(paired, draws, seed, "compare/sign-flip")
    level = np.isclose(paired, 0.0, rtol=0.0, atol=1e-12)
    out: dict[str, Difference] = {}
    for column, name in enumerate(names):
        mean, base = float(ours[:, column].mean()), float(theirs[:, column].mean())
        wins, ties = int((paired[:, column] > 0)[~level[:, column]].sum()), int(level[:, column].sum())
        out[name] = Difference(
            name, mean, base, float(paired[:, column].mean()), (mean - base) / base if base else None,
            float(low[column]), float(high[column]), float(p_values[column]), wins, ties, len(paired) - wins - ties,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class SummaryCell:
    """One metric of one model: its mean, 95 % interval where it has one, and for accuracy the paired difference to the baseline."""

    metric: str
    mean: float
    interval: tuple[float, float] | None
    difference: Difference | None
    best: bool


@dataclass(frozen=True)
class SummaryRow:
    """One model of the table."""

    model: str
    baseline: bool
    cells: tuple[SummaryCell, ...]


def default_metrics(evaluation: Evaluation) -> list[str]:
    """The columns of a first table: the usual accuracy metrics and the list-level ones, at 10 if measured, else at the largest k."""
    ks = evaluation.protocol.ks
    k = 10 if 10 in ks else max(ks)
    return [f"{name}@{k}" for name in FIRST_COLUMNS if f"{name}@{k}" in evaluation.means]


def summary(evaluations: Mapping[str, Evaluation], baseline: str, metrics: Sequence[str] | None = None) -> list[SummaryRow]:
    """Models x metrics, each with its paired difference to the baseline. ``DataError`` for an unknown baseline or metric."""
    if baseline not in evaluations:
        raise DataError(unknown_name("baseline", baseline, evaluations))
    names = list(metrics) if metrics is not None else default_metrics(evaluations[baseline])
    for model, evaluation in evaluations.items():
        for name in names:
            if name not in evaluation.means:
                raise DataError(f"model {model!r}: " + unknown_name("metric", name, evaluation.means))
    best = {name: _best(name, [evaluation.means[name] for evaluation in evaluations.values()]) for name in names}
    rows = []
    for model, evaluation in evaluations.items():
        pairable = [name for name in names if name in evaluation.per_user and name.split("@")[0] not in LIST_LEVEL]
        differences = {} if model == baseline else compare(evaluation, evaluations[baseline], metrics=pairable)
        means = evaluation.means
        cells = [
            SummaryCell(name, means[name], evaluation.intervals.get(name), differences.get(name), means[name] == best[name])
            for name in names
        ]
        rows.append(SummaryRow(model, model == baseline, tuple(cells)))
    return rows


def _best(metric: str, values: Sequence[float]) -> float:
    return min(values) if metric.split("@")[0] in LESS_IS_BETTER else max(values)


def format_value(metric: str, value: float) -> str:
    """A metric's value as people read it: shares with four decimals, ranks without."""
    if metric.startswith("popularity_rank"):
        return f"{value:,.0f}"
    return f"{value:.2f}" if metric.startswith("novelty") else f"{value:.4f}"


def format_difference(difference: Difference | None) -> str:
    """The lift in per cent, with a star where the 95 % interval leaves out 0; empty without a difference."""
    if difference is None:
        return ""
    size = f"{difference.lift:+.1%}" if difference.lift is not None else f"{difference.difference:+.4f}"
    return size + ("*" if difference.low > 0 or difference.high < 0 else "")


def evaluation_rows(evaluations: Mapping[str, Evaluation], baseline: str, metrics: Sequence[str] | None = None) -> list[list[str]]:
    """The table as text, header first: a row per model, a column per metric, ``.3504 (+12.1%*)``; * = the 95 % interval leaves out 0."""
    rows = summary(evaluations, baseline, metrics)
    header = ["model", *(cell.metric for cell in rows[0].cells)]
    body = []
    for row in rows:
        texts = []
        for cell in row.cells:
            change = format_difference(cell.difference)
            texts.append(format_value(cell.metric, cell.mean) + (f" ({change})" if change else ""))
        body.append([row.model + (" (baseline)" if row.baseline else ""), *texts])
    return [header, *body]
