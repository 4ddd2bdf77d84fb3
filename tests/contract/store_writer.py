"""Appends events to a store for ever and prints the number of each that was acknowledged: killed by test_store.py."""

from __future__ import annotations

import sys

from shop import ITEMS, T0

from maple.data.dataset import Vocab
from maple.features.catalogue import Catalogue
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.store import Event
from maple.features.store_sqlite import SqliteStore

store = SqliteStore(sys.argv[1], Folder(FeatureSpec(), Catalogue.from_table(Vocab(ITEMS["item_id"].combine_chunks()), ITEMS)))
number = 0
while True:
    store.append([Event(f"e{number:06d}", f"u{number % 3}", "cup", "purchase", T0 + number)])
    print(number, flush=True)
    number += 1
