"""New items: proposed by taste, unknown to every model, kept to their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.data.dataset import DEFAULT_SIGNALS, Float32, Int32, Int64, signal_vector
from maple.models.base import Mask, QueryBatch
from maple.recommend.engine import Candidates, Query, batch, check
from maple.recommend.newcomers import LEAST, NEW, Introduce, Known, NewItems
from maple.schema import EVENT_CODES

DAY = 86_400_000_000
NOW = 1_000 * DAY
PURCHASE, VIEW = EVENT_CODES["purchase"], EVENT_CODES["view"]
START = 4  # items 0 to 3 are known, 4 to 8 new

ITEMS = NewItems(
    START,
    category=np.array([0, 0, 1, -1, 0, 1, 2, -1, 0], np.int32),
    brand=np.array([0, 1, 1, -1, -1, 0, 2, -1, 0], np.int32),
    price=np.array([3, 5, 40, np.nan, 3, 40, 7, 1, np.nan], np.float32),
    newest=np.array([4, 3, 2, 1, 0], np.int32),
    popular=np.array([1, 0, 2, 3], np.int32),
    signals=signal_vector(DEFAULT_SIGNALS),
)  # fmt: skip


def query(*history: tuple[int, int, int], k: int = 10) -> Query:
    """Of (item, event, days ago)."""
    items, events, days = ([event[part] for event in history] for part in range(3))
    return Query("u", np.array(items, np.int32), np.array(events, np.int8), NOW - np.array(days, np.int64) * DAY, NOW, k)


def asked(source: NewItems, *queries: Query, k: int = 5, mask: Mask | None = None) -> list[dict[int, float]]:
    items, scores = source.topk(batch(queries), k, mask)
    assert items.shape == scores.shape == (len(queries), k)
    return [
        {int(item): float(score) for item, score in zip(some, best, strict=True) if item >= 0}
        for some, best in zip(items, scores, strict=True)
    ]


def test_the_score_by_hand() -> None:
    (found,) = asked(ITEMS, query((0, PURCHASE, 0), (2, PURCHASE, 30)))
    # weights 1 and 1/2: category 0 has 2/3, category 1 has 1/3; brand 0 has 2/3, brand 1 has 1/3; log(1 + price) averages 2/3 and 1/3
    level = (2 * np.log(4) + np.log(41)) / 3
    near = {price: (1 + np.exp(-abs(level - np.log1p(price)))) / 2 for price in (3, 40)}
    expected = {8: 4 / 3 * 0.75, 5: (1 / 3 + 2 / 3) * near[40], 4: 2 / 3 * near[3], 7: 0.0}
    assert list(found) == sorted(expected, key=lambda item: -expected[item])
    assert found == pytest.approx({item: score + LEAST for item, score in expected.items()}, rel=1e-5)
    assert 6 not in found, "another category and brand"


def test_who_is_new_meets_the_newest_and_views_say_less_than_purchases() -> None:
    nobody, viewer = asked(ITEMS, query(), query((2, VIEW, 0), (0, PURCHASE, 0)))
    assert list(nobody) == [8, 7, 6, 5, 4]
    assert list(nobody.values()) == pytest.approx([LEAST] * 5)
    assert viewer[8] > viewer[5]


def test_masks_and_unknown_events() -> None:
    allowed = np.ones(9, bool)
    allowed[8] = False
    mask = Mask(allowed, (np.array([0, 3]), np.array([4, 1, -1], np.int32)))
    (found,) = asked(ITEMS, query((0, PURCHASE, 0), (-1, PURCHASE, 0)), mask=mask)
    assert list(found) == [5, 7]
    assert asked(replace(ITEMS, newest=np.empty(0, np.int32)), query()) == [{}]


def test_scores_of_any_candidates() -> None:
    queries, items = (query((0, PURCHASE, 0)), query()), np.array([8, 0, 6, 3, 7], np.int32)
    scores = ITEMS.score(batch(queries), items, np.array([0, 3, 5]))
    assert scores[0] > 1
    assert np.isneginf(scores[[1, 2, 3]]).all()
    assert scores[4] == pytest.approx(LEAST)


def test_similar_to_a_new_item_are_known_ones_of_its_kind() -> None:
    items, scores = ITEMS.similar(np.array([8, 6, 7, 0], np.int32), 3)
    assert items.tolist() == [[0, 1, -1], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert scores[0, :2].tolist() == [1.0, 0.5]


class Recorder:
    """A model of four items that notes what it is asked."""

    def topk(self, queries: QueryBatch, k: int, mask: Mask | None = None) -> tuple[Int32, Float32]:
        assert mask is not None
        assert mask.allowed is not None
        assert mask.exclude is not None
        self.seen = (queries.histories.items.tolist(), len(mask.allowed), mask.exclude[1].tolist())
        return np.zeros((1, k), np.int32), np.zeros((1, k), np.float32)

    def score(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Float32:
        return np.where(items < 0, -np.inf, items).astype(np.float32)

    def similar(self, items: Int32, k: int) -> tuple[Int32, Float32]:
        return items[:, None], np.ones((len(items), 1), np.float32)

    def explain(self, queries: QueryBatch, items: Int32, offsets: Int64) -> Int32:
        return queries.histories.items[-1:].repeat(len(items))


def test_models_do_not_see_codes_beyond_their_own() -> None:
    model = Recorder()
    known = Known(model, START)
    queries = batch([query((1, VIEW, 1), (6, VIEW, 0))])
    known.topk(queries, 2, Mask(np.ones(9, bool), (np.array([0, 2]), np.array([3, 7], np.int32))))
    assert model.seen == ([1, -1], START, [3, -1])
    offsets = np.array([0, 2])
    assert known.score(queries, np.array([2, 8], np.int32), offsets).tolist() == [2, -np.inf]
    assert known.similar(np.array([3, 4], np.int32), 1)[0].tolist() == [[3], [-1]]
    assert known.explain(queries, np.array([2], np.int32), np.array([0, 1])).tolist() == [-1]


def candidates(*lists: Sequence[tuple[int, float]], liking: bool = False) -> Candidates:
    """Of (item, score) in their order; of new items their code is what their source thinks of them."""
    items = np.array([item for part in lists for item, _ in part], np.int32)
    columns = {f"source.{NEW}.score": np.where(items >= START, items, np.nan).astype(np.float32)} if liking else {}
    score = np.array([score for part in lists for _, score in part], np.float32)
    return Candidates(np.cumsum([0, *map(len, lists)]).astype(np.int64), items, score, columns)


def placed(before: Candidates, first: int = 2, every: int = 2) -> list[list[int]]:
    stage = Introduce(START, first, every)
    queries = [query()] * (len(before.offsets) - 1)
    after = stage(queries, before)
    check(stage, before, after, len(queries), 9)
    for start, stop in zip(after.offsets[:-1], after.offsets[1:], strict=True):
        assert (np.diff(after.score[start:stop]) <= 0).all(), "the order is that of the scores"
    return [after.items[start:stop].tolist() for start, stop in zip(after.offsets[:-1], after.offsets[1:], strict=True)]


def test_new_items_take_their_places() -> None:
    ranked = [(7, 9.0), (0, 8.0), (1, 7.0), (2, 6.0), (3, 5.0), (5, 4.0), (8, 3.0)]
    assert placed(candidates(ranked, liking=True)) == [[0, 8, 1, 7, 2, 5, 3]]
    assert placed(candidates(ranked, liking=True), first=1, every=100) == [[8, 0, 1, 2, 3, 7, 5]]
    assert placed(candidates(ranked), first=5, every=10) == [[0, 1, 2, 3, 7, 5, 8]]
    assert placed(candidates([(0, 2.0), (4, 1.0)], [(1, 1.0)], [(6, 5.0)]), first=9) == [[0, 4], [1], [6]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 8), unique=True), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_known_items_keep_their_order_and_new_ones_their_share(items: list[int], first: int, every: int, liking: bool) -> None:
    (after,) = placed(candidates([(item, float(-place)) for place, item in enumerate(items)], liking=liking), first, every)
    known = [item for item in items if item < START]
    assert [item for item in after if item < START] == known
    for place in range(len(known)):
        before = sum(item >= START for item in after[: after.index(known[place])])
        assert before <= (place + before + every - first) // every if place + before + 1 > first else before == 0
