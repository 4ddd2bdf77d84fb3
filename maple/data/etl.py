"""What turns clean rows into a snapshot's tables, as pure functions: event ids, duplicates, sessions, order, buckets, item facts.

Every function gives the same answer whatever the order or the grouping of its rows, so that a snapshot does not depend on parallelism.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.dataset import Vocab
from maple.data.report import FILE, ROW
from maple.data.sources import Clock, ItemsFromEvents, LastWord
from maple.hashing import mix64, stable_hash
from maple.schema import EVENTS, ITEMS, TIMESTAMP, conform

Int64: TypeAlias = npt.NDArray[np.int64]
UInt64: TypeAlias = npt.NDArray[np.uint64]
Bool: TypeAlias = npt.NDArray[np.bool_]

NOTHING = 1e-6  # of a quantity: what rounding leaves
HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), "S2")
LANES = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))
NULL = np.uint64(0x5851F42D4C957F2D)


def bucket_of(user_ids: pa.Array | pa.ChunkedArray, num_buckets: int) -> npt.NDArray[np.int32]:
    """The bucket of each user id, int32[N]: the low bits of a keyed hash, so bucket b of n splits into b and b + n of 2n."""
    assert num_buckets > 0, "there is at least one bucket"
    assert num_buckets & (num_buckets - 1) == 0, "the number of buckets is a power of two"
    coded = _one(user_ids).dictionary_encode()
    of_id = np.fromiter((stable_hash("bucket", text) & (num_buckets - 1) for text in coded.dictionary.to_pylist()), np.int32)
    return np.asarray(of_id[np.asarray(coded.indices)])


def num_buckets_for(rows: int, rows_per_bucket: int) -> int:
    """The smallest power of two of buckets that keeps the mean at or below ``rows_per_bucket``."""
    return 1 << max(0, (max(rows, 1) - 1) // rows_per_bucket).bit_length()


def content_ids(table: pa.Table) -> pa.Array:
    """An id of 24 hex digits for each row, of its content alone: equal rows get equal ids, wherever they lie.

    Columns by name; ``_...`` ignored.
    """
    lanes = tuple(np.zeros(table.num_rows, np.uint64) for _ in LANES)
    for name in sorted(table.column_names):
        if name.startswith("_") or name == "event_id":
            continue
        salt = np.uint64(stable_hash("column", name))
        for lane, value in zip(lanes, _lanes(_one(table[name])), strict=True):
            with np.errstate(over="ignore"):
                lane += mix64(value ^ salt)  # a sum: the order of the columns does not matter, their names do
    return _hex(*(mix64(lane + step) for lane, step in zip(lanes, LANES, strict=True)))


def with_event_ids(table: pa.Table) -> pa.Table:
    """The table with an ``event_id`` in every row: the given one, else one made of the row's content."""
    given = _one(table["event_id"])
    if given.null_count == 0:
        return table
    return _set(table, "event_id", pc.coalesce(given, content_ids(table)))


def first_of_each(table: pa.Table) -> Bool:
    """Which rows are the first of their event id by (file, record number), bool[N]; the others are duplicates."""
    order, ids = _by_id(table)
    keep = np.zeros(table.num_rows, np.bool_)
    keep[order[np.flatnonzero(np.diff(ids, prepend=-1))]] = True
    return keep


def numbered(table: pa.Table) -> pa.Table:
    """Repeated event ids made distinct by their place among equals (by file and record number): ``<id>``, ``<id>-1``, ``<id>-2`` ..."""
    order, ids = _by_id(table)
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    place = np.empty(table.num_rows, np.int64)
    place[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.append(starts, len(ids))))
    again = pc.binary_join_element_wise(_one(table["event_id"]), pa.array(place).cast(pa.string()), "-")
    return _set(table, "event_id", pc.if_else(pa.array(place > 0), again, _one(table["event_id"])))


def spread_orders(table: pa.Table, clock: Clock) -> pa.Table:
    """Times for data without a clock: each user's distinct places spread evenly over the clock's span; equal ones stay equal."""
    user, time = _ranks(table["user_id"]), _times(table)
    order = np.lexsort((time, user))
    changed = np.diff(user[order], prepend=-1) != 0
    step = changed | (np.diff(time[order], prepend=np.iinfo(np.int64).min) != 0)
    dense = np.cumsum(step)
    first = np.maximum.accumulate(np.where(changed, dense, 0))
    place = dense - first + 1  # 1, 2 ... within the user
    last = np.zeros(int(user.max(initial=-1)) + 1, np.int64)
    np.maximum.at(last, user[order], place)
    span = int(clock.days * 86_400_000_000)
    out = np.empty(table.num_rows, np.int64)
    out[order] = clock.start_us + (place.astype(np.float64) / (last[user[order]] + 1) * span).astype(np.int64)
    return _set(table, "timestamp", pa.array(out).cast(TIMESTAMP))


def sessionise(table: pa.Table, gap_minutes: float) -> pa.Table:
    """A ``session_id`` for the events that have none: a user's events less than a gap apart share one.

    Named by user and start, so it is stable.
    """
    missing = np.asarray(pc.is_null(_one(table["session_id"])).to_numpy(zero_copy_only=False))
    if not missing.any():
        return table
    part = table.filter(pa.array(missing))
    user, time = _ranks(part["user_id"]), _times(part)
    order = np.lexsort((time, user))
    starts = (np.diff(user[order], prepend=-1) != 0) | (np.diff(time[order], prepend=0) > gap_minutes * 60_000_000)
    heads = order[np.flatnonzero(starts)]
    names = content_ids(part.select(["user_id", "timestamp"]).take(pa.array(heads)))
    session = np.empty(part.num_rows, np.int64)
    session[order] = np.cumsum(starts) - 1
    places = np.zeros(table.num_rows, np.int64)
    places[missing] = session
    made = pc.binary_join_element_wise("s", pc.utf8_slice_codeunits(names, 0, 16), "-").take(pa.array(places))
    return _set(table, "session_id", pc.if_else(pa.array(missing), made, _one(table["session_id"])))


def net_returns(table: pa.Table, days: float | None = None) -> tuple[pa.Table, pa.Table]:
    """Purchases less what came back: (kept rows, netted rows as they came), each in the order of ``table``.

    A return takes its quantity from the same user's purchases of the item that are not later, and at most ``days`` old: the latest first. A
    purchase or return whose whole quantity is netted leaves; of one that is netted in part the rest stays as its ``value``. So bought less
    returned is the same before and after. Quantities below or equal to 0 are left alone; a missing one counts as 1.
    """
    kinds = table["event"]
    sides = [_booleans(pc.equal(kinds, kind)) for kind in ("purchase", "return")]
    quantity = np.array(pc.fill_null(_one(table["value"]), 1.0), np.float64)
    bought, returned = (side & (quantity > 0) for side in sides)
    if not (bought.any() and returned.any()):
        return table, table.slice(0, 0)
    pair = _ranks(table["user_id"]) * table.num_rows + _ranks(table["item_id"])
    rows = np.flatnonzero((bought | returned) & np.isin(pair, np.intersect1d(pair[bought], pair[returned])))
    time = _times(table)
    order = rows[np.lexsort((_ranks(table["event_id"])[rows], returned[rows], time[rows], pair[rows]))]
    left = quantity.copy()
    span = 1 << 62 if days is None else int(days * 86_400_000_000)
    stack: list[int] = []  # purchases of the pair with something left, latest on top
    last = -1
    for row in order.tolist():
        if pair[row] != last:
            stack, last = [], pair[row]
        if bought[row]:
            stack.append(row)
            continue
        while stack and left[row] > NOTHING and time[row] - time[stack[-1]] <= span:
            taken = min(left[row], left[stack[-1]])
            left[row] -= taken
            left[stack[-1]] -= taken
            if left[stack[-1]] <= NOTHING:
                stack.pop()
    gone = (bought | returned) & (left <= NOTHING)
    values = pc.if_else(pa.array(left < quantity), pa.array(left.astype(np.float32)), _one(table["value"]))
    return _set(table, "value", values).filter(pa.array(~gone)), table.filter(pa.array(gone))


def in_order(table: pa.Table) -> pa.Table:
    """Rows by (timestamp, event_id), the order of every scan in Maple."""
    return table.take(pa.array(np.lexsort((_ranks(table["event_id"]), _times(table)))))


# -- what events say of items -------------------------------------------------------------------------------------------


def item_facts(events: pa.Table, how: ItemsFromEvents, targets: Sequence[str]) -> pa.Table:
    """Mergeable counts of clean events: rows of (item_id, fact, text, number, count).

    ``count`` adds up; ``first`` rows take the minimum number.
    """
    parts = [
        _facts(
            "first",
            events.group_by("item_id").aggregate([("timestamp", "min"), ([], "count_all")]),
            number="timestamp_min",
            count="count_all",
        )
    ]
    for target, column in how.texts.items():
        text = pc.utf8_trim_whitespace(_one(events[column]))
        pairs = pa.table({"item_id": events["item_id"], "text": text}).filter(pc.greater(pc.binary_length(text), 0))
        parts.append(_facts(target, pairs.group_by(["item_id", "text"]).aggregate([([], "count_all")]), text="text", count="count_all"))
    if how.price:
        bought = events.filter(pc.and_(pc.is_in(events["event"], value_set=pa.array(targets)), pc.greater(events["price"], 0)))
        prices = bought.group_by(["item_id", "price"]).aggregate([([], "count_all")])
        parts.append(_facts("price", prices, number="price", count="count_all"))
    return merge_facts(parts)


def _facts(fact: str, table: pa.Table, *, text: str = "", number: str = "", count: str = "") -> pa.Table:
    rows = table.num_rows
    numbers = (
        table[number].cast(pa.int64()).cast(pa.float64())
        if number == "timestamp_min"
        else table[number].cast(pa.float64())
        if number
        else None
    )
    return pa.table(
        {
            "item_id": table["item_id"], "fact": pa.repeat(fact, rows),
            "text": table[text] if text else pa.nulls(rows, pa.string()),
            "number": numbers if numbers is not None else pa.nulls(rows, pa.float64()),
            "count": table[count].cast(pa.int64()) if count else pa.repeat(pa.scalar(1, pa.int64()), rows),
        }
    )  # fmt: skip


def merge_facts(parts: Iterable[pa.Table]) -> pa.Table:
    """The facts of the union of disjoint events, in a fixed order."""
    table = pa.concat_tables(parts)
    is_first = pc.equal(table["fact"], "first")
    first = table.filter(is_first).group_by(["item_id", "fact", "text"]).aggregate([("number", "min"), ("count", "sum")])
    rest = table.filter(pc.invert(is_first)).group_by(["item_id", "fact", "text", "number"]).aggregate([("count", "sum")])
    names = ["item_id", "fact", "text", "number", "count"]
    first = first.rename_columns([name.removesuffix("_min").removesuffix("_sum") for name in first.column_names]).select(names)
    rest = rest.rename_columns([name.removesuffix("_sum") for name in rest.column_names]).select(names)
    return pa.concat_tables([first, rest]).sort_by([(name, "ascending") for name in names[:4]])


def item_table(facts: pa.Table, how: ItemsFromEvents, catalogue: pa.Table | None) -> pa.Table:
    """The ITEMS table by item id: the catalogue's rows, filled from the facts where they say nothing, and items only the events know."""
    base = conform(catalogue if catalogue is not None else pa.table({"item_id": pa.array([], pa.string())}), ITEMS, "the item table")
    seen = facts.filter(pc.equal(facts["fact"], "first"))
    vocab = Vocab.of(pa.chunked_array(base["item_id"].chunks + seen["item_id"].chunks, pa.string()))
    out = base.take(pc.index_in(vocab.ids, value_set=_one(base["item_id"])))
    out = _set(out, "item_id", vocab.ids)
    for name in how.texts:
        best = facts.filter(pc.equal(facts["fact"], name)).sort_by(
            [("item_id", "ascending"), ("count", "descending"), ("text", "ascending")]
        )
        out = _fill(out, name, vocab, _heads(best), "text")
    if how.price:
        out = _fill(out, "price", vocab, _medians(facts.filter(pc.equal(facts["fact"], "price"))), "number")
    if how.created_at:
        out = _fill(out, "created_at", vocab, seen, "number")
    if how.category is not None:
        made = last_words(_one(out[how.category.last_word_of]), how.category)
        out = _set(out, "category", pc.coalesce(_one(out["category"]), made))
    return conform(out, ITEMS, "the item table")


def last_words(texts: pa.Array, how: LastWord) -> pa.Array:
    """The last word of letters of each text, upper case, without plural s; ``OTHER`` where fewer than ``min_items`` share it."""
    word = pc.struct_field(pc.extract_regex(pc.utf8_upper(texts), r"(?P<value>\pL{2,})[^\pL]*$"), "value")
    plural = pc.and_(pc.and_(pc.ends_with(word, "S"), pc.invert(pc.ends_with(word, "SS"))), pc.greater(pc.utf8_length(word), 3))
    word = pc.if_else(plural, pc.utf8_slice_codeunits(word, 0, -1), word)
    counts = pc.value_counts(word.drop_null())
    common = counts.field("values").filter(pc.greater_equal(counts.field("counts"), how.min_items))
    named = pc.if_else(pc.is_in(word, value_set=common), word, "OTHER")
    return pc.if_else(pc.is_valid(texts), pc.fill_null(named, "OTHER"), None)


def _heads(table: pa.Table) -> pa.Table:
    """The first row of each run of equal item ids."""
    return table.take(pa.array(np.flatnonzero(np.diff(_ranks(table["item_id"]), prepend=-1))))


def _medians(prices: pa.Table) -> pa.Table:
    """The lower median number of each item, its numbers counted ``count`` times."""
    table = prices.sort_by([("item_id", "ascending"), ("number", "ascending")])
    if table.num_rows == 0:
        return table
    item, count = _ranks(table["item_id"]), np.asarray(table["count"])
    starts = np.flatnonzero(np.diff(item, prepend=-1))
    running = np.cumsum(count)
    run = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(item))))
    before = (running - count)[starts][run]
    total = np.add.reduceat(count, starts)[run]
    reached = np.flatnonzero(2 * (running - before) >= total)
    return table.take(pa.array(reached[np.flatnonzero(np.diff(item[reached], prepend=-1))]))


def _fill(table: pa.Table, name: str, vocab: Vocab, found: pa.Table, column: str) -> pa.Table:
    if found.num_rows == 0:
        return table
    values = _one(found[column]).take(pc.index_in(vocab.ids, value_set=_one(found["item_id"])))
    if name == "created_at":
        values = values.cast(pa.int64()).cast(TIMESTAMP)
    return _set(table, name, pc.coalesce(_one(table[name]), values.cast(table.schema.field(name).type)))


# -- small pieces -------------------------------------------------------------------------------------------------------


def stored_events(table: pa.Table, drop: Sequence[str]) -> pa.Table:
    """The table as a snapshot stores it: EVENTS first, extras by name, without bookkeeping and transient columns."""
    extras = sorted(name for name in table.column_names if name not in EVENTS.names and name not in drop and not name.startswith("_"))
    return conform(table.select([*EVENTS.names, *extras]), EVENTS, "events")


def _booleans(column: Any) -> Bool:
    return np.asarray(_one(column).to_numpy(zero_copy_only=False), np.bool_)


def _one(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _by_id(table: pa.Table) -> tuple[Int64, Int64]:
    """The order of rows by (event id, file, record number), and the rank of the id of each row in that order."""
    ids = _ranks(table["event_id"])
    order = np.lexsort((np.asarray(table[ROW]), _ranks(table[FILE]), ids))
    return order, ids[order]


def _times(table: pa.Table) -> Int64:
    return np.asarray(table["timestamp"].cast(pa.int64()))


def _set(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), pa.field(name, column.type), column)


def _ranks(column: Any) -> Int64:
    """The place of each text among the distinct ones in byte order, int64[N]; null comes last."""
    coded = _one(column).dictionary_encode()
    rank = np.empty(len(coded.dictionary) + 1, np.int64)
    rank[np.asarray(pc.sort_indices(coded.dictionary))] = np.arange(len(coded.dictionary))
    rank[-1] = len(coded.dictionary)
    return np.asarray(rank[np.asarray(coded.indices.fill_null(len(coded.dictionary)))])


def _lanes(column: pa.Array) -> tuple[UInt64, UInt64]:
    """Two 64-bit values of each cell, of its type and content."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_timestamp(kind) or pa.types.is_boolean(kind):
        raw = np.asarray(column.cast(pa.int64()).fill_null(0)).astype(np.uint64)
    elif pa.types.is_floating(kind):
        raw = (np.asarray(column.cast(pa.float64()).fill_null(0.0)) + 0.0).view(np.uint64)  # + 0.0: one zero
    else:
        coded = (column if pa.types.is_string(kind) else _text(column)).dictionary_encode()
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in coded.dictionary.to_pylist()]
        pairs = np.frombuffer(b"".join([*digests, bytes(16)]), "<u8").reshape(-1, 2)
        found = pairs[np.asarray(coded.indices.fill_null(len(digests)))]
        return _nulled(column, found[:, 0]), _nulled(column, found[:, 1])
    with np.errstate(over="ignore"):
        return _nulled(column, mix64(raw + LANES[0])), _nulled(column, mix64(raw * LANES[1] + LANES[0]))


def _text(column: pa.Array) -> pa.Array:
    return pa.array([None if value is None else repr(value) for value in column.to_pylist()], pa.string())


def _nulled(column: pa.Array, values: UInt64) -> UInt64:
    return values if column.null_count == 0 else np.where(np.asarray(column.is_null()), NULL, values)


def _hex(high: UInt64, low: UInt64) -> pa.Array:
    """24 hex digits: all of ``high`` and half of ``low``."""
    raw = np.concatenate([high.astype(">u8").view(np.uint8).reshape(-1, 8), low.astype(">u8").view(np.uint8).reshape(-1, 8)[:, :4]], axis=1)
    text = np.ascontiguousarray(HEX[raw]).view("S24").reshape(-1)
    return pa.array(text, pa.binary()).cast(pa.string())
