"""What an append needs of its parent: rows by id or by user as they were accepted, and what becomes different.

An accepted row is what a stored one was made of: made session ids are taken away again and netted quantities put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.data import etl
from maple.data.behaviour import Entropy, Rate, names_of
from maple.data.checks import DUPLICATE, NETTED
from maple.data.identity import SOURCE_USER, Stitching
from maple.data.layers import id_hashes, joined
from maple.data.plan import Moves, stitched
from maple.data.report import FILE, ROW, UNREADABLE
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig

CONFLICT = "conflict"  # the reason of a row whose event id the parent has with another content: the first to arrive counts
STORED = "(stored)"  # the file of rows that come from the parent
MADE_SESSION = r"^s-[0-9a-f]{16}$"  # see etl.sessionise

EVENT = ("user_id", "event_id")  # what names an event among those of all users

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Held:
    """What a bucket of a parent has of some users: stored events, rows set aside that may come back, and all of them as accepted.

    ``since``: from which time on the events are whole (microseconds), None for all.
    """

    clean: pa.Table
    aside: pa.Table
    accepted: pa.Table
    since: int | None


def known_files(snapshot: Snapshot) -> dict[str, str]:
    """The event files that a snapshot's layers read, each with its fingerprint."""
    out: dict[str, str] = {}
    for layer in snapshot.stack.layers:
        out |= layer.manifest.meta["files"]
    return out


def held(parent: Snapshot, buckets: Sequence[int], users: pa.Array, source: SourceConfig, since: int | None) -> Held:
    """The rows of some users in some buckets; with ``since`` at least the events from then on, and nothing that is set aside."""
    nothing = nothing_held(parent)
    clean, aside, taken = [], [], []
    for bucket in sorted({*etl.bucket_of(users, parent.num_buckets).tolist()} & {*buckets}):
        events = parent.bucket(bucket, None, since)
        if events is not None:
            events = events.filter(pc.is_in(events["user_id"], value_set=users))
            clean.append(events)
            taken.append(accepted(events, parent.stack.gross(bucket) if source.returns == "net" else None))
        late = None if since is not None else parent.stack.quarantine(bucket)
        if late is not None:
            reasons = pa.array(reconsidered(source), pa.string())
            mine = pc.and_(pc.is_in(late["user_id"], value_set=users), pc.is_in(late["reason"], value_set=reasons))
            aside.append(parent.tombstones.keep(late.filter(mine)))
    parts = [*taken, *(_as_read(table) for table in aside if table.num_rows)]
    return Held(
        joined(clean) if clean else nothing.clean, joined(aside) if aside else nothing.aside,
        joined(parts) if parts else nothing.accepted, since,
    )  # fmt: skip


def nothing_held(parent: Snapshot) -> Held:
    """As if the parent had nothing of the users."""
    clean = parent.stack.schema().empty_table()
    aside = clean.append_column("reason", pa.array([], pa.string()))
    return Held(clean, aside, accepted(clean, None), None)


def reconsidered(source: SourceConfig) -> list[str]:
    """The reasons for which a row is set aside because of its user's other rows, so that more rows may bring it back."""
    named = zip(names_of(source.behaviour), source.behaviour, strict=True)
    return [*(name for name, rule in named if isinstance(rule, Rate | Entropy)), *([NETTED] if source.returns == "net" else [])]


def accepted(stored: pa.Table, gross: pa.Table | None) -> pa.Table:
    """Stored events as they were accepted, with the bookkeeping columns of rows that come from no file. ``gross``: see ``Stack.gross``."""
    out = _as_given(stored)
    if gross is not None:
        place = pc.index_in(out["event_id"], value_set=gross["event_id"].combine_chunks())
        value = pc.if_else(pc.is_valid(place), gross["value"].combine_chunks().take(place), out["value"])
        out = out.set_column(out.column_names.index("value"), "value", value)
    rows = out.num_rows
    marks = {FILE: pa.repeat(STORED, rows), ROW: pa.array(np.arange(rows)), UNREADABLE: pa.nulls(rows, pa.string())}
    for name, column in marks.items():
        out = out.append_column(name, column)
    return out


def _as_given(table: pa.Table) -> pa.Table:
    """The rows without the session ids that were made for them."""
    session = table["session_id"]
    made = pc.fill_null(pc.match_substring_regex(session, MADE_SESSION), False)
    return table.set_column(table.column_names.index("session_id"), "session_id", pc.if_else(made, None, session))


def _as_read(aside: pa.Table) -> pa.Table:
    """Rows of the quarantine as they were accepted, with bookkeeping columns again."""
    names = {"file": FILE, "row": ROW, "unreadable": UNREADABLE}
    plain = _as_given(aside.drop_columns(["reason"]))
    return plain.rename_columns([names.get(name, name) for name in plain.column_names])


def same_rows(parent: Snapshot, events: pa.Table, buckets: Int32, source: SourceConfig, moved: pa.Table | None) -> tuple[Bool, Bool]:
    """Which events the parent has, and which of its event ids stand for another content there, bool[N] each. ``buckets``: int32[N].

    The hash index names the few rows that may be known; only those are compared, with ``moved`` ones that come to the bucket. What a row
    does not say of its session is not compared, nor whose it is where ids are stitched: the id that came is.
    """
    same = np.zeros(events.num_rows, np.bool_)
    other = same.copy()
    possible = parent.stack.may_have(buckets, id_hashes(events["event_id"]))
    if moved is not None:
        possible |= np.asarray(pc.is_in(events["event_id"], value_set=moved["event_id"].combine_chunks()))
    for bucket in np.unique(buckets[possible]).tolist():
        maybe = np.flatnonzero(possible & (buckets == bucket))
        asked = events.take(pa.array(maybe))
        there = _there(parent, bucket, asked["event_id"].combine_chunks(), source, moved)
        told = [name for name in asked.column_names if name not in source.transient]
        if SOURCE_USER in told and SOURCE_USER in there.column_names:
            told.remove("user_id")
        place = pc.index_in(asked["event_id"], value_set=there["event_id"].combine_chunks())
        found = np.asarray(pc.is_valid(place))
        if found.any():
            equal = _equal(asked.select(told), there.take(pc.fill_null(place, 0)), lenient=("session_id",))
            same[maybe], other[maybe] = found & equal, found & ~equal
    return same, other


def _there(parent: Snapshot, bucket: int, ids: pa.Array, source: SourceConfig, moved: pa.Table | None) -> pa.Table:
    """The accepted rows of a bucket with some event ids."""
    reasons = pa.array(reconsidered(source), pa.string())
    clean, aside = parent.bucket(bucket), parent.stack.quarantine(bucket)
    parts = [] if clean is None else [accepted(_of(clean, ids), parent.stack.gross(bucket))]
    if aside is not None:
        parts.append(_as_read(parent.tombstones.keep(_of(aside.filter(pc.is_in(aside["reason"], value_set=reasons)), ids))))
    if moved is not None:
        parts.append(_of(moved.filter(pa.array(etl.bucket_of(moved["user_id"], parent.num_buckets) == bucket)), ids))
    return joined(parts) if parts else nothing_held(parent).accepted


def same_aside(parent: Snapshot, late: pa.Table, bucket: int) -> Bool:
    """Which rows to be set aside (as they are stored) the parent set aside before, bool[N]: the same row of a file, with the same content.

    A row whose id is another event's is a conflict over a parent and a duplicate without: these two reasons are one here.
    """
    there = parent.stack.quarantine(bucket)
    if there is None or there.num_rows == 0:
        return np.zeros(late.num_rows, np.bool_)
    there = there.take(pa.array(np.arange(there.num_rows)[::-1]))  # the last word on a row first
    place = pc.index_in(_origins(late), value_set=_origins(there))
    known, stored = np.asarray(pc.is_valid(place)), there.take(pc.fill_null(place, 0))
    text = pc.or_kleene(pc.is_null(stored["unreadable"]), pc.equal(late["unreadable"], stored["unreadable"]))  # texts may be withdrawn
    told = [name for name in late.column_names if name not in ("reason", "unreadable")]
    return np.asarray(known & np.asarray(pc.fill_null(text, False)) & _equal(late.select(told), stored))


def _origins(late: pa.Table) -> pa.Array:
    """One text a row that is set aside: why, and where it was read."""
    reason = pc.if_else(pc.equal(late["reason"], DUPLICATE), CONFLICT, late["reason"])
    return pc.binary_join_element_wise(reason, late["row"].cast(pa.string()), late["file"], "\n").combine_chunks()


def moves(parent: Snapshot, now: Stitching, source: SourceConfig) -> Moves | None:
    """What moves from user to user in a parent when ids are stitched anew, None where nothing does."""
    before = parent.stitching() or Stitching.of(pa.table({"device_id": pa.array([], pa.string()), "user_id": pa.array([], pa.string())}))
    ids = before.changes(now)
    users = pc.unique(pa.concat_arrays([before.apply(ids), now.apply(ids)]))
    parts = []
    for bucket in sorted(set(etl.bucket_of(before.apply(ids), parent.num_buckets).tolist())) if len(ids) else ():
        rows = held(parent, [bucket], users, source, None).accepted
        if SOURCE_USER not in rows.column_names:
            rows = rows.append_column(SOURCE_USER, rows["user_id"])
        source_ids = pc.coalesce(rows[SOURCE_USER], rows["user_id"])
        rows = rows.set_column(rows.column_names.index(SOURCE_USER), SOURCE_USER, source_ids)
        parts.append(stitched(rows.filter(pc.is_in(source_ids, value_set=ids)), now))
    return Moves(ids, users, joined(parts)) if parts else None


def continued(table: pa.Table, stored: pa.Table) -> pa.Table:
    """Sessions made of part of a user's rows, with the names they have: one that starts with a stored row goes on under its name."""
    if table.num_rows == 0 or stored.num_rows == 0:
        return table
    session = table["session_id"].combine_chunks().dictionary_encode()
    code = np.asarray(pc.fill_null(session.indices, len(session.dictionary)))
    place = pc.index_in(row_keys(table), value_set=row_keys(stored))
    fresh = np.asarray(pc.is_null(place))
    order = np.lexsort((fresh, np.asarray(table["timestamp"].cast(pa.int64())), code))
    heads = order[np.flatnonzero(np.diff(code[order], prepend=-1))]
    heads = heads[~fresh[heads] & (code[heads] < len(session.dictionary))]
    names = np.array(session.dictionary.to_pylist(), object)
    names[code[heads]] = stored["session_id"].take(place.take(pa.array(heads))).to_pylist()
    at = table.column_names.index("session_id")
    return table.set_column(at, "session_id", pa.array(names, pa.string()).take(session.indices))


def changed(before: pa.Table, now: pa.Table, keys: Sequence[str] = EVENT) -> tuple[pa.Table, pa.Table]:
    """Rows of ``now`` that ``before`` lacks or has with other values, and rows of ``before`` that are no longer there as they were."""
    if before.num_rows == 0:
        return now, before
    place = pc.index_in(row_keys(now, keys), value_set=row_keys(before, keys))
    known = np.asarray(pc.is_valid(place))
    equal = known & _equal(now, before.take(pc.fill_null(place, 0)))
    kept = np.zeros(before.num_rows, np.bool_)
    kept[np.asarray(place.drop_null())[equal[known]]] = True
    return now.filter(pa.array(~equal)), before.filter(pa.array(~kept))


def row_keys(table: pa.Table, keys: Sequence[str] = EVENT) -> pa.Array:
    """One text a row, of the columns that name it."""
    return pc.binary_join_element_wise(*(table[name] for name in keys), "\n").combine_chunks()


def _of(table: pa.Table, ids: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table["event_id"], value_set=ids))


def _equal(one: pa.Table, other: pa.Table, lenient: Sequence[str] = ()) -> Bool:
    """Which rows agree; a null of ``one`` in a lenient column agrees with anything, and so does all of one that ``other`` lacks.

    Without lenient columns, one that ``other`` lacks is null there.
    """
    out = np.ones(one.num_rows, np.bool_)
    for name in one.column_names:
        if name.startswith("_"):
            continue
        if name not in other.column_names:
            out &= bool(lenient) | np.asarray(pc.is_null(one[name]))
            continue
        left, right = one[name].combine_chunks(), other[name].combine_chunks()
        if pa.types.is_nested(left.type):
            same = np.array([a == b for a, b in zip(left.to_pylist(), right.to_pylist(), strict=True)], np.bool_)
        else:
            null = pc.and_(pc.is_null(left), pc.is_null(right))
            if pa.types.is_floating(left.type) and pa.types.is_floating(right.type):
                null = pc.or_(null, pc.fill_null(pc.and_(pc.is_nan(left), pc.is_nan(right)), False))
            same = np.asarray(pc.or_(null, pc.fill_null(pc.equal(left, right), False)))
        out &= same | np.asarray(pc.is_null(left)) if name in lenient else same
    return out
