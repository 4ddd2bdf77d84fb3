"""What the features need of the catalogue: category, brand, price and first day of each item, as arrays by item code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple.data.dataset import Bool, Dataset, Float32, Int8, Int32, Int64, Vocab
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
    """All items in code order with their vocabularies of categories and brands. I items."""

    items: Vocab
    categories: Vocab
    brands: Vocab
    columns: ItemColumns

    @staticmethod
    def of(data: Dataset) -> Catalogue:
        """The catalogue of a data set; columns that its item table lacks are unknown for all items."""
        return Catalogue.from_table(data.items, data.item_table)

    @staticmethod
    def from_table(items: Vocab, table: pa.Table) -> Catalogue:
        """From an item table with one row per code of ``items``."""
        count = len(items)
        categories, category = _codes(table, "category", count)
        brands, brand = _codes(table, "brand", count)
        price = _numbers(table, "price", count)
        log_price = np.log1p(np.where(price >= 0, price, np.nan))
        created = np.full(count, NEVER, np.int64)
        if "created_at" in table.column_names:
            created = np.asarray(table["created_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).fill_null(NEVER))
        return Catalogue(items, categories, brands, ItemColumns(category, brand, log_price, _percentiles(category, log_price), created))

    def __len__(self) -> int:
        return len(self.items)

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
        """Identifies everything that a fold of user events takes from the catalogue: ids, categories, brands, prices."""
        parts = [b"\x00".join(text.encode() for text in vocab.ids.to_pylist()) for vocab in (self.items, self.categories, self.brands)]
        c = self.columns
        return sha256(b"\x01".join([*parts, c.category.tobytes(), c.brand.tobytes(), c.log_price.astype("<f8").tobytes()]))


def _codes(table: pa.Table, name: str, count: int) -> tuple[Vocab, Int32]:
    if name not in table.column_names:
        return Vocab(pa.array([], pa.string())), np.full(count, -1, np.int32)
    column = table[name].cast(pa.string())
    column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    vocab = Vocab.of(column)
    return vocab, vocab.encode(column) if len(vocab) else np.full(count, -1, np.int32)


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


@dataclass(frozen=True, eq=False)
class EventColumns:
    """N events as views see them. ``value`` and ``price`` NaN where missing; a missing price is the catalogue's."""

    event: Int8
    time: Int64  # microseconds
    value: Float64
    price: Float64
    fresh: Bool | None = None  # first purchase of this item by this user in this tick; item views only

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
