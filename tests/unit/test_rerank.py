"""Reranking rules, each against a hand-worked answer, and maximal marginal relevance against a slow reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.data.dataset import Float32
from maple.errors import ConfigError
from maple.recommend.engine import Candidates, Query, check
from maple.recommend.filters import ItemColumns
from maple.recommend.rerank import DAY, Rerank, unit
from maple.recommend.settings import RerankSettings

NOW = 1_000 * DAY
TABLE = pa.table(
    {
        "item_id": [f"i{code}" for code in range(8)],
        "category": ["a", "a", "a", "a", "b", "b", None, None],
        "brand": ["x", "y", "x", "y", "x", "y", "x", "y"],
        "created_at": pa.array([NOW, NOW - 10 * DAY, None, NOW - 1000 * DAY, NOW + DAY, NOW, NOW, NOW], pa.timestamp("us", tz="UTC")),
    }
)


def stage(rules: dict[str, Any], window: int = 100, vectors: Float32 | None = None) -> Rerank:
    return Rerank.of(RerankSettings.parse(rules, "rerank"), window, ItemColumns(TABLE), vectors, None)


def query(k: int) -> Query:
    none = np.empty(0, np.int64)
    return Query("u", none.astype(np.int32), none.astype(np.int8), none, NOW, k)


def run(rerank: Rerank, k: int = 8, scores: Sequence[float] = (8, 7, 6, 5, 4, 3, 2, 1)) -> list[int]:
    """The slate of items 0.. with these scores."""
    items = np.arange(len(scores), dtype=np.int32)
    before = Candidates(np.array([0, len(items)]), items, np.array(scores, np.float32))
    after = rerank([query(k)], before)
    check(rerank, before, after, 1, 8)
    reported = [scores[item] for item in after.items.tolist()]
    assert after.score.tolist() == pytest.approx(reported)
    return after.items[:k].tolist()


def rule(action: str, weight: float = 0.2, **match: list[Any]) -> dict[str, Any]:
    return {"rules": [{"name": "r", "match": match, "action": action, "weight": weight}]}


def test_without_rules_nothing_is_touched() -> None:
    before = Candidates(np.array([0, 2]), np.array([1, 0], np.int32), np.array([1, 2], np.float32))
    assert stage({})([query(2)], before) is before


def test_caps_and_filling_from_below_the_window() -> None:
    assert run(stage({"caps": [{"column": "category", "limit": 1}]}), k=4) == [0, 4, 6, 7]
    assert run(stage({"caps": [{"column": "category", "limit": 2}]}, window=3), k=4) == [0, 1, 4, 5]
    assert run(stage({"caps": [{"column": "category", "limit": 1}, {"column": "brand", "limit": 1}]}), k=4) == [0, 5]


def test_over_a_cap_is_a_reason_and_never_fills_up() -> None:
    rerank = stage({"caps": [{"column": "brand", "limit": 1}]})
    before = Candidates(np.array([0, 4, 5]), np.array([0, 2, 4, 1, 3], np.int32), np.arange(5, 0, -1).astype(np.float32))
    after = rerank([query(3), query(3)], before)
    check(rerank, before, after, 2, 8)
    assert after.items.tolist() == [0, 1, 3]
    assert [(part.items.tolist(), part.reason) for part in after.dropped] == [([2, 4], "over a cap")]


def test_boost_bury_pin_and_remove() -> None:
    assert run(stage(rule("boost", 0.5, category=["b"]))) == [0, 4, 1, 5, 2, 3, 6, 7]  # 4 at 3/7 + 1/2, 5 at 2/7 + 1/2
    assert run(stage(rule("bury", 0.2, brand=["x"])))[:3] == [1, 0, 3]
    assert run(stage(rule("pin", category=["b"], brand=["y"]))) == [5, 0, 1, 2, 3, 4, 6, 7]
    assert run(stage(rule("pin", category=["b"]), window=2), k=3) == [4, 5, 0]
    assert run(stage(rule("remove", category=["a"]))) == [4, 5, 6, 7]
    assert run(stage(rule("boost", 5.0, category=["b"]), window=3))[:3] == [0, 1, 2]  # 4 and 5 lie below the window


def test_pins_count_towards_caps() -> None:
    rules = rule("pin", brand=["y"], category=["a"]) | {"caps": [{"column": "category", "limit": 2}]}
    assert run(stage(rules), k=4) == [1, 3, 4, 5]


def test_freshness_is_worth_its_weight_at_birth_and_half_after_a_half_life() -> None:
    rerank = stage({"freshness": {"weight": 0.4, "half_life_days": 10}})
    got = rerank._fresh(np.arange(5, dtype=np.int32), NOW)
    assert got.tolist() == pytest.approx([0.4, 0.2, 0.0, 0.0, 0.4], abs=1e-6)
    assert run(rerank, k=2, scores=[1.0, 1.0, 1.2, 0.0]) == [0, 1]


def test_diversity_by_category() -> None:
    # Scaled scores 1, .9, .8, .1: the second of a category loses 0.5 of its half, so b comes second.
    rerank = stage({"mmr": {"relevance": 0.5, "by": "category"}})
    assert run(rerank, k=3, scores=[1.0, 0.9, 0.8, 0.7, 0.1])[:2] == [0, 4]
    assert run(stage({"mmr": {"relevance": 1.0, "by": "category"}}), k=3) == [0, 1, 2]


def slow_mmr(score: Sequence[float], vectors: Float32, relevance: float, k: int) -> list[int]:
    """Carbonell & Goldstein 1998, word for word."""
    low, high = min(score), max(score)
    value = [(one - low) / (high - low) if high > low else 1.0 for one in score]
    chosen: list[int] = []
    while len(chosen) < min(k, len(score)):
        best, best_gain = -1, -np.inf
        for place in sorted(range(len(score)), key=lambda one: (-value[one], one)):
            nearest = max([0.0, *(float(vectors[place] @ vectors[other]) for other in chosen)])
            gain = relevance * value[place] - (1 - relevance) * nearest
            if place not in chosen and gain > best_gain + 1e-6:
                best, best_gain = place, gain
        chosen.append(best)
    return chosen


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), relevance=st.sampled_from([0.3, 0.7, 0.95]), k=st.integers(1, 8))
def test_mmr_equals_the_slow_reference(seed: int, relevance: float, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(8, 3)).astype(np.float32))
    scores = np.sort(rng.random(8))[::-1].astype(np.float32)
    got = run(stage({"mmr": {"relevance": relevance}}, vectors=vectors), k=k, scores=scores.tolist())
    assert got == slow_mmr(scores.tolist(), vectors, relevance, k)


def test_batched_is_one_by_one() -> None:
    rerank = stage({"mmr": {"by": "category", "relevance": 0.6}, "caps": [{"column": "brand", "limit": 2}]} | rule("boost", category=["b"]))
    rng = np.random.default_rng(3)
    parts = [rng.permutation(8)[: rng.integers(1, 8)].astype(np.int32) for _ in range(5)]
    sizes = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    together = rerank(
        [query(4)] * 5,
        Candidates(sizes, np.concatenate(parts), np.concatenate([np.arange(len(p), 0, -1) for p in parts]).astype(np.float32)),
    )
    for row, part in enumerate(parts):
        alone = rerank([query(4)], Candidates(np.array([0, len(part)]), part, np.arange(len(part), 0, -1).astype(np.float32)))
        assert together.items[together.offsets[row] : together.offsets[row + 1]].tolist() == alone.items.tolist()


def test_settings_that_do_not_fit_the_items() -> None:
    with pytest.raises(ConfigError, match=r"rerank.caps.*'colour'"):
        stage({"caps": [{"column": "colour", "limit": 1}]})
    with pytest.raises(ConfigError, match=r"rerank.rules.r.match.*Did you mean 'brand'"):
        stage(rule("boost", brnd=["x"]))
    with pytest.raises(ConfigError, match="item vectors"):
        stage({"mmr": {}})
    with pytest.raises(ConfigError, match="match needs"):
        stage(rule("boost"))
    with pytest.raises(ConfigError, match="relevance"):
        stage({"mmr": {"relevance": 1.5}})
