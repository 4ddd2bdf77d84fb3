"""Ranker rows: point-in-time examples whose candidates and negatives come from the sources, without a stacking leak.

The sources that propose a row were fitted strictly before its cut; its features and source scores are those at the cut; its
label says whether the user has a target event with the item after the cut. So the ranker learns from what it will see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Dataset, Float32, Int32, Int64, ragged_take
from maple.evaluate.harness import Relevant, relevant_of
from maple.features.attributes import plain_rows
from maple.models.base import Array
from maple.recommend.engine import Candidates, Query

MICROSECONDS_PER_DAY = 86_400_000_000


class RowSettings(Section):
    """How many rows the ranker learns from."""

    negatives: Annotated[int, Field(ge=1)] = 600  # per query, drawn uniformly from the sources' candidates if there are more
    max_queries: Annotated[int, Field(ge=1)] = 6000  # users drawn if there are more
    horizon_days: Annotated[float, Field(gt=0)] | None = None  # how far after the cut labels look; all of the window if not given


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows: columns [N], labels float32[N, 1] in {0, 1}, the query of each row int64[N], sorted; queries that have a positive."""

    columns: Mapping[str, Array]
    labels: Float32
    groups: Int64

    def __len__(self) -> int:
        return len(self.groups)

    def describe(self) -> str:
        return f"{len(self):,} rows of {len(np.unique(self.groups)):,} users, {int(self.labels.sum()):,} positive"


def queries_at(
    data: Dataset, users: Int32, now: int, *, history_limit: int, k: int = 10, contexts: Sequence[Mapping[str, str]] | None = None
) -> list[Query]:
    """The users of a dataset as requests at ``now``: their last events strictly before it, and their attributes. Only the log before
    ``now`` is read. ``contexts``: what the requests say of their circumstances, see ``contexts_of``."""
    histories = data.histories(users, np.full(len(users), now, dtype=np.int64), history_limit)
    names = data.users.decode(users)
    attributes = [held for _, held in plain_rows(data.user_table.take(pa.array(users)))]
    return [
        Query(
            user=names[row],
            items=histories.items[start:stop], events=histories.events[start:stop], times=histories.times[start:stop],
            now=now, k=k, attributes=attributes[row], context=contexts[row] if contexts is not None else {},
        )
        for row, (start, stop) in enumerate(zip(histories.offsets[:-1], histories.offsets[1:], strict=True))
    ]  # fmt: skip


def contexts_of(data: Dataset, users: Int32, start: int, end: int) -> list[dict[str, str]]:
    """What each user's first target event in [start, end) says of its circumstances (device, location, ...), which is what the request
    that led to it would have said. Empty for a user without one."""
    out: list[dict[str, str]] = [{} for _ in users]
    log = data.log
    rows = np.flatnonzero((log.time >= start) & (log.time < end) & np.isin(log.event, data.targets)) if data.contexts else np.empty(0, int)
    owners, first = np.unique(log.user[rows], return_index=True)
    place = np.searchsorted(owners, users)
    has = np.flatnonzero(np.append(owners, -1)[place] == users)
    for name, vocab in data.contexts.items():
        codes = log.context[name][rows[first[place[has]]]]
        known = codes >= 0
        for row, value in zip(has[known].tolist(), vocab.decode(codes[known]), strict=True):
            out[row][name] = value
    return out


def targets_after(
    data: Dataset, cut: int, end: int, *, new_only: bool, settings: RowSettings, rng: np.random.Generator, gap: int = 0
) -> Relevant:
    """What users want in [cut + gap, end) (or its first ``horizon_days``), of at most ``max_queries`` users drawn at random."""
    if settings.horizon_days is not None:
        end = min(end, cut + gap + int(settings.horizon_days * MICROSECONDS_PER_DAY))
    relevant = relevant_of(data, cut + gap, end, new_only=new_only, known_before=cut)
    if len(relevant.users) > settings.max_queries:
        relevant = relevant.take(np.sort(rng.choice(len(relevant.users), settings.max_queries, replace=False)))
    return relevant


def labels_of(candidates: Candidates, offsets: Int64, items: Int32) -> Float32:
    """1 where a candidate is among its query's relevant items, float32[N]."""
    wanted = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets)) << 32 | items.astype(np.int64)
    return np.isin(candidates.rows() << 32 | candidates.items.astype(np.int64), wanted).astype(np.float32)


def draw(candidates: Candidates, labels: Float32, negatives: int, rng: np.random.Generator) -> Int64:
    """Flat indices of the rows to learn from: every positive, and per query at most ``negatives`` others, drawn uniformly.

    Uniformly, because the ranker will score all candidates: rows that favour the hardest negatives teach it a world in which the
    sources are worse than they are. Queries without a positive among their candidates teach nothing about order and are left out.
    """
    rows = candidates.rows()
    has_positive = np.bincount(rows, weights=labels, minlength=len(candidates.offsets) - 1) > 0
    positive = labels > 0
    chance = np.where(positive, -1.0, rng.random(len(rows)))
    order = np.lexsort((chance, rows))
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = candidates.places()
    positives = np.bincount(rows, weights=labels, minlength=len(candidates.offsets) - 1).astype(np.int64)
    return np.flatnonzero((place - positives[rows] < negatives) & has_positive[rows])


def gather(parts: Sequence[Rows]) -> Rows:
    """Rows of several batches of queries as one."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    shift = np.concatenate([[0], np.cumsum([part.groups.max(initial=-1) + 1 for part in parts])])
    groups = np.concatenate([part.groups + offset for part, offset in zip(parts, shift, strict=False)])
    return Rows(columns, np.concatenate([part.labels for part in parts]), groups)


def rows_of(candidates: Candidates, relevant_offsets: Int64, relevant_items: Int32, negatives: int, rng: np.random.Generator) -> Rows:
    """The rows of one batch of hydrated candidates and what their users wanted."""
    labels = labels_of(candidates, relevant_offsets, relevant_items)
    index = draw(candidates, labels, negatives, rng)
    columns = {name: column[index] for name, column in candidates.columns.items()}
    return Rows(columns, labels[index, None], candidates.rows()[index])


def batches_of(relevant: Relevant, size: int) -> list[tuple[Int32, Int64, Int32]]:
    """The relevant sets in batches of users: (users int32[b], offsets int64[b+1], items)."""
    out = []
    for start in range(0, len(relevant.users), size):
        chosen = np.arange(start, min(start + size, len(relevant.users)))
        index, offsets = ragged_take(relevant.offsets, chosen)
        out.append((relevant.users[chosen], offsets, relevant.items[index]))
    return out
