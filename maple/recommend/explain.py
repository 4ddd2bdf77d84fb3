"""Why an item is in a slate: the source that proposed it highest, and the history item that speaks most for it.

Runs on final slates only. The stage writes four columns, ``reason.kind``, ``reason.item`` and ``reason.event`` / ``reason.count``
(the user's strongest event with that item, and on how many occasions); ``reason`` turns them into a sentence where an answer
leaves, so that nothing but arrays travels through the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from maple.data.dataset import Bool, Int8, Int32, Int64
from maple.recommend.engine import Candidates, Query, Slates, batch
from maple.recommend.sources import Proposer
from maple.schema import EVENT_CODES, EVENT_TYPES


class Kind(IntEnum):
    """What a reason says."""

    NONE = -1
    POPULAR = 0  # many people buy it
    AGAIN = 1  # this user knows it already
    BECAUSE = 2  # of one item in the history
    TASTE = 3  # the history as a whole
    NEW = 4  # nobody could know it yet


@dataclass(frozen=True)
class Reason:
    """Why one item was recommended. ``kind`` is popular, again, because, taste or new; ``item_id`` the history item it is because of."""

    kind: str
    source: str | None
    item_id: str | None
    text: str


#: The words for an event of the user with an item, the strongest event first.
VERBS: Mapping[str, str] = {
    "purchase": "bought {}",
    "rating": "rated {}",
    "like": "liked {}",
    "add_to_cart": "put {} in your basket",
    "click": "looked at {}",
    "view": "looked at {}",
}


@dataclass(frozen=True, eq=False)
class Explain:
    """The stage that finds reasons. ``models``, ``popular`` and ``new`` are by source code: who explains, whose reason is popularity, and
    whose that the item is new."""

    models: Mapping[int, Proposer]
    popular: frozenset[int]
    new: int | None = None
    name: str = "explain"
    adds: bool = False
    essential: bool = False

    def __call__(self, queries: Sequence[Query], candidates: Candidates) -> Candidates:
        source = candidates.columns.get("source", np.full(len(candidates), -1, np.int32))
        rows = candidates.rows()
        kind = np.full(len(candidates), Kind.NONE, np.int8)
        because = np.full(len(candidates), -1, np.int32)
        kind[np.isin(source, list(self.popular))] = Kind.POPULAR
        everyone = batch(queries)
        for code, model in self.models.items():
            at = np.flatnonzero(source == code)
            if not len(at):
                continue
            asked, counts = np.unique(rows[at], return_counts=True)
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            because[at] = model.explain(everyone.take(asked), candidates.items[at], offsets)
            kind[at] = np.where(because[at] >= 0, np.int8(Kind.BECAUSE), np.int8(Kind.TASTE))
        if self.new is not None:
            kind[source == self.new] = Kind.NEW
        again = self._known(queries, rows, candidates.items)
        kind[again] = Kind.AGAIN
        because[again] = candidates.items[again]
        event, count = self._events(queries, rows, because)
        return candidates.with_columns({"reason.kind": kind, "reason.item": because, "reason.event": event, "reason.count": count})

    @staticmethod
    def _known(queries: Sequence[Query], rows: Int64, items: Int32) -> Bool:
        """Whether the user's history holds the item itself."""
        out = np.zeros(len(items), dtype=bool)
        for row, query in enumerate(queries):
            mine = rows == row
            out[mine] = np.isin(items[mine], query.items)
        return out

    @staticmethod
    def _events(queries: Sequence[Query], rows: Int64, because: Int32) -> tuple[Int8, Int32]:
        """The strongest event of the user with the history item, int8[N] (-1 = none), and its distinct times, int32[N]."""
        strength = np.full(len(EVENT_TYPES), len(VERBS), np.int64)
        for place, name in enumerate(VERBS):
            strength[EVENT_CODES[name]] = place
        event, count = np.full(len(because), -1, np.int8), np.zeros(len(because), np.int32)
        for at in np.flatnonzero(because >= 0).tolist():
            query = queries[int(rows[at])]
            mine = query.items == because[at]
            events = query.events[mine]
            if len(events):
                event[at] = events[np.argmin(strength[events])]
                count[at] = len(np.unique(query.times[mine][events == event[at]]))
        return event, count


def reason(
    slates: Slates, at: int, names: Mapping[int, tuple[str, str | None]], days: float, categories: Mapping[int, str] | None = None
) -> Reason:
    """The reason of the item at a flat position. ``names``: (id, title) by item code; ``days``: the popularity window;
    ``categories``: those of new items, by item code."""
    code = int(slates.sources[at])
    source = slates.source_names[code] if 0 <= code < len(slates.source_names) else None
    if "reason.kind" not in slates.columns:
        return Reason("taste", source, None, "chosen for your taste")
    kind, item, event, count = (int(slates.columns[f"reason.{part}"][at]) for part in ("kind", "item", "event", "count"))
    if kind == Kind.POPULAR:
        return Reason("popular", source, None, f"popular in the last {days:g} days")
    if kind == Kind.NEW:
        category = (categories or {}).get(int(slates.items[at]))
        return Reason("new", source, None, f"new in {category}" if category else "new")
    verb = VERBS.get(EVENT_TYPES[event] if event >= 0 else "", "know {}")
    if kind == Kind.AGAIN:
        often = "you buy this often" if count > 1 else "you have bought this before"
        text = often if event == EVENT_CODES["purchase"] else f"you {verb.format('this')} before"
        return Reason("again", source, names[item][0], text)
    if kind == Kind.BECAUSE and item >= 0:
        item_id, title = names[item]
        return Reason("because", source, item_id, f"because you {verb.format(title or item_id)}")
    return Reason("taste", source, None, "chosen for your taste")
