"""The list of users who asked to be forgotten: keyed hashes of their ids, never the ids, one empty file each.

Every snapshot of a home is read through it, so a deleted user is gone from all versions at once; compaction and ``purge`` then remove the
rows themselves. A file each makes adding one atomic on any filesystem. The key is random, made with the home's first tombstone and part
of each file's name: where two processes make the first at once there are two keys, and both count.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import Place
from maple.data.report import UNREADABLE
from maple.hashing import combine
from maple.schema import check_id

FOLDER = "tombstones"


@dataclass(frozen=True)
class Tombstones:
    """The tombstones of a home at one moment, as (key, hash) in hex."""

    marks: frozenset[tuple[str, str]] = frozenset()

    @staticmethod
    def of(home: Place) -> Tombstones:
        """All tombstones of a home."""
        names = (child.name.split("-") for child in (home / FOLDER).children())
        return Tombstones(frozenset((parts[0], parts[1]) for parts in names if len(parts) == 2))

    @staticmethod
    def add(home: Place, user_id: str) -> Tombstones:
        """Forget a user from now on; durable when this returns, and doing it again changes nothing. The tombstones as they are then."""
        check_id(user_id, "user id")
        known = Tombstones.of(home)
        if not known.covers(pa.array([user_id])).any():
            key = min((key for key, _ in known.marks), default=secrets.token_hex(16))
            (home / FOLDER / f"{key}-{_mark(key, user_id)}").write(b"")
        return Tombstones.of(home)

    def __bool__(self) -> bool:
        return bool(self.marks)

    @property
    def digest(self) -> str:
        """Identifies the list; empty where there is none."""
        return combine(["-".join(mark) for mark in sorted(self.marks)]) if self.marks else ""

    def covers(self, ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Which of the ids are those of deleted users, bool[N]; null is not."""
        column = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
        if not self.marks or len(column) == 0:
            return np.zeros(len(column), np.bool_)
        coded = column.dictionary_encode()
        gone = np.fromiter((*self._each(coded.dictionary), False), np.bool_)  # the last one is for null
        return np.asarray(gone[np.asarray(coded.indices.fill_null(len(coded.dictionary)))])

    def keep(self, table: pa.Table) -> pa.Table:
        """The rows of a table that belong to nobody on the list, by ``user_id`` and, where ids were stitched, ``source_user_id``.

        The text of a row that could not be read and has no user id may name anyone: it is blanked.
        """
        names = [name for name in ("user_id", "source_user_id") if name in table.column_names]
        if not self.marks or not names or table.num_rows == 0:
            return table
        gone = np.logical_or.reduce([self.covers(table[name]) for name in names])
        kept = table.filter(pa.array(~gone)) if gone.any() else table
        for name in ("unreadable", UNREADABLE):
            if name in kept.column_names and "user_id" in kept.column_names and kept[name].null_count < kept.num_rows:
                text = pc.if_else(pc.is_valid(kept["user_id"]), kept[name], None)
                kept = kept.set_column(kept.column_names.index(name), kept.schema.field(name), text)
        return kept

    def _each(self, ids: pa.Array) -> Iterator[bool]:
        keys = sorted({key for key, _ in self.marks})
        return (any((key, _mark(key, text)) in self.marks for key in keys) for text in ids.to_pylist())


#: Nobody is forgotten.
NONE = Tombstones()


def _mark(key: str, user_id: str) -> str:
    return hashlib.blake2b(user_id.encode(), digest_size=16, key=bytes.fromhex(key)).hexdigest()
