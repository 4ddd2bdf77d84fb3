"""The tables every part of Maple agrees on: events, items and users, as Arrow schemas, and what an id may be.

Unknown extra columns are kept; they may become typed features or request context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from maple.errors import DataError, unknown_name

#: Event kinds in code order: an event's int8 code is its place in this tuple, in every snapshot and bundle.
EVENT_TYPES: tuple[str, ...] = ("view", "click", "add_to_cart", "purchase", "return", "rating", "like", "dislike", "impression", "other")
EVENT_CODES: dict[str, int] = {name: code for code, name in enumerate(EVENT_TYPES)}

TIMESTAMP = pa.timestamp("us", tz="UTC")

EVENTS = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("timestamp", TIMESTAMP, nullable=False),
        pa.field("value", pa.float32()),  # quantity of a purchase or return, stars of a rating
        pa.field("price", pa.float32()),  # unit price at the time
        pa.field("session_id", pa.string()),  # basket, invoice or visit
        pa.field("request_id", pa.string()),  # the slate that this event answers
    ]
)

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("description", pa.string()),
        pa.field("category", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("price", pa.float32()),
        pa.field("available", pa.bool_()),
        pa.field("stock", pa.float32()),
        pa.field("created_at", TIMESTAMP),
        pa.field("margin", pa.float32()),
        pa.field("promotion", pa.bool_()),
    ]
)

USERS = pa.schema([pa.field("user_id", pa.string(), nullable=False)])

#: Which devices (cookies, cards, apps) belong to which user; the same device may be seen with several.
IDENTITIES = pa.schema(
    [
        pa.field("device_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("timestamp", TIMESTAMP),  # when they were seen together
    ]
)

MAX_ID_BYTES = 256
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def check_id(text: str, what: str = "id") -> str:
    """``text`` if it is a legal id (1 to 256 bytes of UTF-8 without control characters); otherwise a ``DataError``."""
    if not text:
        raise DataError(f"{what} is empty; an id is 1 to {MAX_ID_BYTES} bytes of UTF-8")
    if _CONTROL.search(text):
        raise DataError(f"{what} contains a control character; an id is 1 to {MAX_ID_BYTES} bytes of UTF-8 without them")
    if len(text.encode()) > MAX_ID_BYTES:
        raise DataError(f"{what} is longer than {MAX_ID_BYTES} bytes")
    return text


def legal_ids(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """For each string of a column whether it is a legal id; null counts as illegal. Boolean, same length."""
    size = pc.binary_length(column)
    sized = pc.and_(pc.greater(size, 0), pc.less_equal(size, MAX_ID_BYTES))
    clean = pc.invert(pc.match_substring_regex(column, r"[\x00-\x1f\x7f-\x{9f}\x{2028}\x{2029}]"))
    return pc.fill_null(pc.and_(sized, clean), False)


def event_codes(names: Iterable[str]) -> npt.NDArray[np.int8]:
    """Codes of event names, int8; an unknown name is a ``DataError`` that lists the known ones."""
    out = []
    for name in names:
        if name not in EVENT_CODES:
            raise DataError(unknown_name("event type", name, EVENT_TYPES))
        out.append(EVENT_CODES[name])
    return np.asarray(out, dtype=np.int8)


def conform(table: pa.Table, schema: pa.Schema, what: str) -> pa.Table:
    """``table`` with the schema's columns first, in order and type (missing nullable ones filled with null), extras kept after them.

    Raises ``DataError`` where a required column is missing or a column cannot be cast without loss.
    """
    columns: list[pa.ChunkedArray] = []
    fields: list[pa.Field] = []
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise DataError(
                    f"{what}: required column {field.name!r} is missing. It has: {', '.join(table.column_names)}. "
                    "Map one of them to it under `columns:` in the source YAML."
                )
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
        else:
            try:
                columns.append(table[field.name].cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"{what}: column {field.name!r} is {table.schema.field(field.name).type} and cannot become {field.type}: {error}. "
                    "Fix the file or declare a conversion in the source YAML."
                ) from error
        fields.append(pa.field(field.name, field.type))
    for name in table.column_names:
        if name not in schema.names:
            columns.append(table[name])
            fields.append(table.schema.field(name))
    return pa.table(columns, schema=pa.schema(fields))
