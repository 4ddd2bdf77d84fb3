"""Other tools read what Maple writes: DuckDB and polars count as Maple does, documented queries run as written, columns are as told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from shop import ITEMS, Happening, online, snapshot, table

from maple.artifacts import Place
from maple.data.ingest import append_local, ingest_local
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.features.build import FeatureArtifact, build_local
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.hashing import rng
from maple.models.base import FitContext
from maple.models.content.items import ContentSettings, content_vectors
from maple.schema import EVENTS
from maple.schema import ITEMS as ITEMS_SCHEMA

PAGE = Path(__file__).parents[2] / "docs" / "data-layout.md"


def log(count: int = 400, seed: int = 3) -> list[Happening]:
    draw = rng(seed, "layout")
    kinds, names = ["view", "purchase", "return", "rating"], ITEMS["item_id"].to_pylist()
    users, items, events, times = (draw.integers(bound, size=count).tolist() for bound in (40, 5, 4, 60))
    return [Happening(f"u{u}", names[i], kinds[e], t * DAY // 2, 2.0, 3.0) for u, i, e, t in zip(users, items, events, times, strict=True)]


def appended(tmp_path: Path) -> Snapshot:
    """A snapshot in two layers: some of what was bought in the first comes back in the second."""
    folder = tmp_path / "shop"
    folder.mkdir()
    old, late = log(120), log(30, seed=4)
    back = [one for one in old if one.event == "purchase"][:10]  # some of it comes back, one or both of two
    late += [Happening(one.user, one.item, "return", one.at + DAY, 1.0 + place % 2, 3.0) for place, one in enumerate(back)]
    events = table(online(old))
    pq.write_table(events, folder / "events-1.parquet")
    pq.write_table(ITEMS, folder / "items.parquet")
    columns = {name: name for name in ("event_id", "user_id", "item_id", "event", "timestamp", "value", "price")}
    plain = {
        "name": "tiny", "events": {"path": "events-*.parquet", "columns": columns, "rules": []},
        "items": {"path": "items.parquet", "columns": {name: name for name in ITEMS.column_names}},
        "returns": "net", "checks": {"min_events": 1, "min_users": 1, "min_items": 1},
    }  # fmt: skip
    config, home = SourceConfig.parse(plain, "tiny"), Place.at(tmp_path / "home")
    ingest_local(config, Place.at(folder), home, rows_per_bucket=50)
    fresh = [Happening(h.user, h.item, h.event, h.at, h.value, h.price, f"new{place}") for place, h in enumerate(late)]
    pq.write_table(table([one.stored(0) for one in fresh]), folder / "events-2.parquet")
    return append_local(config, Place.at(folder), home)


@pytest.fixture(scope="module")
def shop_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a snapshot of several buckets, and features with content."""
    folder = tmp_path_factory.mktemp("layout")
    snap = snapshot(folder, log(), rows_per_bucket=50)
    content = content_vectors(snap.items(), {"text": ContentSettings(dim=3)}, FitContext(), lambda line: None)
    refs = {name: {"dim": one.dim, "digest": one.digest} for name, one in content.items()}
    build_local(snap, FeatureSpec().with_(content=refs), Place.at(folder / "home"), content)
    return folder / "home"


@pytest.fixture(scope="module")
def layered_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose latest snapshot is a small append that changes and removes earlier rows, and features over it."""
    folder = tmp_path_factory.mktemp("layers")
    build_local(appended(folder), FeatureSpec(), Place.at(folder / "home"))
    return folder / "home"


@pytest.fixture(params=["shop_home", "layered_home"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Each of the homes as the current folder."""
    home: Path = request.getfixturevalue(request.param)
    monkeypatch.chdir(home)
    return Place.at(home)


@pytest.fixture
def inside(shop_home: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The home as the current folder, as the queries of the page want it."""
    monkeypatch.chdir(shop_home)
    return Place.at(shop_home)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def counts(events: pa.Table) -> dict[str, tuple[int, int, int]]:
    """Events, users and items per kind, counted row by row."""
    out: dict[str, tuple[int, set[str], set[str]]] = {}
    for row in events.to_pylist():
        number, users, items = out.get(row["event"], (0, set(), set()))
        out[row["event"]] = (number + 1, users | {row["user_id"]}, items | {row["item_id"]})
    return {kind: (number, len(users), len(items)) for kind, (number, users, items) in out.items()}


def test_the_documented_queries_run_as_written_and_count_as_maple_does(either: Place) -> None:
    connection = duckdb.connect()
    (text,) = blocks("sql")
    answers = [answer.pl().rows() for answer in map(connection.sql, text.split(";")[:-1]) if answer is not None]
    snap = Snapshot.open(either)
    events = snap.events()
    kinds, revenue, buckets, features = answers[-4:]  # what SET answers differs between versions
    assert {kind: tuple(rest) for kind, *rest in kinds} == counts(events)
    bought = events.filter(pc.equal(events["event"], "purchase"))
    assert sum(row[2] for row in revenue) == pytest.approx(pc.sum(pc.multiply(bought["value"], bought["price"])).as_py())
    base = snap if snap.parent is None else Snapshot.open(either, snap.parent)
    assert [int(row[0]) for row in buckets] == [number for number in range(base.num_buckets) if base.bucket(number) is not None]
    assert [row[1] for row in buckets] == [rows for n in range(base.num_buckets) if (rows := base.events([n]).num_rows)]
    made = FeatureArtifact.open(either).user_events()
    assert len(features) == made.num_rows == bought.num_rows
    asked = made.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("item_id", "ascending")])
    assert [row[3] for row in features] == pytest.approx(asked["user.activity.purchase_30d"].to_pylist())


def test_the_documented_python_runs_as_written(either: Place) -> None:
    (text,) = blocks("python")
    found: dict[str, Any] = {}
    exec(compile(text, "data-layout.md", "exec"), found)
    assert found["by_kind"].rows() == found["same"].fetchall()
    assert found["by_kind"]["events"].sum() == Snapshot.open(either).num_events


def test_polars_sees_the_same_rows_in_the_same_types(inside: Place) -> None:
    snap, made = Snapshot.open(inside), FeatureArtifact.open(inside)
    events = pl.read_parquet(snap.folder.path + "/events/*/*.parquet", hive_partitioning=True)
    assert events.drop("bucket").equals(pl.DataFrame(pl.from_arrow(snap.events())))
    assert events["bucket"].n_unique() > 4
    assert events.group_by("user_id").agg(pl.col("bucket").n_unique())["bucket"].max() == 1
    rows = pl.read_parquet(made.folder.path + "/user_events/*/*.parquet", hive_partitioning=False)
    assert rows.equals(pl.DataFrame(pl.from_arrow(made.user_events())), null_equal=True)
    items = pl.read_ipc(made.folder.path + "/items.arrow")
    assert items["item_id"].to_list() == made.catalogue().items.ids.to_pylist()
    ticks = pl.concat([pl.read_ipc(path) for path in sorted(Path(made.folder.path).glob("item_ticks/*/*.arrow"))])
    assert len(ticks) == len(made.timeline().ticks)


def test_the_columns_are_as_the_page_says(inside: Place) -> None:
    told = re.findall(r"^\| `(\w+)` \| ([^|]+?) \| [^|]+ \|$", PAGE.read_text(), re.MULTILINE)
    wanted = [(field.name, _written(field.type)) for schema in (EVENTS, ITEMS_SCHEMA) for field in schema]
    assert told == wanted
    snap = Snapshot.open(inside)
    assert [(field.name, _written(field.type)) for field in snap.events().schema][: len(EVENTS)] == wanted[: len(EVENTS)]
    assert [(field.name, _written(field.type)) for field in snap.items().schema][: len(ITEMS_SCHEMA)] == wanted[len(EVENTS) :]


def test_every_file_is_on_the_page(either: Place) -> None:
    page = PAGE.read_text()
    for path in sorted(Path(either.path).rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            name = re.sub(r"=\d+", "=NNNNN", str(path.relative_to(either.path)).split("/", 2)[-1])
            name = re.sub(r"^content/\w+", "content/<name>", name)
            assert name.rsplit("/", 1)[-1] in page, path
            assert name in page or name.startswith("latest"), path


def _written(kind: pa.DataType) -> str:
    return "timestamp[us, UTC]" if pa.types.is_timestamp(kind) else str(kind)


def test_a_small_append_is_packed_and_changes_what_came_before(layered_home: Path) -> None:
    top = Snapshot.open(Place.at(layered_home))
    assert top.parent is not None
    assert {"events/packed.parquet", "void/packed.parquet", "index/packed.arrow"} <= set(top.manifest.files)
    void = pl.read_parquet(top.folder.path + "/void/packed.parquet")
    assert void["reason"].null_count() > 0, "the second batch changed nothing of the first: the rule was not tried"
    assert Snapshot.open(Place.at(layered_home), top.parent).num_events + 40 > top.num_events
