"""The compiled fold: known answers per op, and every loop against a slow reference in plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.features.fold import DAY, NEVER, Op, Slot, decay, fold, initial, layout, scan, trace

SLOTS = (
    Slot(Op.SUM), Slot(Op.SUM, 1.0), Slot(Op.SUM, 7.0), Slot(Op.LAST), Slot(Op.FIRST), Slot(Op.MAX), Slot(Op.MIN),
    Slot(Op.DISTINCT), Slot(Op.LAST), Slot(Op.DISTINCT, 2.0), Slot(Op.LAST), Slot(Op.TOP, 3.0), Slot(Op.SESSIONS, gap=1 / DAY),
    Slot(Op.LAST), Slot(Op.START, gap=2 / DAY), Slot(Op.LAST), Slot(Op.INSIDE, gap=1 / DAY), Slot(Op.LAST),
)  # fmt: skip


def run(slots: tuple[Slot, ...], events: list[tuple[int, list[float]]]) -> tuple[list[float], int]:
    ops, half_lives = layout(slots)
    state, last = initial(ops, 1)
    for time, x in events:
        fold(np.zeros(1, np.int64), np.array([time]), np.array([x], float), ops, half_lives, state, last)
    return state[0].tolist(), int(last[0])


def reference(events: list[tuple[int, list[float]]]) -> list[float]:
    """The same by definition, slot by slot, without folding."""
    out: list[float] = []
    last = max((time for time, _ in events), default=0)
    for j, slot in enumerate(SLOTS):
        seen = [(time, x[j]) for time, x in events if not math.isnan(x[j])]
        weight = [2 ** (-(last - time) / (slot.half_life * DAY)) if slot.half_life else 1.0 for time, _ in seen]
        values = [value for _, value in seen]
        if slot.op == Op.SUM:
            out.append(sum(w * value for w, value in zip(weight, values, strict=True)))
        elif slot.op == Op.DISTINCT:
            fresh = [place == 0 or values[place] != values[place - 1] for place in range(len(values))]
            out.append(sum(w for w, new in zip(weight, fresh, strict=True) if new))
        elif slot.op == Op.TOP:
            out.append(max([0.0, *(w * value for w, value in zip(weight, values, strict=True))]))
        elif slot.op in (Op.SESSIONS, Op.START, Op.INSIDE):
            pauses = [math.inf, *(b - a for a, b in itertools.pairwise(values))][: len(values)]
            begins = [pause > slot.gap * DAY + 1e-9 for pause in pauses]
            started = [value for value, new in zip(values, begins, strict=True) if new]
            inside = sum(pause for pause, new in zip(pauses, begins, strict=True) if not new) / DAY
            out.append({Op.SESSIONS: len(started), Op.START: started[-1] if started else math.nan, Op.INSIDE: inside}[slot.op])
        elif not values:
            out.append(math.nan)
        else:
            out.append({Op.LAST: values[-1], Op.FIRST: values[0], Op.MAX: max(values), Op.MIN: min(values)}[slot.op])
    return out


number = st.one_of(st.just(math.nan), st.integers(-3, 3).map(float))


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[int, list[float]]]:
    times = sorted(draw(st.lists(st.integers(0, 20).map(lambda n: n * DAY // 4), max_size=12)))
    out = []
    for time in times:
        x = [draw(number) for _ in SLOTS]
        for j in (7, 9, 12, 14, 16):  # the neighbour of a DISTINCT or session slot keeps the LAST of the same
            x[j + 1] = x[j]
        out.append((time, x))
    return out


def test_a_decayed_sum_halves_after_its_half_life() -> None:
    state, last = run((Slot(Op.SUM, 7.0),), [(0, [8.0]), (7 * DAY, [1.0]), (21 * DAY, [0.0])])
    assert state == [pytest.approx((8 / 2 + 1) / 4)]
    assert last == 21 * DAY


def test_nan_leaves_a_slot_but_not_its_decay() -> None:
    state, _ = run((Slot(Op.SUM, 1.0), Slot(Op.LAST)), [(0, [4.0, 5.0]), (DAY, [math.nan, math.nan])])
    assert state == [pytest.approx(2.0), 5.0]


def test_distinct_counts_baskets_that_share_a_time_once() -> None:
    state, _ = run((Slot(Op.DISTINCT), Slot(Op.LAST)), [(t, [float(t), float(t)]) for t in (1, 1, 1, 4, 4, 9)])
    assert state == [3.0, 9.0]


def test_a_session_ends_with_a_pause_longer_than_the_gap() -> None:
    minute = DAY // 1440
    slots = (Slot(Op.SESSIONS, gap=30 / 1440), Slot(Op.LAST), Slot(Op.START, gap=30 / 1440), Slot(Op.LAST))
    slots += (Slot(Op.INSIDE, gap=30 / 1440), Slot(Op.LAST))
    times = [0, 10 * minute, 40 * minute, 70 * minute + 1, 70 * minute + 1]
    state, _ = run(slots, [(t, [float(t)] * 6) for t in times])
    assert state[0] == 2
    assert state[2] == 70 * minute + 1
    assert state[4] == pytest.approx(40 / 1440)


def test_the_top_of_decaying_sums_is_kept() -> None:
    # category a is met at days 0, 1 and 2, b at day 3: each event brings its category's sum after it
    sums = [1.0, 1.5, 1.75, 1.0]
    state, _ = run((Slot(Op.TOP, 1.0),), [(day * DAY, [value]) for day, value in enumerate(sums)])
    assert state == [pytest.approx(1.0)]
    state, _ = run((Slot(Op.TOP, 2.0),), [(day * DAY, [value]) for day, value in enumerate(sums)])
    assert state == [pytest.approx(1.75 * 2**-0.5)]


def test_decay_never_grows() -> None:
    assert decay(np.array([-5, 0, DAY]), float(DAY)).tolist() == [1.0, 1.0, 0.5]
    assert decay(np.array([5]), 0.0).tolist() == [1.0]


@given(streams())
@settings(deadline=None, max_examples=150)
def test_folding_equals_the_definition(events: list[tuple[int, list[float]]]) -> None:
    state, last = run(SLOTS, events)
    np.testing.assert_allclose(state, reference(events) if events else initial(layout(SLOTS)[0], 1)[0][0], rtol=1e-12, atol=1e-12)
    assert last == (events[-1][0] if events else NEVER)


@given(st.lists(streams(), min_size=1, max_size=4), st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 21)), max_size=12))
@settings(deadline=None, max_examples=100)
def test_scan_sees_exactly_what_is_strictly_earlier(logs: list[list[tuple[int, list[float]]]], asked: list[tuple[int, int]]) -> None:
    group = np.array([g for g, log in enumerate(logs) for _ in log], np.int64)
    time = np.array([t for log in logs for t, _ in log], np.int64)
    x = np.array([x for log in logs for _, x in log], float).reshape(-1, len(SLOTS))
    asked = sorted((g, t * DAY // 4) for g, t in asked)
    ops, half_lives = layout(SLOTS)
    asked_group, asked_time = np.array(asked, np.int64).reshape(-1, 2).T.copy()
    out, out_last = scan(group, time, x, asked_group, asked_time, ops, half_lives)
    for row, (g, t) in enumerate(asked):
        before = [event for event in (logs[g] if g < len(logs) else []) if event[0] < t]
        state, last = run(SLOTS, before)
        np.testing.assert_array_equal(out[row], state)
        assert out_last[row] == last


@given(st.lists(streams(), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_fold_and_trace_end_where_single_steps_end(logs: list[list[tuple[int, list[float]]]]) -> None:
    group = np.array([g for g, log in enumerate(logs) for _ in log], np.int64)
    time = np.array([t for log in logs for t, _ in log], np.int64)
    x = np.array([x for log in logs for _, x in log], float).reshape(-1, len(SLOTS))
    ops, half_lives = layout(SLOTS)
    state, last = initial(ops, len(logs))
    order = np.argsort(time, kind="stable")  # users interleaved, as they arrive
    fold(group[order], time[order], x[order], ops, half_lives, state, last)
    traced = trace(group, time, x, ops, half_lives)
    for g, log in enumerate(logs):
        expected, end = run(SLOTS, log)
        np.testing.assert_array_equal(state[g], expected)
        assert last[g] == end
        if log:
            np.testing.assert_array_equal(traced[np.flatnonzero(group == g)[-1]], expected)
