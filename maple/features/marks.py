"""What an event knows of its user's earlier events: marks, one more slot per key below the user, for the views of the user.

A mark is the value of its slot right after the event, in the state of the event's item, category or brand. Online the fold of
those states shows it as it goes; offline ``marked`` runs the same step over a log. So a view of the user can count repeats or
weigh categories, and the state of one key is all that is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from maple.data.dataset import Int32, Int64
from maple.features.catalogue import EventColumns, Mark
from maple.features.fold import Float64, Op, Slot, layout, trace
from maple.features.view import Key

#: Whose state holds a mark.
MARK_KEYS: dict[Mark, Key] = {Mark.FIRST_BOUGHT: Key.USER_ITEM, Mark.IN_CATEGORY: Key.USER_CATEGORY, Mark.WITH_BRAND: Key.USER_BRAND}


def mark_slot(mark: Mark, half_life: float) -> Slot:
    """The slot of a mark; ``half_life`` in days of those that decay."""
    return Slot(Op.FIRST) if mark == Mark.FIRST_BOUGHT else Slot(Op.SUM, half_life)


def mark_contribution(mark: Mark, events: EventColumns) -> Float64:
    """What N events put into the slot of a mark, float64[N]."""
    if mark == Mark.FIRST_BOUGHT:
        return np.where(events.is_("purchase"), events.time, np.nan)
    return np.ones(len(events))


def marked(events: EventColumns, marks: Iterable[Mark], user: Int64, codes: Mapping[Key, Int32], half_life: float) -> EventColumns:
    """The events of a log with their marks; each user's are in order. ``codes``: the item, category and brand of every event, -1 = none."""
    found: dict[Mark, Float64] = {}
    for mark in marks:
        code = codes[MARK_KEYS[mark]]
        keep = np.flatnonzero(code >= 0)
        group = user[keep] * (np.int64(code.max(initial=0)) + 1) + code[keep]
        order = np.argsort(group, kind="stable")
        rows = keep[order]
        x = mark_contribution(mark, events)[rows, None]
        found[mark] = np.full(len(events), np.nan)
        found[mark][rows] = trace(group[order], events.time[rows], x, *layout([mark_slot(mark, half_life)]))[:, 0]
    return replace(events, marks=found)
