"""Reasons say what is true of this user: bought or only looked at, once or often, or nothing of theirs at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from maple.data.dataset import Int32, Int64
from maple.models.base import QueryBatch
from maple.recommend.engine import Candidates, FunctionStage, Pipeline, Query, check
from maple.recommend.explain import Explain, Reason, reason
from maple.schema import EVENT_CODES

NAMES = ("knn", "popular", "fallback")


class Points:
    """Explains every item by the first item of the history."""

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        assert len(queries) == len(offsets) - 1
        history = queries.histories
        first = [
            history.items[start] if start < stop else -1 for start, stop in zip(history.offsets[:-1], history.offsets[1:], strict=True)
        ]
        return np.repeat(np.array(first, np.int32), np.diff(offsets))


def query(*history: tuple[int, str, int]) -> Query:
    items, events, times = ([event[part] for event in history] for part in range(3))
    codes = np.array([EVENT_CODES[str(name)] for name in events], np.int8)
    return Query("u", np.array(items, np.int32), codes, np.array(times, np.int64), 100, 10)


def reasons(queries: Sequence[Query], *slates: Sequence[tuple[int, int]]) -> list[Reason]:
    """The reasons of slates of (item, source)."""
    items = np.array([item for part in slates for item, _ in part], np.int32)
    source = np.array([code for part in slates for _, code in part], np.int32)
    offsets = np.cumsum([0, *map(len, slates)]).astype(np.int64)
    proposed = Candidates(offsets, items, np.linspace(1, 0, len(items)).astype(np.float32), {"source": source})
    explain = Explain({0: Points()}, frozenset({1, 2}))  # type: ignore[dict-item]
    check(explain, proposed, explain(queries, proposed), len(queries), 100)
    pipeline = Pipeline((FunctionStage("s", lambda q, c: proposed, adds=True),), explain=explain, source_names=NAMES)
    out = pipeline.run(queries, explain=True)
    names = {code: (f"i{code}", f"Item {code}") for code in range(10)}
    return [reason(out, at, names, 30.0) for at in range(len(out.items))]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ("purchase", "because you bought Item 3"),
        ("view", "because you looked at Item 3"),
        ("add_to_cart", "because you put Item 3 in your basket"),
        ("other", "because you know Item 3"),
    ],
)
def test_because_of_what_the_user_did(event: str, text: str) -> None:
    (got,) = reasons([query((3, event, 1))], [(7, 0)])
    assert got == Reason("because", "knn", "i3", text)


def test_the_strongest_event_names_the_reason() -> None:
    (got,) = reasons([query((3, "view", 1), (3, "purchase", 2), (3, "view", 3))], [(7, 0)])
    assert got.text == "because you bought Item 3"


def test_items_of_the_history_itself() -> None:
    often = reasons([query((3, "purchase", 1), (3, "purchase", 2))], [(3, 0)])[0]
    one_basket = reasons([query((3, "purchase", 1), (3, "purchase", 1))], [(3, 0)])[0]
    seen = reasons([query((3, "view", 1))], [(3, 0)])[0]
    assert often == Reason("again", "knn", "i3", "you buy this often")
    assert one_basket.text == "you have bought this before"
    assert seen.text == "you looked at this before"


def test_popularity_and_taste() -> None:
    popular, filled = reasons([query((3, "view", 1))], [(7, 1), (8, 2)])
    assert popular == Reason("popular", "popular", None, "popular in the last 30 days")
    assert filled.source == "fallback"
    assert filled.kind == "popular"
    (taste,) = reasons([query()], [(7, 0)])
    assert taste == Reason("taste", "knn", None, "chosen for your taste")


def test_each_query_is_explained_by_its_own_history() -> None:
    got = reasons([query((3, "purchase", 1)), query(), query((4, "view", 1))], [(7, 0), (8, 1)], [(7, 0)], [(7, 0), (4, 0)])
    assert [one.item_id for one in got] == ["i3", None, None, "i4", "i4"]
    assert [one.kind for one in got] == ["because", "popular", "taste", "because", "again"]
