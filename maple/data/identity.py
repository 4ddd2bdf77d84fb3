"""Which devices are one person: connected components over edges device -> user, with limits that keep strangers apart.

A person's canonical id is the smallest of the real user ids of the component (in byte order; `user_id` is what the user side of an edge
names). Two guards: a device seen with more than ``max_users`` users is a kiosk or a family tablet, and merges nobody; what is still
connected to more than ``max_users`` users or ``max_component`` ids is left as it came. Both are reported. A stitching depends on the set
of edges alone, so taking an edge back and stitching again undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from maple.artifacts import Place
from maple.data.dataset import Vocab
from maple.data.sources import TableSource
from maple.data.tables import RuleBook, Tables
from maple.data.validate import Validated, quarantined_rows, rule_counts
from maple.schema import IDENTITIES

MAX_COMPONENT = 50
MAX_USERS = 3
SOURCE_USER = "source_user_id"  # the id of an event as it came

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Stitching:
    """The ids whose canonical id is another, and the devices and ids that the guards left as they came."""

    ids: pa.Array  # sorted
    canonical: pa.Array  # aligned
    shared: pa.Array  # devices of too many users, sorted
    unmerged: pa.Array  # ids of components that are too large, sorted

    @staticmethod
    def of(edges: pa.Table, *, max_component: int = MAX_COMPONENT, max_users: int = MAX_USERS) -> Stitching:
        """The stitching of a table with the columns ``device_id`` and ``user_id``; repeated edges and their order do not matter."""
        device, user = (edges[name].cast(pa.string()).combine_chunks() for name in ("device_id", "user_id"))
        vocab = Vocab.of(pa.chunked_array([device, user], pa.string()))
        size = len(vocab)
        if size == 0:
            none = pa.array([], pa.string())
            return Stitching(none, none, none, none)
        pairs = np.unique(vocab.encode(device).astype(np.int64) * size + vocab.encode(user))
        ends = (pairs // size).astype(np.int32), (pairs % size).astype(np.int32)
        is_user = np.zeros(size, np.bool_)
        is_user[ends[1]] = True
        shared = np.bincount(ends[0], minlength=size) > max_users
        keep = ~shared[ends[0]]
        labels = _components(ends[0][keep], ends[1][keep], size)
        too_large = (np.bincount(labels) > max_component) | (np.bincount(labels, weights=is_user) > max_users)
        first = np.full(int(labels.max()) + 1, size, np.int64)  # codes are in byte order of the ids
        np.minimum.at(first, labels[is_user], np.flatnonzero(is_user))
        codes = np.arange(size)
        target = np.where(too_large[labels] | (first[labels] == size), codes, first[labels])
        changed = np.flatnonzero(target != codes)

        def named(places: npt.NDArray[Any]) -> pa.Array:
            return vocab.ids.take(pa.array(places))

        return Stitching(named(changed), named(target[changed]), named(np.flatnonzero(shared)), named(np.flatnonzero(too_large[labels])))

    @cached_property
    def _targets(self) -> dict[str, str]:
        return dict(zip(self.ids.to_pylist(), self.canonical.to_pylist(), strict=True))

    def apply(self, column: pa.Array | pa.ChunkedArray) -> pa.Array:
        """The canonical id of each id; ids that no edge names stay as they are. Null stays null."""
        coded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
        place = pc.index_in(coded.dictionary, value_set=self.ids)
        return pc.coalesce(self.canonical.take(place), coded.dictionary).take(coded.indices)

    def members(self, canonical: pa.Array) -> pa.Array:
        """Every id that stands for one of these canonical ids, themselves included, sorted."""
        found = self.ids.filter(pc.is_in(self.canonical, value_set=canonical))
        return Vocab.of(pa.chunked_array([canonical.cast(pa.string()), found], pa.string())).ids

    def changes(self, other: Stitching) -> pa.Array:
        """The ids whose canonical id differs between the two, sorted: whose events move in a re-stitching."""
        everyone = Vocab.of(pa.chunked_array([self.ids, other.ids], pa.string())).ids
        return everyone.filter(pc.not_equal(self.apply(everyone), other.apply(everyone)))

    def lines(self) -> list[str]:
        """What was done and what was left, for a person."""
        people = pc.count_distinct(self.canonical).as_py()
        out = [f"{len(self.ids):,} ids belong to {people:,} users of other names"]
        for what, ids in (("device(s) of too many users merge nobody", self.shared), ("id(s) hang together too widely", self.unmerged)):
            if len(ids):
                out.append(f"{len(ids):,} {what}, for example {ids[0].as_py()!r}")
        return out


def read_identities(table: TableSource, root: Place) -> Validated:
    """The edges of a source's ``identities`` table, judged: both ids legal, repeated edges welcome."""
    tables = Tables.open((table,), IDENTITIES, root)
    book = RuleBook.of(tables, ids=("device_id", "user_id"), events=False, unique=False)
    rows = pa.concat_tables([tables.schema.empty_table(), *tables.batches()])
    found = book.judge(0, rows)
    return Validated(
        found.table.filter(pa.array(found.reason < 0)).select(IDENTITIES.names),
        quarantined_rows(found.table, found.reason, book.names),
        rule_counts(found.fired, book.names),
    )


def _components(one: Int32, other: Int32, size: int) -> Int32:
    graph = sp.coo_matrix((np.ones(len(one), np.int8), (one, other)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)
