"""A bundle over a live catalogue: the same models with today's prices and availability, and items that are newer than the bundle.

``live_bundle`` gives an immutable bundle for one state of the live items; whoever serves makes a new one when they change and puts
it in place by one assignment. New items have codes behind the bundle's own, in the order in which they were first put: so processes
that have read the live items up to different points still mean the same item by a code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from maple.data.dataset import Float32, Int32
from maple.features.catalogue import Catalogue
from maple.features.extras import Extras
from maple.features.live_items import LiveItem
from maple.features.states import ItemColumnsReader
from maple.index import tie_ranks
from maple.models.base import Array, Space
from maple.models.content.items import vectors_of
from maple.recommend.build import Parts
from maple.recommend.bundle import Bundle
from maple.recommend.filters import ItemColumns, PatchedColumns
from maple.recommend.newcomers import NewItems
from maple.recommend.rerank import unit
from maple.schema import ITEMS, TIMESTAMP

#: The item columns that a live item may change, always there in a live catalogue. Its attributes change columns that the bundle has.
FIELDS: Mapping[str, pa.DataType] = {
    **{name: ITEMS.field(name).type for name in ("available", "stock", "price", "title", "category", "brand", "created_at", "promotion")},
    "promotion_start": TIMESTAMP,
    "promotion_end": TIMESTAMP,
}


@dataclass(frozen=True, eq=False)
class LiveView:
    """The live items as of a version: everything put so far, withdrawn items too."""

    version: int = 0
    items: Mapping[str, LiveItem] = field(default_factory=dict)

    def after(self, version: int, changes: Iterable[LiveItem]) -> LiveView:
        """The view at a later version."""
        return LiveView(version, {**self.items, **{item.item_id: item for item in changes}})


@dataclass(frozen=True, eq=False, kw_only=True)
class LiveParts(Parts):
    """The parts of ``base`` over the columns of a live catalogue."""

    base: Parts
    columns: PatchedColumns

    @cached_property
    def ties(self) -> Int32:
        """As in the base; new items come behind equally scored known ones."""
        size = len(self.base.space.items)
        return np.concatenate([self.base.ties, size + tie_ranks(self.space.items.ids[size:].to_pylist())])

    @cached_property
    def item_columns(self) -> ItemColumns:
        return self.columns

    @cached_property
    def vectors(self) -> Float32 | None:
        return self.base.vectors

    @cached_property
    def new_vectors(self) -> Float32 | None:
        """Of a new item the middle of its category, of one without that of all items: as like others as an item of its kind is."""
        vectors, known = self.vectors, len(self.base.space.items)
        if vectors is None:
            return None
        category = self.columns.codes("category")[0]
        out = np.empty((len(category) - known, vectors.shape[1]), np.float32)
        for code in np.unique(category[known:]).tolist():
            kind = vectors[category[:known] == code] if code >= 0 else vectors[:0]
            out[category[known:] == code] = (kind if len(kind) else vectors).mean(axis=0)
        return unit(out)


@dataclass(frozen=True, eq=False, kw_only=True)
class LiveBundle(Bundle):
    """``base`` with live items by code, as of a ``version`` of these.

    ``until``: the microsecond from which it is out of date by itself, as a promotion starts or ends; None = never.
    """

    base: Bundle
    live: Mapping[int, LiveItem]
    version: int
    until: int | None
    content: Mapping[str, Float32]  # of new items, a row each: their content vectors

    @property
    def num_new(self) -> int:
        """How many items are newer than the bundle."""
        return len(self.space.items) - len(self.base.space.items)

    @cached_property
    def catalogue(self) -> Catalogue:
        known, out = len(self.base.space.items), self.base.catalogue
        if self.num_new:
            out = out.extended(self._new_items)
        priced = [(code, item.price) for code, item in self.live.items() if code < known and item.price is not None]
        if priced:
            out = out.with_prices(np.array([code for code, _ in priced], np.int32), np.array([price for _, price in priced], np.float32))
        return out

    @cached_property
    def extras(self) -> Extras:
        return self.base.extras.extended(self._new_items, self.content) if self.num_new else self.base.extras

    @cached_property
    def _new_items(self) -> pa.Table:
        """What was said of the new items, as a table in code order."""
        return _table(self.parts.item_columns, self.new)

    @cached_property
    def new(self) -> list[LiveItem]:
        """The new items in code order."""
        known = len(self.base.space.items)
        return [item for code, item in self.live.items() if code >= known]

    @cached_property
    def item_reader(self) -> ItemColumnsReader:
        return self.base.item_reader

    def titles(self, codes: Array) -> list[str | None]:
        known = len(self.base.space.items)
        out = self.base.titles(np.where(codes < known, codes, 0))
        for place, code in enumerate(codes.tolist()):
            if code in self.live and (code >= known or self.live[code].title is not None):
                out[place] = self.live[code].title
        return out

    @cached_property
    def new_categories(self) -> Mapping[int, str]:
        known = len(self.base.space.items)
        return {code: item.category for code, item in self.live.items() if code >= known and item.category}


def live_bundle(bundle: Bundle, view: LiveView, now: int, before: LiveBundle | None = None) -> LiveBundle:
    """The bundle with the live items of a view as they are at a time (microseconds). Milliseconds, for thousands of live items.

    ``before``: the same bundle over an earlier view; what is slow to make (content vectors) is taken from it where nothing changed.
    """
    items = sorted(view.items.values(), key=lambda item: item.number)
    known = bundle.space.items
    codes = known.encode([item.item_id for item in items])
    new = [item.item_id for item, code in zip(items, codes.tolist(), strict=True) if code < 0]
    codes[codes < 0] = np.arange(len(known), len(known) + len(new), dtype=np.int32)
    live = dict(sorted(zip(codes.tolist(), items, strict=True)))
    vocab = known.extended(pa.array(new, pa.string())) if new else known
    parts = bundle.parts
    columns = PatchedColumns(parts.item_columns, len(vocab), _patches(parts.item_columns, live, now))
    newcomers = NewItems(
        len(known), columns.codes("category")[0], columns.codes("brand")[0], columns.floats("price"),
        np.arange(len(new) - 1, -1, -1, dtype=np.int32), parts.popular, parts.space.signals,
    )  # fmt: skip
    space = Space(vocab, parts.space.item_table, parts.space.signals)
    return LiveBundle(
        LiveParts(
            parts.settings, space, parts.sources, parts.popular, parts.ranker, parts.ranker_columns, newcomers, base=parts, columns=columns
        ),
        bundle.about, bundle.features, bundle.canaries, bundle.digest,
        base=bundle, live=live, version=view.version, until=next_change(items, now),
        content=_content(bundle, columns, [item for code, item in live.items() if code >= len(known)], before),
    )  # fmt: skip


def _content(bundle: Bundle, columns: ItemColumns, new: Sequence[LiveItem], before: LiveBundle | None) -> dict[str, Float32]:
    """The content vectors of new items, of those encoded that have changed since ``before``."""
    contents = bundle.extras.content
    if not contents or not new:
        return {}
    had = {} if before is None else {(item.item_id, item.version): row for row, item in enumerate(before.new)}
    rows = np.array([had.get((item.item_id, item.version), -1) for item in new])
    fresh = np.flatnonzero(rows < 0)
    encoded = vectors_of(contents, _table(columns, [new[place] for place in fresh.tolist()])) if len(fresh) else {}
    out = {name: np.zeros((len(new), content.dim), np.float32) for name, content in contents.items()}
    for name, vectors in out.items():
        if before is not None and had:
            vectors[rows >= 0] = before.content[name][rows[rows >= 0]]
        if len(fresh):
            vectors[fresh] = encoded[name]
    return out


def _table(columns: ItemColumns, new: Sequence[LiveItem]) -> pa.Table:
    """What was said of new items, in the columns of the catalogue."""
    said = [{**item.attributes, **_values(item, 0)} for item in new]
    table = {name: _typed([one.get(name) for one in said], columns.kind(name)) for name in columns.names}
    return pa.table({"item_id": pa.array([item.item_id for item in new], pa.string()), **table})


def promoted(item: LiveItem, now: int) -> bool:
    """Whether a promotion of the item runs at a time; both ends may be open, the start belongs to it and the end does not."""
    start, end = item.promotion or (None, None)
    return item.promotion is not None and (start is None or start <= now) and (end is None or now < end)


def next_change(items: Iterable[LiveItem], now: int) -> int | None:
    """When live items change by themselves next: the start or end of a promotion; None = never."""
    ahead = [at for item in items for at in item.promotion or () if at is not None and at > now]
    return min(ahead, default=None)


def _values(item: LiveItem, now: int) -> dict[str, Any]:
    """What a live item says of its columns; what it does not say is left out."""
    out = {name: getattr(item, name) for name in ("stock", "price", "title", "category", "brand", "created_at")}
    out["available"] = False if item.deleted else item.available
    if item.promotion is not None:
        out["promotion"] = promoted(item, now)
        out["promotion_start"], out["promotion_end"] = item.promotion
    return {name: value for name, value in out.items() if value is not None}


def _patches(base: ItemColumns, live: Mapping[int, LiveItem], now: int) -> dict[str, tuple[Int32, pa.Array]]:
    """The columns that live items change, each with the codes and values of those that do."""
    found: dict[str, tuple[list[int], list[Any]]] = {name: ([], []) for name in FIELDS}
    own = {name for name in base.names if name not in FIELDS}
    for code, item in live.items():
        values = _values(item, now) | {name: value for name, value in item.attributes.items() if name in own}
        for name, value in values.items():
            rows, column = found.setdefault(name, ([], []))
            rows.append(code)
            column.append(value)
    kinds = {name: base.kind(name) if name in base.names else FIELDS[name] for name in found}
    return {name: (np.array(rows, np.int32), _typed(column, kinds[name])) for name, (rows, column) in found.items()}


def _typed(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values as a column of a type; one that does not fit is missing."""
    try:
        return _cast(values, kind)
    except (pa.ArrowException, OverflowError):
        return pa.concat_arrays([_typed([value], kind) if len(values) > 1 else pa.nulls(1, kind) for value in values])


def _cast(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    column = pa.array(values)
    if pa.types.is_null(column.type):
        return pa.nulls(len(values), kind)
    if pa.types.is_timestamp(kind) and pa.types.is_integer(column.type):
        return column.cast(TIMESTAMP).cast(kind)
    if pa.types.is_string(column.type) != pa.types.is_string(kind):
        raise pa.ArrowInvalid("text is no number, and a number no text")
    return column.cast(kind)
