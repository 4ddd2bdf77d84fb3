"""Hydration and scoring: columns in, one score out, and nothing that does not fit goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from maple.data.dataset import Float32, Int32, Int64
from maple.errors import ArtifactError
from maple.models.base import Array
from maple.recommend.engine import Candidates, Pipeline, Query, StageError, check
from maple.recommend.rankers import Hydrate, Score, check_columns


class Features:
    names = ("f.item", "f.user")

    def columns(self, queries: Sequence[Query], offsets: Int64, items: Int32) -> Mapping[str, Array]:
        users = np.repeat(np.array([len(query.items) for query in queries], np.float32), np.diff(offsets))
        return {"f.item": items.astype(np.float32), "f.user": users}


class Tasks:
    """A ranker of two tasks from a function of the columns."""

    def __init__(self, function: Callable[[Mapping[str, Array]], Any]) -> None:
        self.score = function


def two(columns: Mapping[str, Array]) -> Float32:
    return np.stack([columns["f.item"], -columns["f.user"]], axis=1)


def query(*history: int) -> Query:
    items = np.array(history, np.int32)
    return Query("u", items, np.zeros(len(items), np.int8), np.zeros(len(items), np.int64), 100)


QUERIES = [query(4, 5), query(-1), query()]
BEFORE = Candidates(
    np.array([0, 2, 4, 6]), np.array([1, 2, 1, 2, 1, 2], np.int32), np.array([9, 8, 9, 8, 9, 8], np.float32),
    {"source.a.score": np.arange(6, dtype=np.float32), "sources": np.ones(6, np.int32), "source": np.zeros(6, np.int32)},
)  # fmt: skip


def score(ranker: Any, cold: str = "rank", columns: tuple[str, ...] = ("f.item", "f.user")) -> Candidates:
    hydrate, stage = Hydrate(Features()), Score(ranker, columns, {"buy": 2.0, "click": 0.5}, cold)
    hydrated = hydrate(QUERIES, BEFORE)
    check(hydrate, BEFORE, hydrated, 3)
    after = stage(QUERIES, hydrated)
    check(stage, hydrated, after, 3)
    return after


def test_tasks_are_weighted_into_one_score() -> None:
    after = score(Tasks(two))
    assert after.score.tolist() == [1.0, 3.0, 1.5, 3.5, 2.0, 4.0]
    assert after.columns["task.click"].tolist() == [-2, -2, -1, -1, 0, 0]


def test_feature_columns_stay_behind_and_the_sources_columns_stay() -> None:
    assert set(score(Tasks(two)).columns) == {"source.a.score", "source", "sources", "task.buy", "task.click"}


def test_users_without_known_history_keep_the_sources_order() -> None:
    assert score(Tasks(two), cold="popular").score.tolist() == [1.0, 3.0, 9.0, 8.0, 9.0, 8.0]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda columns: two(columns)[:-1], "5, 2"),
        (lambda columns: two(columns)[:, :1], "2 tasks"),
        (lambda columns: np.where(np.arange(6)[:, None] == 3, np.nan, two(columns)), "finite"),
        (lambda columns: two(columns) * np.float32(np.inf), "finite"),
    ],
)
def test_scores_that_do_not_fit(answer: Any, complaint: str) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(StageError, match=complaint):
        score(Tasks(answer))


def test_missing_columns_are_found_before_any_request() -> None:
    check_columns(["a"], ["b", "a"])
    with pytest.raises(ArtifactError, match="shoe_size"):
        check_columns(["a", "shoe_size"], ["a"])
    with pytest.raises(StageError, match="shoe_size"):
        score(Tasks(two), columns=("shoe_size",))


def test_features_may_not_overwrite() -> None:
    with pytest.raises(StageError, match="overwrite"):
        Hydrate(Features())(QUERIES, BEFORE.with_columns({"f.item": np.zeros(6)}))


def test_a_ranker_that_gives_nan_is_answered_around() -> None:
    class Source:
        name, adds, essential = "source", True, True

        def __call__(self, queries: Sequence[Query], before: Candidates) -> Candidates:
            return BEFORE

    bad = Score(Tasks(lambda columns: two(columns) * np.nan), ("f.item", "f.user"), {"buy": 1.0, "click": 1.0})  # type: ignore[arg-type]
    out = Pipeline((Source(),), (Hydrate(Features()), bad)).run(QUERIES, on_error="degrade")
    assert out.items.tolist() == [1, 2, 1, 2, 1, 2]
    assert out.degraded == ("rank: error:StageError",)
