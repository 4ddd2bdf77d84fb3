"""Ranker rows: which candidates are drawn, what their labels are, what a query may know, and how batches are cut and put together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shop import Happening, offline, online

from maple.data.dataset import Dataset
from maple.errors import DataError
from maple.evaluate.harness import Relevant
from maple.features.fold import DAY
from maple.hashing import rng
from maple.recommend.engine import Candidates
from maple.train.rows import Rows, RowSettings, batches_of, draw, gather, labels_of, queries_at, rows_of, targets_after

T0 = online([Happening("a", "cup", "view", 0)])[0].timestamp


def candidates(lists: list[list[int]]) -> Candidates:
    """One query per list, with a column that names query and item."""
    flat = [(row, item) for row, items in enumerate(lists) for item in items]
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])]).astype(np.int64)
    items = np.array([item for _, item in flat], np.int32)
    name = np.array([1000 * row + item for row, item in flat], np.float32)
    return Candidates(offsets, items, np.zeros(len(flat), np.float32), {"name": name})


def ragged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])]).astype(np.int64)
    return offsets, np.array([item for items in lists for item in items], np.int32)


QUERIES = st.lists(
    st.tuples(st.lists(st.integers(0, 12), unique=True, max_size=10), st.lists(st.integers(0, 12), unique=True, max_size=6)),
    min_size=1,
    max_size=6,
)


# -- drawing -----------------------------------------------------------------------------------------------------------


@given(QUERIES, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_draw_keeps_every_positive_and_so_many_others(queries: list[tuple[list[int], list[int]]], negatives: int, seed: int) -> None:
    made = candidates([items for items, _ in queries])
    wanted = [set(want) for _, want in queries]
    labels = np.array([float(item in want) for (items, _), want in zip(queries, wanted, strict=True) for item in items], np.float32)
    chosen = draw(made, labels, negatives, np.random.default_rng(seed))
    assert (np.diff(chosen) > 0).all()
    assert chosen.size == 0 or (chosen[0] >= 0 and chosen[-1] < len(made))
    for row, (items, _) in enumerate(queries):
        mine = [int(item) for item in made.items[chosen[made.rows()[chosen] == row]]]
        positive = [item for item in items if item in wanted[row]]
        assert [item for item in mine if item in wanted[row]] == positive
        assert len(mine) - len(positive) == (min(negatives, len(items) - len(positive)) if positive else 0)


def test_draw_is_uniform_over_the_others_of_a_query() -> None:
    made = candidates([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]])
    labels = np.isin(made.items, [3, 8]).astype(np.float32)
    random, rounds = rng(0, "uniform"), 6000
    counts = np.zeros(len(made))
    for _ in range(rounds):
        counts[draw(made, labels, 2, random)] += 1
    assert counts[3] == counts[8] == rounds
    others = counts[[0, 1, 2, 4, 5, 6]] / rounds
    # Six standard deviations of a share of 1/3 in so many rounds.
    assert np.abs(others - 2 / 6).max() < 6 * np.sqrt(1 / 3 * 2 / 3 / rounds)
    assert (counts[[7, 9]] == rounds).all(), "a query with few candidates keeps all of them"


def test_draw_of_nothing() -> None:
    assert draw(candidates([[], []]), np.empty(0, np.float32), 3, rng(0, "nothing")).tolist() == []
    assert draw(candidates([[1, 2]]), np.zeros(2, np.float32), 3, rng(0, "nothing")).tolist() == []


# -- labels ------------------------------------------------------------------------------------------------------------


@given(QUERIES)
def test_labels_are_membership_in_the_own_querys_items(queries: list[tuple[list[int], list[int]]]) -> None:
    made = candidates([items for items, _ in queries])
    offsets, wanted = ragged([want for _, want in queries])
    expected = [1.0 if item in want else 0.0 for items, want in queries for item in items]
    labels = labels_of(made, offsets, wanted)
    assert labels.dtype == np.float32
    assert labels.tolist() == expected


def test_rows_carry_the_columns_of_the_drawn_candidates() -> None:
    made = candidates([[4, 5, 6], [7], [1, 2, 3, 4]])
    offsets, wanted = ragged([[6, 9], [8], [2, 3]])
    rows = rows_of(made, offsets, wanted, 1, rng(0, "rows"))
    assert len(rows) == 2 + 3
    assert rows.groups.tolist() == [0, 0, 2, 2, 2]
    named = {(int(name) // 1000, int(name) % 1000): label for name, label in zip(rows.columns["name"], rows.labels[:, 0], strict=True)}
    assert len(named) == len(rows)
    assert {pair for pair, label in named.items() if label} == {(0, 6), (2, 2), (2, 3)}
    assert rows.describe() == "5 rows of 2 users, 3 positive"


# -- what a query knows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    happenings = [
        Happening("a", "cup", "view", 0),
        Happening("a", "dish", "purchase", DAY),
        Happening("a", "egg", "purchase", 2 * DAY),
        Happening("a", "bread", "purchase", 2 * DAY),
        Happening("a", "apple", "purchase", 5 * DAY),
        Happening("b", "cup", "purchase", 2 * DAY),
        Happening("c", "cup", "purchase", DAY // 2),
        Happening("c", "cup", "return", 3 * DAY),
        Happening("c", "dish", "purchase", 3 * DAY),
    ]
    return offline(online(happenings), users=["nobody"])


def told(data: Dataset, user: str, now: int, limit: int = 10) -> list[tuple[str, int]]:
    (query,) = queries_at(data, data.users.encode([user]), now, history_limit=limit, k=7)
    assert (query.user, query.now, query.k) == (user, now, 7)
    return list(zip(data.items.decode(query.items), (query.times - T0).tolist(), strict=True))


def test_a_query_knows_what_was_strictly_before_it(tiny: Dataset) -> None:
    assert told(tiny, "a", T0 + 2 * DAY) == [("cup", 0), ("dish", DAY)]
    assert told(tiny, "a", T0 + 2 * DAY + 1) == [("cup", 0), ("dish", DAY), ("egg", 2 * DAY), ("bread", 2 * DAY)]
    assert told(tiny, "a", T0 + 2 * DAY + 1, limit=2) == [("egg", 2 * DAY), ("bread", 2 * DAY)]
    assert told(tiny, "a", T0) == []


def test_a_user_without_events_is_cold(tiny: Dataset) -> None:
    users = tiny.users.encode(["nobody", "b", "a"])
    nobody, late, known = queries_at(tiny, users, T0 + 2 * DAY, history_limit=5)
    assert nobody.cold
    assert late.cold
    assert not known.cold
    assert [query.user for query in (nobody, late, known)] == ["nobody", "b", "a"]


def test_targets_look_so_many_days_ahead() -> None:
    bought = [("cup", 0), ("dish", 0), ("dish", DAY), ("cup", 3 * DAY), ("egg", 3 * DAY)]
    data = offline(online([Happening("a", item, "purchase", moment) for item, moment in bought]))

    def wanted(days: float | None, end: int, new_only: bool = False) -> list[str]:
        settings = RowSettings(horizon_days=days)
        found = targets_after(data, T0 + DAY, T0 + end, new_only=new_only, settings=settings, rng=rng(0, "users"))
        return data.items.decode(found.items)

    assert wanted(None, 9 * DAY) == ["cup", "dish"], "the egg was not known before the cut"
    assert wanted(1.0, 9 * DAY) == ["dish"]
    assert wanted(2.0, 9 * DAY) == ["dish"], "the end of the horizon is outside it"
    assert wanted(5.0, 2 * DAY) == ["dish"], "the window ends before the horizon"
    with pytest.raises(DataError, match="no test user is left"):
        wanted(None, 9 * DAY, new_only=True)


@given(st.integers(1, 8))
def test_users_are_drawn_where_there_are_too_many(most: int) -> None:
    events = [Happening(f"u{n}", "cup", "purchase", moment) for n in range(6) for moment in (0, DAY, 3 * DAY)]
    data = offline(online(events))

    def ask(days: float | None, seed: int) -> Relevant:
        settings = RowSettings(max_queries=most, horizon_days=days)
        return targets_after(data, T0 + DAY, T0 + 9 * DAY, new_only=False, settings=settings, rng=np.random.default_rng(seed))

    found = ask(None, 0)
    assert len(found) == min(most, 6)
    assert (np.diff(found.users) > 0).all()
    assert found.users.tolist() == ask(1.0, 0).users.tolist(), "the first day has an event of everyone too"
    if most < 4:
        assert len({tuple(ask(None, seed).users.tolist()) for seed in range(20)}) > 1


# -- batches -----------------------------------------------------------------------------------------------------------


def part(groups: list[int], start: int) -> Rows:
    count = len(groups)
    return Rows({"x": np.arange(start, start + count, dtype=np.float32)}, np.ones((count, 1), np.float32), np.array(groups, np.int64))


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8).map(sorted), min_size=1, max_size=5))
def test_gathered_rows_keep_their_groups_apart_and_in_order(groups: list[list[int]]) -> None:
    starts = np.concatenate([[0], np.cumsum([len(one) for one in groups])])
    whole = gather([part(one, int(start)) for one, start in zip(groups, starts[:-1], strict=True)])
    assert whole.columns["x"].tolist() == list(range(starts[-1]))
    assert whole.labels.shape == (starts[-1], 1)
    assert (np.diff(whole.groups) >= 0).all()
    named = [(place, group) for place, one in enumerate(groups) for group in one]
    for i, first in enumerate(named):
        for j, second in enumerate(named):
            assert (whole.groups[i] == whole.groups[j]) == (first == second)


@given(st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=12), st.integers(1, 5))
def test_batches_are_the_whole_in_order(lists: list[list[int]], size: int) -> None:
    offsets, items = ragged(lists)
    relevant = Relevant(np.arange(100, 100 + len(lists), dtype=np.int32), offsets, items)
    parts = batches_of(relevant, size)
    assert [len(users) for users, _, _ in parts] == [min(size, len(lists) - start) for start in range(0, len(lists), size)]
    again = [
        (int(user), own[bounds[row] : bounds[row + 1]].tolist()) for users, bounds, own in parts for row, user in enumerate(users)
    ]  # fmt: skip
    assert again == [(100 + row, own) for row, own in enumerate(lists)]
