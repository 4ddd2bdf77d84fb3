"""Popularity and personal frequency: known answers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from maple.data.dataset import Dataset, Histories
from maple.errors import ConfigError
from maple.models.base import FitContext, Mask, QueryBatch
from maple.models.frequency import Frequency, FrequencyConfig
from maple.models.popularity import Popularity, PopularityConfig, item_popularity
from maple.schema import EVENT_CODES, TIMESTAMP

DAY = 86_400_000_000
PURCHASE, VIEW = EVENT_CODES["purchase"], EVENT_CODES["view"]


def shop(rows: list[tuple[str, str, str, float]], items: str = "abcd") -> Dataset:
    """(user, item, event, day) rows over single-letter items."""
    users, bought, events, days = zip(*rows, strict=True)
    table = pa.table(
        {
            "event_id": [f"{n:04d}" for n in range(len(rows))],
            "user_id": list(users),
            "item_id": list(bought),
            "event": list(events),
            "timestamp": pa.array([int(day * DAY) for day in days], TIMESTAMP),
            "value": pa.nulls(len(rows), pa.float32()),
            "price": pa.nulls(len(rows), pa.float32()),
        }
    )
    return Dataset.from_tables(table, pa.table({"item_id": list(items)}))


ROWS = [
    ("u", "a", "purchase", 0), ("v", "a", "purchase", 1), ("w", "a", "purchase", 2),
    ("u", "b", "purchase", 50), ("u", "b", "purchase", 55), ("v", "c", "purchase", 59), ("w", "c", "view", 60),
    ("w", "c", "impression", 60), ("w", "d", "impression", 60),
]  # fmt: skip


def test_distinct_users_over_all_time():
    assert item_popularity(shop(ROWS), PopularityConfig(window_days=None)).tolist() == [3, 1, 2, 0]


def test_signals_sum_over_all_events():
    counts = item_popularity(shop(ROWS), PopularityConfig(window_days=None, weighting="signals"))
    np.testing.assert_allclose(counts, [3, 2, 1.1, 0], rtol=1e-6)


def test_a_window_ends_at_the_last_event_and_older_items_follow_in_order():
    counts = item_popularity(shop(ROWS), PopularityConfig(window_days=30))
    assert counts[1:].tolist() == [1, 2, 0]
    assert 0 < counts[0] < 1
    model = Popularity(PopularityConfig(window_days=30))
    model.fit(shop(ROWS), FitContext())
    nobody = QueryBatch(Histories.of([([], [], [])]), np.array([61 * DAY]))
    assert model.topk(nobody, 4)[0].tolist() == [[2, 1, 0, 3]]


def test_half_life_counts_the_latest_event_of_each_user():
    counts = item_popularity(shop(ROWS), PopularityConfig(window_days=None, half_life_days=10))
    want = [2 ** -(60 / 10) + 2 ** -(59 / 10) + 2 ** -(58 / 10), 2**-0.5, 2**-0.1 + 1, 0]
    np.testing.assert_allclose(counts, want, rtol=1e-12)


def test_topk_with_masks_is_the_ranking_without_what_is_masked():
    rng = np.random.default_rng(0)
    names = [f"{n:03d}" for n in range(60)]
    data = shop([(f"u{rng.integers(9)}", names[int(n)], "purchase", float(day)) for day, n in enumerate(rng.integers(0, 60, 200))], names)
    model = Popularity()
    model.fit(data, FitContext())
    queries = QueryBatch(Histories.of([([], [], [])] * 3), np.zeros(3, np.int64))
    exclude = (np.array([0, 0, 30, 90]), np.concatenate([np.arange(30), np.arange(60)]).astype(np.int32))
    allowed = rng.random(60) < 0.8
    found, scores = model.topk(queries, 60, Mask(allowed, exclude))
    order = sorted(range(60), key=lambda item: (-model.scores[item], model.tie[item]))
    assert found[0][found[0] >= 0].tolist() == [item for item in order if allowed[item]]
    assert found[1][found[1] >= 0].tolist() == [item for item in order if allowed[item] and item >= 30]
    assert (found[2] == -1).all()
    assert (scores[2] == -np.inf).all()


def test_no_window_of_zero_days():
    with pytest.raises(ConfigError, match="window_days"):
        PopularityConfig.parse({"window_days": 0}, "here")


# -- frequency


def ask(history: list[tuple[int, int, float]], config: FrequencyConfig | None = None, now: float = 100) -> list[tuple[int, float]]:
    """The ranked (item, score) of a history of (item, event, day)."""
    model = Frequency(config)
    model.fit(shop(ROWS), FitContext())
    items, events, days = zip(*history, strict=True)
    queries = QueryBatch(Histories.of([(items, events, [int(day * DAY) for day in days])]), np.array([int(now * DAY)]))
    found, scores = model.topk(queries, 4)
    return [(int(item), float(score)) for item, score in zip(found[0], scores[0], strict=True) if item >= 0]


def test_baskets_count_not_lines():
    ranked = ask([(0, PURCHASE, 1), (0, PURCHASE, 1), (0, PURCHASE, 1), (1, PURCHASE, 1), (1, PURCHASE, 2)])
    assert [item for item, _ in ranked] == [1, 0]
    assert ranked[0][1] == pytest.approx(2, abs=0.1)
    assert ranked[1][1] == pytest.approx(1, abs=0.1)


def test_equal_counts_go_to_what_is_popular_lately():
    assert [item for item, _ in ask([(3, PURCHASE, 1), (0, PURCHASE, 1), (1, PURCHASE, 2), (2, PURCHASE, 3)])] == [2, 1, 0, 3]


def test_the_strongest_signal_of_a_moment_counts():
    ranked = dict(ask([(0, VIEW, 1), (0, PURCHASE, 1), (1, VIEW, 1), (1, VIEW, 2)]))
    assert ranked[0] == pytest.approx(1, abs=0.02)
    assert ranked[1] == pytest.approx(0.2, abs=0.02)


def test_half_life():
    ranked = dict(ask([(0, PURCHASE, 80), (0, PURCHASE, 90), (1, PURCHASE, 100)], FrequencyConfig(half_life_days=10)))
    assert ranked[0] == pytest.approx(0.75, abs=0.01)
    assert ranked[1] == pytest.approx(1.0, abs=0.01)
