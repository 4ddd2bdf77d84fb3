"""What the features need of the catalogue: category, brand, price and first day of each item, as arrays by item code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.dataset import Bool, Dataset, Float32, Int8, Int32, Int64, Vocab
from maple.errors import DataError
from maple.features.fold import NEVER, Float64
from maple.hashing import sha256
from maple.schema import EVENT_CODES


@dataclass(frozen=True, eq=False)
class ItemColumns:
    """Catalogue columns gathered for N rows: codes int32 (-1 unknown), numbers float64 (NaN unknown), ``created`` NEVER if unknown."""

    category: Int32
    brand: Int32
    log_price: Float64  # log(1 + catalogue price)
    price_percentile: Float64  # place of the price in its category, 0 to 1
    created: Int64  # microseconds


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All items in code order with their vocabularies of categories and brands. I items.

    ``base``: the catalogue that this one was derived from by ``extended`` or ``with_prices``, which change what is read of items but
    not what events are folded under.
    """

    items: Vocab
    categories: Vocab
    brands: Vocab
    columns: ItemColumns
    base: Catalogue | None = None

    @staticmethod
    def of(data: Dataset) -> Catalogue:
        """The catalogue of a data set; columns that its item table lacks are unknown for all items."""
        return Catalogue.from_table(data.items, data.item_table)

    @staticmethod
    def from_table(items: Vocab, table: pa.Table) -> Catalogue:
        """From an item table with one row per code of ``items``."""
        categories, brands = (Vocab.of(_texts(table, name)) for name in ("category", "brand"))
        columns = _columns(table, len(items), categories, brands)
        place = _percentiles(columns.category, columns.log_price)
        return Catalogue(items, categories, brands, replace(columns, price_percentile=place))

    def __len__(self) -> int:
        return len(self.items)

    def extended(self, table: pa.Table) -> Catalogue:
        """With brand-new items after the known ones, in the order of the table: ``item_id`` and what is known of category, brand, price and
        ``created_at``. A category or brand that no known item has is unknown. ``DataError`` for an id that is known already."""
        new = Vocab(table["item_id"].cast(pa.string()).combine_chunks())
        known = self.items.encode(new.ids.to_pylist())  # by the index that is there already
        if (known >= 0).any() or len(pc.unique(new.ids)) < len(new):
            raise DataError("a catalogue is extended by distinct new items; known ones are changed by their live values")
        own = _columns(table, len(new), self.categories, self.brands)
        was = self.columns
        place = _percentiles_among(was.category, was.log_price, own.category, own.log_price)
        columns = ItemColumns(
            np.concatenate([was.category, own.category]), np.concatenate([was.brand, own.brand]),
            np.concatenate([was.log_price, own.log_price]), np.concatenate([was.price_percentile, place]),
            np.concatenate([was.created, own.created]),
        )  # fmt: skip
        return replace(self, items=self.items.extended(new.ids), columns=columns, base=self.folding)

    def with_prices(self, codes: Int32, prices: Float32) -> Catalogue:
        """With other prices of some items, as a live price changes what is read of them; places in the category stay. NaN = not known."""
        log_price = self.columns.log_price.copy()
        price = np.asarray(prices, np.float64)
        log_price[codes] = np.log1p(np.where(price >= 0, price, np.nan))
        return replace(self, columns=replace(self.columns, log_price=log_price), base=self.folding)

    @property
    def folding(self) -> Catalogue:
        """What events are folded under: the catalogue before live changes."""
        return self.base or self

    def take(self, codes: Int32) -> ItemColumns:
        """The columns of some item codes; everything about -1 is unknown."""
        c = self._padded
        return ItemColumns(c.category[codes], c.brand[codes], c.log_price[codes], c.price_percentile[codes], c.created[codes])

    @cached_property
    def _padded(self) -> ItemColumns:
        """The columns with one row more for what is unknown: index -1 finds it."""
        c = self.columns
        return ItemColumns(
            np.append(c.category, np.int32(-1)), np.append(c.brand, np.int32(-1)), np.append(c.log_price, np.nan),
            np.append(c.price_percentile, np.nan), np.append(c.created, np.int64(NEVER)),
        )  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """Identifies what a fold of user events takes from the catalogue: ids, categories, brands, prices; live changes apart."""
        if self.base is not None:
            return self.base.digest
        parts = [b"\x00".join(text.encode() for text in vocab.ids.to_pylist()) for vocab in (self.items, self.categories, self.brands)]
        c = self.columns
        return sha256(b"\x01".join([*parts, c.category.tobytes(), c.brand.tobytes(), c.log_price.astype("<f8").tobytes()]))


def _columns(table: pa.Table, count: int, categories: Vocab, brands: Vocab) -> ItemColumns:
    """The columns of a table of items in known codes; places in the category are left unknown."""
    category, brand = (
        vocab.encode(_texts(table, name)) if len(vocab) and name in table.column_names else np.full(count, -1, np.int32)
        for name, vocab in (("category", categories), ("brand", brands))
    )
    price = _numbers(table, "price", count)
    log_price = np.log1p(np.where(price >= 0, price, np.nan))
    created = np.full(count, NEVER, np.int64)
    if "created_at" in table.column_names:
        created = np.asarray(table["created_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).fill_null(NEVER))
    return ItemColumns(category, brand, log_price, np.full(count, np.nan), created)


def _texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column as text, null where empty; no rows where the table lacks it."""
    if name not in table.column_names:
        return pa.chunked_array([], pa.string())
    column = table[name].cast(pa.string())
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _numbers(table: pa.Table, name: str, count: int) -> Float64:
    if name not in table.column_names:
        return np.full(count, np.nan)
    return np.asarray(table[name].cast(pa.float64()).fill_null(float("nan")), dtype=np.float64)


def _percentiles(category: Int32, value: Float64) -> Float64:
    """Mid-rank of each known value among the known values of its category (-1 is a category too), 0 to 1; alone = 0.5."""
    out = np.full(len(value), np.nan)
    known = np.flatnonzero(~np.isnan(value))
    if len(known) == 0:
        return out
    order = known[np.lexsort((value[known], category[known]))]
    group, sorted_value = category[order], value[order]
    new_group = np.r_[True, group[1:] != group[:-1]]
    new_value = new_group | np.r_[True, sorted_value[1:] != sorted_value[:-1]]
    place = np.arange(len(order))
    start = place[new_group][np.cumsum(new_group) - 1]
    size = np.diff(np.r_[place[new_group], len(order)])[np.cumsum(new_group) - 1]
    first = place[new_value]
    tie = np.cumsum(new_value) - 1
    tied = np.diff(np.r_[first, len(order)])
    out[order] = (first[tie] + (tied[tie] - 1) / 2 - start + 0.5) / size
    return out


def _percentiles_among(category: Int32, value: Float64, own_category: Int32, own_value: Float64) -> Float64:
    """Where each of M further values would stand among the I known ones of its category, 0 to 1; NaN where either is unknown."""
    out = np.full(len(own_value), np.nan)
    for code in np.unique(own_category):
        among = np.sort(value[(category == code) & ~np.isnan(value)])
        rows = np.flatnonzero((own_category == code) & ~np.isnan(own_value))
        if len(among):
            both = np.searchsorted(among, own_value[rows], "left") + np.searchsorted(among, own_value[rows], "right")
            out[rows] = both / 2 / len(among)
    return out


class Mark(StrEnum):
    """What an event may know of its user's earlier events; see ``marks``."""

    FIRST_BOUGHT = "first_bought"  # when the user first bought the item, microseconds; this event counts; NaN if never
    IN_CATEGORY = "in_category"  # the user's events in the item's category, decayed by the longest half-life; this event counts
    WITH_BRAND = "with_brand"  # the same of the item's brand


@dataclass(frozen=True, eq=False)
class EventColumns:
    """N events as views see them. ``value`` and ``price`` NaN where missing; a missing price is the catalogue's."""

    event: Int8
    time: Int64  # microseconds
    value: Float64
    price: Float64
    fresh: Bool | None = None  # first purchase of this item by this user in this tick; item views only
    marks: Mapping[Mark, Float64] = field(default_factory=dict)  # float64[N] each; those that the views of the user ask for

    @staticmethod
    def of(
        catalogue: Catalogue, items: Int32, event: Int8, time: Int64, value: Float32, price: Float32, fresh: Bool | None = None
    ) -> EventColumns:
        """From the columns of a log. Numbers are taken as float32, as the log keeps them, so that online and offline agree to the bit."""
        paid = np.asarray(price, np.float32).astype(np.float64)
        paid = np.where(np.isnan(paid), np.expm1(catalogue.take(items).log_price), paid)
        return EventColumns(event, time, np.asarray(value, np.float32).astype(np.float64), paid, fresh)

    def __len__(self) -> int:
        return len(self.event)

    def is_(self, *names: str) -> Bool:
        """Which events are of one of these kinds."""
        out = self.event == EVENT_CODES[names[0]]
        for name in names[1:]:
            out |= self.event == EVENT_CODES[name]
        return np.asarray(out)

    @property
    def quantity(self) -> Float64:
        """Units of a purchase or return; 1 where not given."""
        return np.where(np.isnan(self.value), 1.0, np.abs(self.value))
