"""Rules about whole users against slow references and planted bots, whatever the order of the rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from maple.data.behaviour import AnyUserRule, UserRule, judge_users, names_of
from maple.errors import ConfigError
from maple.hashing import rng
from maple.schema import TIMESTAMP

SECOND = 1_000_000


def rules(*plain: dict[str, Any]) -> list[AnyUserRule]:
    return TypeAdapter(list[UserRule]).validate_python(list(plain))


def events(rows: list[tuple[str, str, int]]) -> pa.Table:
    """(user, item, second) in the order of one file."""
    users, items, seconds = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "timestamp": pa.array([second * SECOND for second in seconds], pa.int64()).cast(TIMESTAMP),
            "_file": pa.array(["f"] * len(rows), pa.string()),
            "_row": pa.array(range(len(rows)), pa.int64()),
        }
    )


def entropy(values: list[Any]) -> float:
    return -sum(count / len(values) * math.log2(count / len(values)) for count in Counter(values).values()) / math.log2(max(len(values), 2))


def guilty(rule: AnyUserRule, rows: list[tuple[str, str, int]], user: str) -> bool:
    own = [(item, second) for who, item, second in rows if who == user]
    moments = sorted({second for _, second in own})
    if rule.kind == "rate":
        times = moments if rule.moments else sorted(second for _, second in own)
        return any(sum(start <= time <= start + rule.minutes * 60 for time in times) > rule.events for start in times)
    assert rule.kind == "entropy"
    gaps = [round(4 * math.log2((after - before) * SECOND)) for before, after in itertools.pairwise(moments)]
    values: list[Any] = [item for item, _ in own] if rule.of == "items" else gaps
    return len(values) >= rule.at_least and not rule.min - 1e-9 <= entropy(values) <= rule.max + 1e-9


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from("abc"), st.integers(0, 600)), max_size=25),
    rule=st.sampled_from(
        rules(
            {"kind": "rate", "events": 2, "minutes": 1},
            {"kind": "rate", "events": 3, "minutes": 2, "moments": False},
            {"kind": "entropy", "of": "items", "min": 0.4, "at_least": 3},
            {"kind": "entropy", "of": "gaps", "max": 0.7, "at_least": 3},
        )
    ),
    seed=st.integers(0, 100),
)
def test_against_a_slow_reference(rows: list[tuple[str, str, int]], rule: AnyUserRule, seed: int) -> None:
    table = events(rows)
    found = judge_users(table.take(rng(seed, "order").permutation(len(rows))), [rule])
    bad = {user for user in "uvw" if guilty(rule, rows, user)}
    assert set(found.quarantined["user_id"].to_pylist()) == bad & {user for user, _, _ in rows}
    assert not bad & set(found.clean["user_id"].to_pylist())
    assert found.clean.num_rows + found.quarantined.num_rows == len(rows)
    assert found.counts == {names_of([rule])[0]: sum(user in bad for user, _, _ in rows)}
    assert set(found.quarantined["reason"].to_pylist()) <= set(names_of([rule]))


def test_planted_bots_are_found_and_people_are_not() -> None:
    draw = rng(5, "people")
    rows: list[tuple[str, str, int]] = []
    for person in range(30):
        moments = np.cumsum(np.exp(draw.normal(7, 2.5, 80)).astype(int) + 1)
        rows += [(f"person{person}", f"i{item}", int(time)) for item, time in zip(draw.integers(0, 200, 80), moments, strict=True)]
        rows += [(f"person{person}", f"line{line}", int(moments[3])) for line in range(150)]  # a big basket is one moment
    rows += [("clockwork", f"i{number % 7}", number * 300) for number in range(100)]
    rows += [("crawler", f"i{number}", number) for number in range(100)]
    found = judge_users(
        events(rows),
        rules({"kind": "rate", "events": 60, "minutes": 1}, {"kind": "entropy", "of": "gaps", "min": 0.2, "action": "note"}),
    )
    assert set(found.quarantined["user_id"].to_pylist()) == {"crawler"}
    assert found.counts == {"rate": 100, "entropy:gaps": 200}  # the crawler's second step is regular too


def test_rows_out_of_order_are_noted_per_user_and_file() -> None:
    rows = [("u", "a", 5), ("v", "a", 1), ("u", "b", 3), ("u", "c", 4), ("v", "b", 2), ("u", "d", 5)]
    found = judge_users(events(rows), rules({"kind": "out_of_order"}))
    assert found.counts == {"out_of_order": 2}
    aside = judge_users(events(rows).take([5, 4, 3, 2, 1, 0]), rules({"kind": "out_of_order", "action": "quarantine"}))
    assert sorted(aside.quarantined["item_id"].to_pylist()) == ["b", "c"]
    assert aside.quarantined["user_id"].to_pylist() == ["u", "u"]


def test_no_rules_and_twice_the_same() -> None:
    table = events([("u", "a", 1)])
    found = judge_users(table, [])
    assert (found.clean.num_rows, found.quarantined.num_rows, found.counts) == (1, 0, {})
    assert judge_users(table.slice(0, 0), rules({"kind": "rate", "events": 1})).counts == {"rate": 0}
    with pytest.raises(ConfigError, match="used twice"):
        names_of(rules({"kind": "rate", "events": 1}, {"kind": "rate", "events": 2}))
