"""What is taken together: known answers, a slow reference of the counts and of what is read, merging, and the clock."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import HOUR, ITEMS, T0, Happening, offline, online

from maple.data.dataset import Dataset, Histories
from maple.errors import ArtifactError
from maple.features.fold import DAY
from maple.features.spec import TogetherSettings
from maple.features.together import LAST_EVENTS, NAMES, LastItems, Lists, Pairs, read
from maple.schema import EVENT_CODES

NAMED = ITEMS["item_id"].to_pylist()
SETTINGS = TogetherSettings(last=3, window_hours=24, partners=2, neighbours=2, tick_days=7)
START = T0 - T0 % SETTINGS.tick + SETTINGS.tick - T0  # the first whole tick after T0, as the happenings count time


def basket(user: str, at: int, *items: str) -> list[Happening]:
    return [Happening(user, item, "purchase", at) for item in items]


def asked(data: Dataset, pairs: Pairs | Lists, user: str, at: int, items: list[str]) -> dict[str, list[float]]:
    now = np.array([T0 + at])
    last = LastItems.of(data.histories(data.users.encode([user]), now, 100), len(data.items), SETTINGS.last)
    got = read(pairs, last, now, np.array([0, len(items)]), data.items.encode(items))
    return {name.rsplit(".", 1)[1]: [round(float(value), 6) for value in column] for name, column in got.items()}


def test_known_answers() -> None:
    made = [
        *basket("a", START, "apple", "cup"), *basket("b", START + 1, "apple", "cup"), *basket("c", START + HOUR, "apple", "dish"),
        *basket("d", START, "bread"), *basket("d", START + 25 * HOUR, "cup"),  # too far apart
        Happening("e", "apple", "view", START), Happening("e", "egg", "purchase", START),  # a view is no target
        Happening("u", "apple", "view", START + 8 * DAY),
    ]  # fmt: skip
    data = offline(online(made))
    seen = asked(data, Pairs.of(data, SETTINGS), "u", START + 9 * DAY, ["cup", "dish", "bread", "apple", "nothing"])
    # apple is in three pairs: two with the cup, one with the dish
    assert seen["count"][:4] == [round(math.log(3), 6), round(math.log(2), 6), 0.0, 0.0]
    assert seen["likeness"][:2] == [round(2 / math.sqrt(3 * 2), 6), round(1 / math.sqrt(3 * 1), 6)]
    assert seen["share"][:3] == [round(2 / 23, 6), round(1 / 23, 6), 0.0]
    assert seen["known"][:3] == [1.0, 1.0, 0.0]
    assert all(math.isnan(column[4]) for column in seen.values())


def test_counts_wait_for_the_end_of_the_tick() -> None:
    data = offline(online([*basket("a", START, "apple", "cup"), Happening("u", "apple", "view", START)]))
    pairs = Pairs.of(data, SETTINGS)
    assert asked(data, pairs, "u", START + 7 * DAY - 1, ["cup"])["count"] == [0.0]
    assert asked(data, pairs, "u", START + 7 * DAY, ["cup"])["count"] == [round(math.log(2), 6)]


def test_a_user_without_last_items_and_empty_data() -> None:
    data = offline(online(basket("a", START, "apple")), ["nobody"])
    pairs = Pairs.of(data, SETTINGS)
    assert len(pairs.keys) == 0
    assert all(math.isnan(value) for column in asked(data, pairs, "nobody", START, ["apple"]).values() for value in column)
    assert asked(data, pairs, "a", START + 30 * DAY, ["cup"])["known"] == [0.0]


happenings = st.builds(
    Happening,
    user=st.sampled_from(["u", "v", "w"]),
    item=st.sampled_from(NAMED),
    event=st.sampled_from(["purchase", "purchase", "view", "return"]),
    at=st.sampled_from([0, 1, HOUR, DAY, DAY + 1, 8 * DAY, 15 * DAY, 40 * DAY]),
)


def reference(data: Dataset, tick: int) -> tuple[dict[int, list[tuple[int, int]]], Counter[int]]:
    """Neighbour lists and totals at the end of a tick, pair by pair."""
    log, counts = data.log, Counter[tuple[int, int]]()
    for user in range(len(data.users)):
        rows = [n for n in range(len(log)) if log.user[n] == user and log.event[n] == EVENT_CODES["purchase"]]
        for place, n in enumerate(rows):
            for m in rows[max(0, place - SETTINGS.partners) : place]:
                if log.item[m] != log.item[n] and log.time[n] - log.time[m] <= DAY and log.time[n] // SETTINGS.tick <= tick:
                    counts[int(log.item[m]), int(log.item[n])] += 1
    both = Counter[tuple[int, int]]()
    for (a, b), count in counts.items():
        both[a, b] += count
        both[b, a] += count
    totals = Counter[int]()
    for (a, _), count in both.items():
        totals[a] += count
    lists = {
        a: sorted(sorted(((b, c) for (x, b), c in both.items() if x == a), key=lambda pair: (-pair[1], pair[0]))[: SETTINGS.neighbours])
        for a in range(len(data.items))
    }
    return lists, totals


@given(st.lists(happenings, min_size=1, max_size=40), st.integers(0, 60 * DAY))
@settings(deadline=None, max_examples=40)
def test_lists_and_features_are_those_of_the_reference(made: list[Happening], at: int) -> None:
    data = offline(online(made))
    pairs = Pairs.of(data, SETTINGS)
    now = T0 + at
    tick = int(pairs.closed(np.array([now]))[0])
    lists, totals = reference(data, tick)
    got = pairs.at(tick)
    bundled = Pairs.of(data.before((tick + 1) * SETTINGS.tick), SETTINGS).at(tick)  # made at the end of the tick
    assert all((got.tensors()[name] == array).all() for name, array in bundled.tensors().items())
    for item in range(len(data.items)):
        part = slice(got.offsets[item], got.offsets[item + 1])
        assert list(zip(got.items[part].tolist(), got.counts[part].tolist(), strict=True)) == lists[item]
        assert got.totals[item] == totals[item]
    users = np.arange(len(data.users), dtype=np.int32)
    moments = np.full(len(users), now)
    histories = data.histories(users, moments, 100)
    last = LastItems.of(histories, len(data.items), SETTINGS.last)
    offsets = np.arange(len(users) + 1) * (len(data.items) + 1)
    candidates = np.tile(np.append(np.arange(len(data.items)), -1), len(users)).astype(np.int32)
    columns = read(pairs, last, moments, offsets, candidates)
    for user in users.tolist():
        part = slice(histories.offsets[user], histories.offsets[user + 1])
        met = [int(i) for i, e in zip(histories.items[part], histories.events[part], strict=True) if e != EVENT_CODES["return"]]
        own = list(dict.fromkeys(met[::-1]))[: SETTINGS.last]
        assert last.items[last.offsets[user] : last.offsets[user + 1]].tolist() == own
        for item in range(len(data.items)):
            row = [float(columns[name][offsets[user] + item]) for name in NAMES]
            if not own:
                assert all(math.isnan(value) for value in row)
                continue
            found = [dict(lists[a]).get(item, 0) for a in own]
            likeness = max((c / math.sqrt(totals[a] * totals[item]) for a, c in zip(own, found, strict=True) if c), default=0.0)
            share = sum(c / (totals[a] + 20) for a, c in zip(own, found, strict=True)) / len(own)
            expected = [math.log1p(max(found)), likeness, share, sum(c > 0 for c in found) / len(own)]
            assert row == pytest.approx(expected, rel=1e-6)


@given(st.lists(happenings, min_size=1, max_size=40))
@settings(deadline=None, max_examples=25)
def test_pairs_of_disjoint_users_add_up(made: list[Happening]) -> None:
    data = offline(online(made))
    whole = Pairs.of(data, SETTINGS)
    parts = Pairs.merged([Pairs.of(data.where(data.log.user == user), SETTINGS) for user in reversed(range(len(data.users)))])
    for name in ("ticks", "keys", "counts"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_only_the_last_events_are_looked_at() -> None:
    items = np.arange(LAST_EVENTS + 5, dtype=np.int32) % 2
    items[0] = 3
    kinds, times = np.full(len(items), EVENT_CODES["view"], np.int8), np.arange(len(items))
    last = LastItems.of(Histories.of([(items, kinds, times)]), 5, 4)
    assert last.items.tolist() == [0, 1]
    assert last.times.tolist() == [len(items) - 1, len(items) - 2]


def test_stored_lists_are_checked() -> None:
    data = offline(online(basket("a", START, "apple", "cup")))
    lists = Pairs.of(data, SETTINGS).at(10**6)
    again = Lists.from_tensors(lists.tensors(), 5)
    assert again.items.tolist() == lists.items.tolist() == [2, 0]
    for bad in ({"items": np.array([2, 9], np.int32)}, {"offsets": np.array([0, 2])}, {"counts": np.zeros(3, np.float32)}):
        with pytest.raises(ArtifactError, match="publish the bundle again"):
            Lists.from_tensors(lists.tensors() | bad, 5)
    with pytest.raises(ArtifactError, match="lack"):
        Lists.from_tensors({}, 5)
