"""Live items: what changes faster than a bundle (availability, stock, price, promotion, brand-new items), as a small versioned overlay.

``LiveItems`` is the contract; tests/contract/test_live_items.py holds both backends to it. Every change gets the next version, so a
replica that remembers the last version it saw asks for what came since. Changes are partial: what a call does not name stays, None takes
away what was said, so callers that change different fields at the same time lose nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from maple.errors import DataError, unknown_name
from maple.features.people import MAX_ATTRIBUTES, check_attributes
from maple.features.states import Attribute
from maple.schema import check_id

MAX_TIME = 1 << 52  # microseconds since 1970
_TEXTS = {"title": 1024, "category": 256, "brand": 256}  # bytes
_NUMBERS = {"stock": 1e12, "price": 1e9}


@dataclass(frozen=True)
class LiveItem:
    """What was said of one item; None = nothing. Times in microseconds since 1970, UTC.

    ``number`` is its place in the order in which items were first told of: 0, 1, 2, ...; never reused. ``version`` grows with every
    change of any item. A deleted item is withdrawn, and everything said before forgotten.
    """

    item_id: str
    number: int
    version: int
    available: bool | None = None
    stock: float | None = None
    price: float | None = None
    promotion: tuple[int | None, int | None] | None = None  # from, to; None = open
    title: str | None = None
    category: str | None = None
    brand: str | None = None
    created_at: int | None = None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    deleted: bool = False


FIELDS = ("available", "stock", "price", "promotion", "title", "category", "brand", "created_at", "attributes", "deleted")


@runtime_checkable
class LiveItems(Protocol):
    """The overlay. Durable when a call returns. Safe to call from several threads and processes."""

    def put(self, item_id: str, changes: Mapping[str, Any]) -> LiveItem:
        """Say something of an item, by names of ``LiveItem``; with nothing but an id it is a new item. What was withdrawn is back.

        ``attributes`` change one by one like everything else; None takes all away. ``{"deleted": True}`` withdraws.
        ``DataError`` where a change is not legal.
        """

    def delete(self, item_id: str) -> LiveItem:
        """Withdraw an item: it stays known as deleted, and everything that was said of it is forgotten."""

    def get(self, item_id: str) -> LiveItem | None:
        """What is known of an item; None where nothing was ever said."""

    def since(self, version: int) -> tuple[int, list[LiveItem]]:
        """The latest version, and the items that changed after ``version``, oldest change first, each as it is now.

        All items where ``version`` is later than the latest: then this is another store than before.
        """

    def close(self) -> None:
        """Close all connections."""


def changed(item_id: str, old: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of an item (plain, None left out) after legal changes to what was; a ``DataError`` otherwise."""
    checked = check_changes(item_id, changes)
    if checked.get("deleted"):
        if len(checked) > 1:
            raise DataError(f"item {item_id!r} cannot be withdrawn and described in one call")
        return {"deleted": True}
    out = {**(old or {}), **checked}
    if out.get("attributes") is not None:
        both = {**(old or {}).get("attributes", {}), **out["attributes"]}
        out["attributes"] = {name: value for name, value in both.items() if value is not None}
        if len(out["attributes"]) > MAX_ATTRIBUTES:
            raise DataError(f"item {item_id!r} would have {len(out['attributes'])} attributes; at most {MAX_ATTRIBUTES} are kept")
    out["deleted"] = None
    return {name: value for name, value in out.items() if value is not None}


def check_changes(item_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that are legal, plain (JSON); a ``DataError`` that names the field otherwise."""
    check_id(item_id, "item_id")
    out: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in FIELDS:
            raise DataError(unknown_name("field of an item", name, FIELDS))
        what = f"{name} of item {item_id!r}"
        if name == "attributes":
            if value is not None and not isinstance(value, Mapping):
                raise DataError(f"{what} must be a mapping of names to values")
            out[name] = None if value is None else check_attributes(value, f"item {item_id!r}")
        else:
            out[name] = None if value is None else _plain(name, value, what)
    return out


def _plain(name: str, value: Any, what: str) -> Any:
    if name in ("available", "deleted"):
        if not isinstance(value, bool):
            raise DataError(f"{what} must be true or false")
    elif name in _NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= _NUMBERS[name]:
            raise DataError(f"{what} must be a number from 0 to {_NUMBERS[name]:g}")
        return float(value)
    elif name in _TEXTS:
        if not isinstance(value, str):
            raise DataError(f"{what} must be text")
        if name != "title":
            return check_id(value, what)
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise DataError(f"{what} is not valid text") from None
        if size > _TEXTS[name]:
            raise DataError(f"{what} is longer than {_TEXTS[name]} bytes")
    elif name == "created_at":
        return _time(value, what)
    else:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise DataError(f"{what} must be a pair of times, from and to; null leaves an end open")
        start, end = (None if each is None else _time(each, what) for each in value)
        if start is not None and end is not None and start >= end:
            raise DataError(f"{what} must end after it starts")
        return [start, end]
    return value


def _time(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_TIME:
        raise DataError(f"{what} must be a time in microseconds since 1970, UTC")
    return value


def to_text(plain: Mapping[str, Any]) -> str:
    """What is said of an item, as it is stored."""
    return json.dumps(plain, sort_keys=True)


def from_text(item_id: str, number: int, version: int, text: str | bytes) -> LiveItem:
    """The item again."""
    plain = json.loads(text)
    if "promotion" in plain:
        plain["promotion"] = tuple(plain["promotion"])
    return LiveItem(item_id, number, version, **plain)
