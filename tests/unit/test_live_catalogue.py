"""The catalogue between two bundles: brand-new items after the known ones, live prices, and the digest that neither may change."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from shop import ITEMS, T0, Happening, online

from maple.data.dataset import Vocab
from maple.errors import DataError
from maple.features.catalogue import Catalogue
from maple.features.fold import NEVER
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.states import StateReader
from maple.features.store import rows_of
from maple.features.ticks import StoredItems
from maple.schema import TIMESTAMP

CATALOGUE = Catalogue.from_table(Vocab(ITEMS["item_id"].combine_chunks()), ITEMS)
NEW = pa.table(
    {
        "item_id": ["fork", "gum"],
        "category": ["home", "sweets"],
        "brand": [None, "b"],
        "price": pa.array([9.0, None], pa.float32()),
        "created_at": pa.array([T0, None], pa.int64()).cast(TIMESTAMP),
    }
)


def test_new_items_come_after_the_known_ones_with_what_is_known_of_them() -> None:
    more = CATALOGUE.extended(NEW)
    assert len(more) == len(CATALOGUE) + 2
    fork, gum = more.items.encode(["fork", "gum"])
    assert (fork, gum) == (5, 6)
    seen = more.take(np.array([fork, gum, -1], np.int32))
    home = more.categories.encode(["home"])[0]
    assert seen.category.tolist() == [home, -1, -1], "a category that no known item has is unknown"
    assert more.brands.decode(seen.brand[1:2]) == ["b"]
    np.testing.assert_allclose(seen.log_price, [np.log1p(9.0), np.nan, np.nan])
    np.testing.assert_allclose(seen.price_percentile, [0.5, np.nan, np.nan])  # between cup at 8 and dish at 10
    assert seen.created.tolist() == [T0, NEVER, NEVER]
    old = np.arange(len(CATALOGUE), dtype=np.int32)
    for name in ("category", "brand", "log_price", "price_percentile", "created"):
        np.testing.assert_array_equal(getattr(more.take(old), name), getattr(CATALOGUE.take(old), name))


def test_a_new_item_needs_nothing_but_an_id() -> None:
    more = CATALOGUE.extended(pa.table({"item_id": ["zip"]}))
    seen = more.take(more.items.encode(["zip"]))
    assert (seen.category[0], seen.brand[0], seen.created[0]) == (-1, -1, NEVER)
    assert np.isnan([seen.log_price[0], seen.price_percentile[0]]).all()


def test_known_and_repeated_items_are_refused() -> None:
    for ids in (["cup"], ["zip", "zip"]):
        with pytest.raises(DataError, match="distinct new items"):
            CATALOGUE.extended(pa.table({"item_id": ids}))


def test_live_prices_are_read_and_change_neither_digest_nor_folds() -> None:
    cup = CATALOGUE.items.encode(["cup"])
    live = CATALOGUE.extended(NEW).with_prices(cup, np.array([4.0], np.float32))
    assert live.take(cup).log_price[0] == pytest.approx(np.log1p(4.0))
    assert CATALOGUE.take(cup).log_price[0] == pytest.approx(np.log1p(8.0))
    assert live.digest == CATALOGUE.digest
    spec = FeatureSpec()
    rows = rows_of([online([Happening("u", "cup", "purchase", 0), Happening("u", "fork", "purchase", 1)])])
    states = [Folder(spec, catalogue).advance([Folder(spec, catalogue).empty("u")], rows)[0] for catalogue in (CATALOGUE, live)]
    folder = Folder(spec, CATALOGUE)
    assert folder.pack(states[0], "1") == folder.pack(states[1], "1")
    now, offsets = np.array([T0 + 2]), np.array([0, 2])
    asked = live.items.encode(["cup", "fork"])
    columns = StateReader(spec, live).columns(states[:1], now, offsets, asked)[1]
    level = np.log1p(8.0)  # what the user paid for the cup; nothing is known of what the fork cost
    np.testing.assert_allclose(columns["user_item.price.difference"], [np.log1p(4.0) - level, np.log1p(9.0) - level], rtol=1e-6)
    np.testing.assert_allclose(columns["user_item.bought.times"], np.log1p([1, 1]), rtol=1e-6)


def test_stored_item_features_of_newer_items_are_missing() -> None:
    stored = StoredItems({"item.x": np.array([1.0, 2.0], np.float32)})
    got = stored.item_columns(np.array([1, 2, 7, -1], np.int32), np.zeros(4, np.int64))
    np.testing.assert_array_equal(got["item.x"], np.array([2, np.nan, np.nan, np.nan], np.float32))


def test_an_extended_vocabulary_finds_old_and_new() -> None:
    more = CATALOGUE.extended(NEW).extended(pa.table({"item_id": ["zip"]})).items
    ids = ["gum", "cup", "zip", "nothing", "fork"]
    assert more.encode(ids).tolist() == more.encode(pa.array(ids)).tolist() == [6, 2, 7, -1, 5]
    assert more.decode(np.array([7, 0, 5])) == ["zip", "apple", "fork"]
