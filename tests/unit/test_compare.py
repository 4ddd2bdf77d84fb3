"""Comparison: paired differences with known answers, what may not be compared, and the shared table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from maple.errors import DataError
from maple.evaluate.compare import compare, default_metrics, evaluation_rows, summary
from maple.evaluate.harness import CatalogueStats, Evaluation, Relevant, evaluate
from maple.hashing import rng

USERS, ITEMS = 300, 40
RELEVANT = Relevant(np.arange(USERS, dtype=np.int32), np.arange(USERS + 1), rng(0, "wanted").integers(0, ITEMS, USERS).astype(np.int32))
STATS = CatalogueStats(np.arange(ITEMS)[::-1].copy(), ITEMS, categories=(np.arange(ITEMS) % 4).astype(np.int32))


def model(skill: float, seed: int, relevant: Relevant = RELEVANT, ks: tuple[int, ...] = (1, 5)) -> Evaluation:
    """Finds the relevant item for a share of the users, and is random otherwise."""
    scores = rng(seed, "scores").random((USERS, ITEMS))
    lucky = rng(seed, "luck").random(USERS) < skill
    scores[lucky, RELEVANT.items[lucky]] = 2.0
    lists = np.argsort(-scores, axis=1)[:, : max(ks)].astype(np.int32)
    return evaluate(lambda rows: lists[rows], relevant, catalogue=STATS, ks=ks, bootstrap=100)


def test_a_difference_has_the_paired_mean_counts_and_lift() -> None:
    good, poor = model(0.5, 1), model(0.1, 2)
    found = compare(good, poor)["hit@1"]
    mine, base = good.per_user["hit@1"], poor.per_user["hit@1"]
    assert found.difference == pytest.approx((mine - base).mean())
    assert found.lift == pytest.approx((mine.mean() - base.mean()) / base.mean())
    assert (found.wins, found.ties, found.losses) == (int((mine > base).sum()), int((mine == base).sum()), int((mine < base).sum()))
    assert found.wins + found.ties + found.losses == USERS
    assert found.low < found.difference < found.high
    assert found.low > 0
    assert found.p_value < 0.001
    back = compare(poor, good)["hit@1"]
    assert (back.difference, back.wins, back.losses) == (-found.difference, found.losses, found.wins)


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    base = model(0.5, 1)
    better = replace(base, per_user={name: values + 0.001 for name, values in base.per_user.items()})
    found = compare(better, base, metrics=["ndcg@5"])["ndcg@5"]
    assert found.low > 0
    assert found.high - found.low < 1e-9 < base.intervals["ndcg@5"][1] - base.intervals["ndcg@5"][0]


def test_a_model_against_itself_differs_in_nothing() -> None:
    base = model(0.5, 1)
    for found in compare(base, base).values():
        assert (found.difference, found.low, found.high, found.p_value, found.wins, found.losses) == (0, 0, 0, 1, 0, 0)


def test_equal_models_are_called_different_about_as_often_as_they_should() -> None:
    rejected = sum(
        compare(model(0.3, 2 * run), model(0.3, 2 * run + 1), metrics=["ndcg@5"], draws=199)["ndcg@5"].p_value <= 0.05 for run in range(60)
    )
    assert rejected <= 10  # 99.9 % binomial band around 5 % of 60


def test_no_lift_where_the_baseline_is_zero() -> None:
    nothing = replace(model(0.0, 1), per_user={"hit@1": np.zeros(USERS)})
    assert compare(model(0.5, 1), nothing)["hit@1"].lift is None


def test_other_questions_are_not_compared() -> None:
    base = model(0.5, 1)
    fewer = RELEVANT.take(np.arange(USERS)[::-1])
    with pytest.raises(DataError, match="differ in relevant"):
        compare(model(0.5, 1, fewer), base)
    with pytest.raises(DataError, match="differ in masked"):
        compare(replace(base, protocol=replace(base.protocol, masked=True)), base)
    with pytest.raises(DataError, match=r"unknown per-user metric 'ndgc@5'. Did you mean 'ndcg@5'"):
        compare(base, base, metrics=["ndgc@5"])


def test_the_table_has_a_row_per_model_and_marks_the_best() -> None:
    models = {"popular": model(0.1, 1), "ours": model(0.6, 2)}
    rows = summary(models, "popular", ["hit@1", "gini@5", "coverage@5"])
    assert [(row.model, row.baseline) for row in rows] == [("popular", True), ("ours", False)]
    assert rows[1].cells[0].best
    assert rows[1].cells[1].best == (models["ours"].means["gini@5"] < models["popular"].means["gini@5"])
    assert rows[0].cells[0].difference is None
    assert rows[1].cells[2].interval is None
    text = evaluation_rows(models, "popular", ["hit@1", "coverage@5"])
    assert text[0] == ["model", "hit@1", "coverage@5"]
    assert text[1][0] == "popular (baseline)"
    lift = models["ours"].means["hit@1"] / models["popular"].means["hit@1"] - 1
    assert text[2][1] == f"{models['ours'].means['hit@1']:.4f} ({lift:+.1%}*)"
    assert text[2][2] == f"{models['ours'].means['coverage@5']:.4f}"


def test_default_columns_and_unknown_names() -> None:
    base = model(0.5, 1)
    assert default_metrics(base)[:2] == ["ndcg@5", "recall@5"]
    assert "coverage@5" in default_metrics(base)
    with pytest.raises(DataError, match="unknown baseline 'pop'"):
        summary({"popular": base}, "pop")
    with pytest.raises(DataError, match=r"model 'popular': unknown metric 'x'"):
        summary({"popular": base}, "popular", ["x"])
