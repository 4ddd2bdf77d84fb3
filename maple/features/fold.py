"""The one compiled step that folds an event into a state, and the three loops around it.

A state is float64[W]; every slot has an op and perhaps a half-life, and the whole row has one ``last`` time. ``step`` folds
one event. ``scan`` runs it over a sorted log and hands out the state that each request saw (offline, point in time);
``fold`` runs it over rows of a state matrix (the online store); ``trace`` keeps the state after every row (item timelines).
Arrays only, so numba compiles each once and keeps the machine code on disk.

Legend: N events, R requests, K keys, W slots. Times are int64 microseconds, half-lives float64 microseconds (0 = no decay).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from maple.data.dataset import Int8, Int64

Float64: TypeAlias = npt.NDArray[np.float64]

#: The ``last`` of a state that has seen no event.
NEVER: int = int(np.iinfo(np.int64).min)
DAY: int = 86_400_000_000


class Op(IntEnum):
    """What a slot does with a contribution x; NaN always leaves the slot as it is (decay goes on)."""

    SUM = 0  # s * 2^(-dt / half_life) + x
    LAST = 1  # x
    FIRST = 2  # x, if there was none
    MAX = 3
    MIN = 4
    DISTINCT = 5  # like SUM of 1, but only where x differs from the value in the next slot, which keeps the LAST of the same x
    TOP = 6  # max(s * 2^(-dt / half_life), x): the largest of sums that decay alike
    # of times, beside a next slot that keeps the LAST of the same x; a pause longer than ``gap`` begins a session
    SESSIONS = 7  # s + 1 where x begins a session
    START = 8  # x where it begins a session
    INSIDE = 9  # s + the time since the last x, in days, where x does not


@dataclass(frozen=True)
class Slot:
    """One number of a state: its op, and in days its half-life (0 = none; only SUM, DISTINCT and TOP decay) or the gap between sessions."""

    op: Op
    half_life: float = 0.0
    gap: float = 0.0


#: What is 0, not NaN, before the first event.
COUNTS: tuple[Op, ...] = (Op.SUM, Op.DISTINCT, Op.TOP, Op.SESSIONS, Op.INSIDE)
_BEFORE: Float64 = np.array([0.0 if op in COUNTS else np.nan for op in Op])
SESSION_OPS: tuple[Op, ...] = (Op.SESSIONS, Op.START, Op.INSIDE)


def layout(slots: Sequence[Slot]) -> tuple[Int8, Float64]:
    """Ops int8[W] and half-lives float64[W] in microseconds, as the loops take them; of a session op the gap in place of the half-life."""
    spans = [slot.gap if slot.op in SESSION_OPS else slot.half_life for slot in slots]
    return np.array([slot.op for slot in slots], np.int8), np.array(spans, np.float64) * DAY


def initial(ops: Int8, rows: int) -> tuple[Float64, Int64]:
    """States of keys that have seen nothing: sums 0, the rest NaN, ``last`` NEVER."""
    empty = _BEFORE[ops]
    return np.tile(empty, (rows, 1)), np.full(rows, NEVER, np.int64)


def decay(dt: npt.NDArray[np.int64], half_life: float) -> Float64:
    """2^(-dt / half_life) with both in microseconds; 1 without a half-life, and never above 1."""
    return np.exp2(-np.maximum(dt, 0) / half_life) if half_life > 0 else np.ones(len(dt))


@numba.njit(cache=True, nogil=True)
def _twins(ops, half_lives):  # type: ignore[no-untyped-def]  # numba types it
    """For each slot the first that decays with the same half-life, itself if it is the first, int64[W]."""
    out = np.arange(len(ops))
    for j in range(len(ops)):
        for i in range(j):
            if half_lives[i] == half_lives[j] and (ops[i] == 0 or ops[i] == 5 or ops[i] == 6):
                out[j] = i
                break
    return out


@numba.njit(cache=True, nogil=True)
def step(state, last, x, t, ops, half_lives, twins, factors):  # type: ignore[no-untyped-def]
    """Fold one event into ``state`` (float64[W], in place) and return its new ``last``; ``factors`` float64[W] is room to work in."""
    passed = last != NEVER and t > last
    for j in range(len(ops)):
        op, h, value = ops[j], half_lives[j], x[j]
        if op == 0 or op == 5 or op == 6:
            if passed and h > 0.0:
                if twins[j] == j:  # a power is dear: one per half-life
                    factors[j] = 2.0 ** (-(t - last) / h)
                state[j] *= factors[twins[j]]
            if not np.isnan(value):
                if op == 0:
                    state[j] += value
                elif op == 6:
                    state[j] = max(state[j], value)
                elif value != state[j + 1]:  # NaN differs from everything: the first counts
                    state[j] += 1.0
        elif not np.isnan(value):
            held = state[j]
            if op >= 7:
                pause = value - state[j + 1]  # NaN before the first
                begins = not pause <= h
                if op == 7 and begins:
                    state[j] += 1.0
                elif op == 8 and begins:
                    state[j] = value
                elif op == 9 and not begins:
                    state[j] += pause / DAY
            elif op == 1 or np.isnan(held) or (op == 3 and value > held) or (op == 4 and value < held):
                state[j] = value
    return t if last == NEVER or t > last else last


@numba.njit(cache=True, nogil=True)
def _scan(group, time, x, request_group, request_time, ops, half_lives, empty, out, out_last):  # type: ignore[no-untyped-def]
    twins, factors = _twins(ops, half_lives), np.empty(len(ops))
    n, total = 0, len(group)
    state = empty.copy()
    last, current = NEVER, np.int64(NEVER)
    for r in range(len(request_group)):
        g, t = request_group[r], request_time[r]
        if g != current:
            while n < total and group[n] < g:
                n += 1
            state[:] = empty
            last, current = NEVER, g
        while n < total and group[n] == g and time[n] < t:
            last = step(state, last, x[n], time[n], ops, half_lives, twins, factors)
            n += 1
        out[r] = state
        out_last[r] = last


def scan(
    group: Int64, time: Int64, x: Float64, request_group: Int64, request_time: Int64, ops: Int8, half_lives: Float64
) -> tuple[Float64, Int64]:
    """The state of each request's group after exactly the events with an earlier time: (float64[R, W], last int64[R]).

    Events are sorted by (group, time, event order), requests by (group, time). An event at the request's own time is not seen.
    States are as of their ``last``; readers decay them to now.
    """
    empty, _ = initial(ops, 1)
    out, out_last = np.empty((len(request_group), len(ops))), np.empty(len(request_group), np.int64)
    _scan(group, time, x, request_group, request_time, ops, half_lives, empty[0], out, out_last)
    return out, out_last


@numba.njit(cache=True, nogil=True)
def _fold(rows, time, x, ops, half_lives, state, last, watched, out):  # type: ignore[no-untyped-def]
    twins, factors = _twins(ops, half_lives), np.empty(len(ops))
    for n in range(len(rows)):
        k = rows[n]
        last[k] = step(state[k], last[k], x[n], time[n], ops, half_lives, twins, factors)
        for j in range(len(watched)):
            out[n, j] = state[k, watched[j]]


def fold(
    rows: Int64, time: Int64, x: Float64, ops: Int8, half_lives: Float64, state: Float64, last: Int64, watched: Sequence[int] = ()
) -> Float64:
    """Fold events, oldest first per row, into rows of ``state`` float64[K, W] and ``last`` int64[K], in place.

    Returns the ``watched`` slots of an event's row as they were right after it, float64[N, len(watched)].
    """
    out = np.empty((len(rows), len(watched)))
    _fold(rows, time, x, ops, half_lives, state, last, np.array(watched, np.int64), out)
    return out


@numba.njit(cache=True, nogil=True)
def _trace(group, time, x, ops, half_lives, empty, out):  # type: ignore[no-untyped-def]
    twins, factors = _twins(ops, half_lives), np.empty(len(ops))
    state = empty.copy()
    last = NEVER
    for n in range(len(group)):
        if n == 0 or group[n] != group[n - 1]:
            state[:] = empty
            last = NEVER
        last = step(state, last, x[n], time[n], ops, half_lives, twins, factors)
        out[n] = state


def trace(group: Int64, time: Int64, x: Float64, ops: Int8, half_lives: Float64) -> Float64:
    """The state after every event, float64[N, W]; events sorted by (group, time)."""
    empty, _ = initial(ops, 1)
    out = np.empty((len(group), len(ops)))
    _trace(group, time, x, ops, half_lives, empty[0], out)
    return out
