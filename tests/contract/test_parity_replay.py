"""A sample of ``benchmarks/data_parity.py``: some households of a real shop, every event appended on its own, every feature compared."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from redis_server import RedisServer

from maple.artifacts import Place
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.snapshot import Snapshot
from maple.features.catalogue import Catalogue
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.store_redis import RedisStore
from maple.features.store_sqlite import SqliteStore

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from data_parity import CANDIDATES, compare, points, replay

SPEC = FeatureSpec()


@pytest.fixture(scope="module")
def sample(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The grocer's first forty households that say something of themselves, with what they bought."""
    folder = tmp_path_factory.mktemp("sample")
    source = data_dir / "complete-journey"
    people = pq.read_table(source / "demographics.parquet").slice(0, 40)
    bought = pq.read_table(source / "transactions_sample.parquet")
    bought = bought.filter(pc.is_in(bought["household_id"], value_set=people["household_id"].combine_chunks()))
    products = pq.read_table(source / "products.parquet")
    products = products.filter(pc.is_in(products["product_id"], value_set=pc.unique(bought["product_id"])))
    for name, table in (("demographics", people), ("transactions_sample", bought), ("products", products)):
        pq.write_table(table, folder / f"{name}.parquet")
    return ingest_local(*load_source("complete-journey", folder), Place.at(folder / "home"))


def test_every_feature_is_what_the_log_says(sample: Snapshot, tmp_path: Path) -> None:
    data = sample.dataset()
    asked = points(data, 40)
    assert all(len(point.items) == CANDIDATES for point in asked)
    assert not np.isin([point.at for point in asked], data.log.time).any()
    folder = Folder(SPEC, Catalogue.of(data))
    server = RedisServer(tmp_path, "no", "no")
    states = {
        "sqlite": replay(sample, SqliteStore(tmp_path / "store.db", folder, durable=False), asked),
        "redis": replay(sample, RedisStore(server.url, folder, durable=False), asked),
    }
    server.stop()
    assert sum(state.size > 0 for state in states["sqlite"]) > 30
    for backend, found in compare(data, SPEC, asked, states).items():
        assert found.cells > 40 * CANDIDATES * 100
        assert found.mismatches == 0, f"{backend}: {found.worst}"


def test_a_difference_is_found(sample: Snapshot, tmp_path: Path) -> None:
    data = sample.dataset()
    asked = points(data, 10)
    states = replay(sample, SqliteStore(tmp_path / "store.db", Folder(SPEC, Catalogue.of(data)), durable=False), asked)
    swapped = [*states[1:], states[0]]
    found = compare(data, SPEC, asked, {"wrong": swapped})["wrong"]
    assert found.mismatches > 100
    assert any(name.startswith("user.") for name in found.worst)
    assert any(name.startswith("user_item.") for name in found.worst)
