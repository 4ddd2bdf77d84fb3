"""A bundle comes back as it was or not at all, and answers in ids and words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from maple.artifacts import FileEntry, Place, manifest_of, seal, tensor_bytes, write_file
from maple.config import Section
from maple.data.dataset import Dataset, Float32, Int64
from maple.errors import ArtifactError, ConfigError, ServeError
from maple.features.content import ItemContent
from maple.features.extras import Extras
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.ticks import ItemReader, ItemTimeline
from maple.hashing import sha256
from maple.models.base import Array, FitContext, Metrics, Retriever, State
from maple.models.catalog import RANKERS, model_class
from maple.recommend import bundle as bundles
from maple.recommend.build import pipeline_of
from maple.recommend.bundle import Bundle, ItemFeatures, UnknownItem, cache_locally, load, tensors
from maple.recommend.engine import Candidates, Query
from maple.recommend.rankers import LogFeatures
from maple.recommend.settings import PipelineSettings

DAY = 86_400_000_000
START = 19_000 * DAY
SPEC = FeatureSpec(history_limit=50)
PAGE = {
    "history_limit": 50,
    "sources": [{"name": "mine", "model": "frequency"}, {"name": "ease", "model": "ease"}, {"name": "popular", "model": "popularity"}],
    "ranker": {"model": "linear-for-tests"},
    "rerank": {"caps": [{"column": "category", "limit": 4}]},
}


class LinearForTests:
    """score = weights . columns, missing = 0. The smallest thing that fulfils ``Ranker``."""

    class Config(Section):
        scale: float = 1.0

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.names: list[str] = []
        self.weights: Array = np.empty(0, np.float32)

    def fit(self, columns: Mapping[str, Array], labels: Float32, groups: Int64, ctx: FitContext) -> Metrics:
        self.names = sorted(columns)
        self.weights = np.random.default_rng(ctx.seed).normal(size=len(self.names)).astype(np.float32)
        return {}

    def score(self, columns: Mapping[str, Array]) -> Float32:
        table = np.stack([np.nan_to_num(columns[name].astype(np.float32)) for name in self.names], axis=1)
        return np.asarray(table @ self.weights * self.config.scale, dtype=np.float32)[:, None]

    def state(self) -> State:
        return {"weights": self.weights, "names": np.frombuffer(json.dumps(self.names).encode(), np.uint8)}

    @classmethod
    def from_state(cls, config: Config, state: State) -> LinearForTests:
        out = cls(config)
        out.weights, out.names = state["weights"], json.loads(state["names"].tobytes())
        return out


@pytest.fixture(scope="module", autouse=True)
def linear() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RANKERS, "linear-for-tests", f"{__name__}:LinearForTests")
        yield


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(5)
    users, items, events = 40, 30, 600
    times = START + np.sort(rng.integers(0, 60 * DAY, events))
    log = {
        "event_id": [f"e{n}" for n in range(events)],
        "user_id": [f"user {n}" for n in rng.integers(0, users, events)],
        "item_id": [f"item {n}" for n in (rng.random(events) ** 2 * items).astype(int)],
        "event": rng.choice(["purchase", "view"], events),
        "timestamp": pa.array(times, pa.timestamp("us", tz="UTC")),
        "value": pa.array(np.ones(events), pa.float32()),
        "price": pa.array(rng.random(events), pa.float32()),
        "device": rng.choice(["app", "web"], events),
    }
    catalogue = {
        "item_id": [f"item {n}" for n in range(items)],
        "title": [None if n == 29 else f"Tea No. {n}" for n in range(items)],
        "category": [f"category {n % 5}" for n in range(items)],
        "available": [n != 3 for n in range(items)],
        "weight": pa.array(rng.random(items), pa.float32()),
        "launched": pa.array(START - rng.integers(0, 60 * DAY, items), pa.timestamp("us", tz="UTC")),
    }
    people = {"user_id": [f"user {n}" for n in range(users)], "age": rng.integers(18, 80, users), "club": rng.random(users) < 0.5}
    return Dataset.from_tables(pa.table(log), pa.table(catalogue), pa.table(people))


@pytest.fixture(scope="module")
def extras(data: Dataset) -> Extras:
    vectors = np.random.default_rng(7).normal(size=(len(data.items), 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[4] = 0
    return Extras.fit(data, SPEC, content={"text": ItemContent(vectors, {"encoder": "by hand"}, {"seed": np.array([7])})})


@pytest.fixture(scope="module")
def made(data: Dataset, extras: Extras) -> Bundle:
    settings = PipelineSettings.parse(PAGE, "test")
    sources: dict[str, Retriever] = {}
    for source in settings.sources:
        kind = model_class(source.model)
        model = kind(kind.Config.parse(source.config, source.name))  # type: ignore[call-arg]
        model.fit(data, FitContext())
        sources[source.name] = model
    timeline = ItemTimeline.from_data(data, SPEC)
    now = data.span[1] + 1
    features = ItemFeatures(SPEC, timeline.read(int(timeline.closed(np.array([now]))[0])), extras.at(now))
    bare = Bundle.assemble(settings, data, sources, fingerprint="f" * 64, features=features, metrics={"ndcg@10": 0.25})
    pipeline = pipeline_of(bare.parts, features=bare.hydrator)
    queries = [bare.query("a", now=now, history=[("item 1", "purchase", now - DAY)])]
    candidates = pipeline.run_segment("retrieve", queries, Candidates.empty(1)).candidates
    columns = pipeline.run_segment("rank", queries, candidates).candidates.columns
    ranker = LinearForTests()
    ranker.fit(columns, np.zeros((1, 1), np.float32), np.zeros(1, np.int64), FitContext())
    return Bundle.assemble(
        settings,
        data,
        sources,
        fingerprint="f" * 64,
        ranker=ranker,
        ranker_columns=sorted(columns),
        features=features,
        metrics={"ndcg@10": 0.25},
    )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.at(tmp_path / "home")


def history(data: Dataset) -> list[tuple[str, str, int]]:
    end = data.span[1]
    return [
        ("item 1", "purchase", end - 5 * DAY),
        ("item 7", "view", end - DAY),
        ("item 1", "purchase", end),
        ("nobody knows", "view", end),
    ]


def ask(bundle: Bundle, data: Dataset, **more: object) -> Query:
    return bundle.query("someone", now=data.span[1] + 1, history=history(data), **more)  # type: ignore[arg-type]


def test_saved_and_loaded_it_answers_the_same(made: Bundle, data: Dataset, place: Place) -> None:
    digest = made.save(place)
    back = load(place, digest)
    assert back.digest == digest
    assert back.about == made.about
    assert back.settings.plain() == made.settings.plain()
    for more in ({}, {"k": 3}, {"filters": {"category": ["category 1", "category 2"]}}, {"exclude": ["item 1"]}):
        before, after = (one.pipeline().run([ask(one, data, **more)], explain=True) for one in (made, back))
        assert before.items.tolist() == after.items.tolist()
        assert before.scores.tolist() == after.scores.tolist()
        assert made.decode(before) == back.decode(after)
        assert len(after.items) > 0


def test_the_same_content_has_the_same_digest_and_saving_again_changes_nothing(made: Bundle, place: Place) -> None:
    digest = made.save(place)
    written = {path: path.stat().st_mtime_ns for path in Path(place.path).rglob("*") if path.is_file()}
    assert load(place, digest).save(place) == digest
    assert {path: path.stat().st_mtime_ns for path in Path(place.path).rglob("*") if path.is_file()} == written


def test_no_bit_may_flip(made: Bundle, place: Place) -> None:
    digest = made.save(place)
    folder = Path(place.path) / "bundles" / digest
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in files} == {
        "manifest.json", "pipeline.yaml", "items.arrow", "space.safetensors", "features.safetensors", "ranker.safetensors",
        "extras.safetensors", "text.safetensors",
        "mine.safetensors", "ease.safetensors", "popular.safetensors",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for path in files:
        good = path.read_bytes()
        for _ in range(40):
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            with pytest.raises(ArtifactError):
                load(place, digest, canary=False)
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(ArtifactError):
            load(place, digest, canary=False)
        path.unlink()
        with pytest.raises(ArtifactError):
            load(place, digest, canary=False)
        path.write_bytes(good)
    load(place, digest)
    assert made.save(place) == digest


def test_a_damaged_bundle_is_mended_by_saving_it_again(made: Bundle, place: Place) -> None:
    digest = made.save(place)
    target = Path(place.path) / "bundles" / digest / "items.arrow"
    target.write_bytes(b"gone")
    assert made.save(place) == digest
    load(place, digest)


def test_missing_and_misnamed_bundles(made: Bundle, place: Place) -> None:
    digest = made.save(place)
    with pytest.raises(ArtifactError, match="no manifest"):
        load(place, "0" * 64)
    with pytest.raises(ArtifactError, match="not a bundle digest"):
        load(place, "../../etc")
    folder = Path(place.path) / "bundles"
    shutil.copytree(folder / digest, folder / ("1" * 64))
    with pytest.raises(ArtifactError, match="renamed"):
        load(place, "1" * 64)


def forge(place: Place, digest: str, change: Mapping[str, bytes], meta: Mapping[str, object] | None = None) -> str:
    """A bundle with some files replaced and every digest in order, as someone with write access could make it."""
    folder = Path(place.path) / "bundles" / digest
    manifest = json.loads((folder / "manifest.json").read_bytes())
    content = {name: change.get(name, (folder / name).read_bytes()) for name in manifest["files"]} | dict(change)
    meta = {**manifest["meta"], **(meta or {})}
    entries = {name: FileEntry(name, sha256(data), len(data)) for name, data in content.items()}
    made = manifest_of("bundle", meta, entries).digest
    written = [write_file(place / "bundles" / made, name, data) for name, data in content.items()]
    return seal(place / "bundles" / made, "bundle", meta, written).digest


def test_the_canary_sees_what_digests_cannot(made: Bundle, place: Place) -> None:
    digest = made.save(place)
    assert made.parts.ranker is not None
    weights = made.parts.ranker.state()
    other = forge(place, digest, {"ranker.safetensors": tensor_bytes({**weights, "weights": -weights["weights"]})})
    load(place, other, canary=False)
    with pytest.raises(ArtifactError, match="answered differently"):
        load(place, other)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("pipeline.yaml", b"sources: [{name: a, model: os.system}]", "unknown model 'os.system'"),
        ("pipeline.yaml", b"!!python/object/apply:os.system [touch /tmp/owned]", "cannot be loaded"),
        ("pipeline.yaml", b"sources: [{name: ../../x, model: ease}]", "sources.0.name"),
        ("models/ease.safetensors", b"\xff" * 64, "cannot be loaded"),
        ("models/ease.safetensors", tensor_bytes({"something": np.ones(3)}), "source 'ease'.*no array"),
        ("items.arrow", b"not arrow", "cannot be loaded"),
    ],
)
def test_hostile_content_with_good_digests(made: Bundle, place: Place, name: str, content: bytes, complaint: str) -> None:
    digest = made.save(place)
    with pytest.raises(ArtifactError, match=complaint):
        load(place, forge(place, digest, {name: content}))
    assert not os.path.exists("/tmp/owned")


def test_a_ranker_that_needs_other_columns_is_refused_before_any_request(made: Bundle, place: Place) -> None:
    digest = forge(place, made.save(place), {}, {"ranker_columns": [*made.parts.ranker_columns, "user.shoe_size"]})
    with pytest.raises(ArtifactError, match=r"user\.shoe_size"):
        load(place, digest)


def test_history_limit_is_one_number(made: Bundle, data: Dataset) -> None:
    assert made.features is not None
    features = replace(made.features, spec=FeatureSpec(history_limit=20))
    with pytest.raises(ConfigError, match=r"history_limit is 50 .* and 20"):
        Bundle.assemble(made.settings, data, made.parts.sources, fingerprint="x", features=features)


def test_answers_in_words(made: Bundle, data: Dataset) -> None:
    slates = made.pipeline().run([ask(made, data), made.query("new", now=data.span[1] + 1)], explain=True)
    warm, cold = made.decode(slates)
    assert slates.cold.tolist() == [False, True]
    assert len(warm) == len(cold) == 10
    assert "item 3" not in {one.item_id for one in (*warm, *cold)}
    again = [one for one in warm if one.item_id == "item 1"]
    assert all(one.reason.text == "you buy this often" and one.title == "Tea No. 1" for one in again)
    assert {one.reason.kind for one in cold} == {"popular"}
    assert any(one.reason.kind == "because" and one.reason.item_id in ("item 1", "item 7") for one in warm)


def test_cold_users_get_popularity_in_its_own_order(made: Bundle, data: Dataset) -> None:
    uncapped = replace(made.parts, settings=made.settings.with_(rerank={}))
    slates = pipeline_of(uncapped, features=made.hydrator).run([made.query("new", now=data.span[1] + 1)])
    allowed = uncapped.restrictions.available
    assert slates.items.tolist() == [code for code in made.parts.popular.tolist() if allowed[code]][:10]


def test_similar_items(made: Bundle) -> None:
    found = made.similar("item 1", 5)
    assert len(found) == 5
    assert "item 1" not in dict(found)
    assert "item 3" not in dict(found)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    with pytest.raises(UnknownItem):
        made.similar("item 999", 5)


def test_queries_in_the_bundles_codes(made: Bundle, data: Dataset) -> None:
    end = data.span[1]
    many = [(f"item {n % 30}", "view", end - n) for n in range(80)]
    asked = made.query("u", now=end + 1, history=many, exclude=["item 2", "what?"], request_id="r")
    assert len(asked.items) == 50
    assert asked.times.tolist() == sorted(asked.times.tolist())
    assert asked.times[-1] == end
    assert asked.exclude.tolist()[1] == -1
    assert asked.state is not None
    assert asked.state.size == 50
    with pytest.raises(ServeError, match="Did you mean 'category'"):
        made.query("u", now=end, filters={"categroy": ["x"]})


def test_served_features_are_the_logs_features(made: Bundle, data: Dataset, extras: Extras, place: Place) -> None:
    """The same users through the log and through folded states of the stored bundle: the whole pipeline answers alike."""
    now = data.span[1] + 1
    made = load(place, made.save(place))
    hydrator = LogFeatures(LogReader(data, SPEC), ItemReader(ItemTimeline.from_data(data, SPEC)), extras)
    logged = pipeline_of(made.parts, features=hydrator)
    users = np.arange(12, dtype=np.int32)
    histories = data.histories(users, np.full(12, now), 50)
    queries = []
    for row, user in enumerate(data.users.decode(users)):
        part = slice(histories.offsets[row], histories.offsets[row + 1])
        ids = data.items.decode(histories.items[part])
        names = ["view" if code == 0 else "purchase" for code in histories.events[part]]
        history = list(zip(ids, names, histories.times[part].tolist(), strict=True))
        query = made.query(user, now=now, history=history, context={"device": ["web", "app", "tv"][row % 3], "page": 1})
        queries.append(replace(query, attributes={"age": 20 + row, "club": row % 2 == 0}))
    served, offline = made.pipeline().run(queries), logged.run(queries)
    # Prices and quantities are not part of a request's history, so only the features that need none of them are compared.
    assert served.offsets.tolist() == offline.offsets.tolist()
    assert set(extras.names) < set(made.parts.ranker_columns)
    free = [name for name in made.parts.ranker_columns if "spend" not in name and "price" not in name and "basket" not in name]
    a, b = (one.run_segment("retrieve", queries, Candidates.empty(12)).candidates for one in (made.pipeline(), logged))
    assert a.items.tolist() == b.items.tolist()
    assert made.hydrator is not None
    mine = made.hydrator.columns(queries, a.offsets, a.items)
    logs = hydrator.columns(queries, a.offsets, a.items)
    assert set(mine) == set(logs) == set(made.hydrator.names) == set(hydrator.names) == {*SPEC.columns, *extras.names}
    assert {"context.device", "user.attribute.age", "user.attribute.club", "user_item.together.count", "user_item.content.text",
            "item.attribute.category", "item.attribute.weight", "item.attribute.launched", "item.content.text.3"} < set(mine)  # fmt: skip
    for name in extras.names:
        assert len(np.unique(mine[name][~np.isnan(mine[name])])) > 1, f"{name} says something"
    for name in free:
        if name in mine:
            np.testing.assert_allclose(mine[name], logs[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_node_cache_is_filled_once_and_mended(made: Bundle, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = made.save(place)
    assert cache_locally(place, digest, tmp_path / "cache") == place.local
    monkeypatch.setattr(Place, "local", property(lambda self: None if "/home" in self.path else Path(self.path)))
    copied: list[str] = []
    write = bundles.write_file
    monkeypatch.setattr(bundles, "write_file", lambda folder, name, data: (copied.append(name), write(folder, name, data))[1])
    cache = cache_locally(place, digest, tmp_path / "cache")
    assert load(Place.at(cache), digest).digest == digest
    assert len(copied) == 10
    cache_locally(place, digest, tmp_path / "cache")
    assert len(copied) == 10
    (cache / "bundles" / digest / "items.arrow").write_bytes(b"torn")
    cache_locally(place, digest, tmp_path / "cache")
    assert len(copied) == 20
    load(Place.at(cache), digest)
    load(place, digest)  # without a local path: read, not mapped


def test_mapped_tensors_are_what_the_library_writes() -> None:
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3), "i": np.array([-1], np.int8), "b": np.array([True, False]),
        "empty": np.empty((0, 4), np.float64), "scalar": np.array(3, np.int64), "h": np.array([1.5], np.float16),
    }  # fmt: skip
    got = tensors(memoryview(bytearray(tensor_bytes(arrays))))
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)
        got[name].setflags(write=True)  # copy-on-write memory: models may write
