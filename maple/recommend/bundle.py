"""A release: retrievers, ranker, settings, catalogue, feature spec and popularity, immutable and identified by its content.

On disk ``bundles/<digest>/`` holds ``pipeline.yaml``, ``items.arrow``, ``space.safetensors``, ``features.safetensors``,
``extras.safetensors``, ``content/<name>.safetensors``, ``models/<source>.safetensors``, ``ranker.safetensors`` and, written last,
``manifest.json``. Loading checks every digest, builds models only from the catalogue's classes, and asks canary queries whose
answers were stored: a bundle that answers differently on this machine is refused. Arrays are memory-mapped where the files are local.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

import maple
from maple.artifacts import (
    MANIFEST,
    FileEntry,
    Manifest,
    Place,
    arrow_bytes,
    manifest_of,
    open_manifest,
    read_file,
    seal,
    tensor_bytes,
    write_file,
)
from maple.data.dataset import Dataset, Float32, Int32, Vocab
from maple.errors import ArtifactError, ConfigError, MapleError, ServeError
from maple.features.catalogue import Catalogue
from maple.features.content import ItemContent
from maple.features.extras import NO_EXTRAS, Extras
from maple.features.folder import Folder, Rows
from maple.features.spec import FeatureSpec
from maple.features.states import ItemColumnsReader, UserState
from maple.features.ticks import StoredItems
from maple.hashing import sha256
from maple.index import tie_ranks
from maple.models.base import Array, Ranker, Retriever, Space, State
from maple.models.catalog import model_class, ranker_class
from maple.recommend.build import Parts, pipeline_of, popular_items
from maple.recommend.engine import Observer, Pipeline, Query, Slates
from maple.recommend.explain import Reason, reason
from maple.recommend.rankers import FeatureHydrator, StateFeatures
from maple.recommend.settings import PipelineSettings
from maple.schema import event_codes

KIND = "bundle"
CANARY_TOLERANCE = 1e-3  # relative, of scores: what other processors and thread counts may differ by


class UnknownItem(ServeError):
    """An item that this bundle does not know."""


@dataclass(frozen=True)
class Recommendation:
    """One item of an answer, in ids and words."""

    item_id: str
    title: str | None
    score: float
    source: str | None
    reason: Reason


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """The feature spec, the item features at the last closed tick, float32[I] per name, and what the columns beside the folds need."""

    spec: FeatureSpec
    columns: Mapping[str, Float32]
    extras: Extras = NO_EXTRAS


@dataclass(frozen=True)
class Canary:
    """A stored question and its answer; ids, so that it reads without the bundle."""

    history: tuple[tuple[str, str, int], ...]  # item id, event, microseconds
    now: int
    k: int
    items: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()

    def plain(self) -> dict[str, Any]:
        history = [list(event) for event in self.history]
        return {"history": history, "now": self.now, "k": self.k, "items": list(self.items), "scores": list(self.scores)}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Canary:
        history = tuple((str(item), str(event), int(at)) for item, event, at in plain["history"])
        scores = tuple(float(score) for score in plain["scores"])
        return Canary(history, int(plain["now"]), int(plain["k"]), tuple(map(str, plain["items"])), scores)


@dataclass(frozen=True)
class About:
    """Where a bundle comes from: digest of the data, metrics of its evaluation, versions of what made it."""

    data: str
    metrics: Mapping[str, float]
    versions: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A complete recommender. ``digest`` is None until it is saved."""

    parts: Parts
    about: About
    features: ItemFeatures | None = None
    canaries: tuple[Canary, ...] = ()
    digest: str | None = None

    # -- making and keeping --------------------------------------------------------------------------------------------

    @staticmethod
    def assemble(
        settings: PipelineSettings,
        data: Dataset,
        sources: Mapping[str, Retriever],
        *,
        fingerprint: str,
        ranker: Ranker | None = None,
        ranker_columns: Sequence[str] = (),
        features: ItemFeatures | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Bundle:
        """A bundle in memory, from models fitted on ``data``. ``fingerprint``: the digest of the snapshot behind ``data``.

        The models' own settings replace those in ``settings``, so that the stored page says what was really fitted.
        """
        if features is not None and features.spec.history_limit != settings.history_limit:
            raise ConfigError(
                f"history_limit is {settings.history_limit} in the pipeline settings and {features.spec.history_limit} in the features; "
                "a user must be the same events for models and features, so write the same number in both"
            )
        page = settings.plain()
        for source in page["sources"]:
            if source["name"] in sources:
                source["config"] = sources[source["name"]].config.plain()
        if ranker is None:
            page["ranker"] = None
        elif page["ranker"] is not None:
            page["ranker"]["config"] = ranker.config.plain()
        settings = PipelineSettings.parse(page, "pipeline settings")
        popular = popular_items(data, settings.fallback_days, tie_ranks(data.items.ids.to_pylist()))
        parts = Parts(settings, Space.of(data), dict(sources), popular, ranker, tuple(ranker_columns))
        versions = {"maple": maple.__version__, "python": platform.python_version(), "numpy": np.__version__}
        about = About(fingerprint, dict(metrics or {}), versions)
        return Bundle(parts, about, features, _questions(data, popular))

    def save(self, home: Place) -> str:
        """Publish under ``home/bundles/<digest>``; returns the digest. Saving the same content again changes nothing."""
        answered = replace(self, canaries=tuple(self._answer(canary) for canary in self.canaries))
        files = answered._files()
        meta = answered._meta()
        entries = {name: FileEntry(name, sha256(data), len(data)) for name, data in files.items()}
        digest = manifest_of(KIND, meta, entries).digest
        folder = home / "bundles" / digest
        if (folder / MANIFEST).exists():
            with contextlib.suppress(ArtifactError):  # a damaged one is written anew
                _verified(folder, digest)
                return digest
        written = [write_file(folder, name, data) for name, data in files.items()]
        assert seal(folder, KIND, meta, written).digest == digest, "what was written is not what was announced"
        return digest

    def _files(self) -> dict[str, bytes]:
        parts = self.parts
        files = {
            "pipeline.yaml": yaml.safe_dump(parts.settings.plain(), sort_keys=False, allow_unicode=True).encode(),
            "items.arrow": arrow_bytes(parts.space.item_table),
            "space.safetensors": tensor_bytes({"signals": parts.space.signals, "popular": parts.popular}),
        }
        for name, model in parts.sources.items():
            files[f"models/{name}.safetensors"] = tensor_bytes(model.state())
        if parts.ranker is not None:
            files["ranker.safetensors"] = tensor_bytes(parts.ranker.state())
        if self.features is not None:
            files["features.safetensors"] = tensor_bytes(self.features.columns)
            files["extras.safetensors"] = tensor_bytes(self.features.extras.tensors())
            files |= {f"content/{name}.safetensors": content.to_bytes() for name, content in self.features.extras.content.items()}
        return files

    def _meta(self) -> dict[str, Any]:
        parts = self.parts
        return {
            "data": self.about.data,
            "metrics": {name: float(value) for name, value in sorted(self.about.metrics.items())},
            "versions": dict(self.about.versions),
            "needs": {name: sorted(need.value for need in model.needs) for name, model in parts.sources.items()},
            "feature_spec": None if self.features is None else self.features.spec.plain(),
            "feature_extras": None if self.features is None else self.features.extras.plain(),
            "ranker_columns": list(parts.ranker_columns),
            "canaries": [canary.plain() for canary in self.canaries],
        }

    # -- what it does --------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> PipelineSettings:
        return self.parts.settings

    @property
    def space(self) -> Space:
        return self.parts.space

    @cached_property
    def hydrator(self) -> FeatureHydrator | None:
        """The feature side of serving: user states in the queries, item features of this bundle."""
        if self.features is None:
            return None
        return StateFeatures(self.features.spec, self.catalogue, self.item_reader, self.extras)

    @cached_property
    def extras(self) -> Extras:
        """What the columns beside the folds are made from."""
        return NO_EXTRAS if self.features is None else self.features.extras

    @cached_property
    def item_reader(self) -> ItemColumnsReader:
        """The item features of this bundle by item code."""
        return StoredItems({} if self.features is None else self.features.columns)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items as features see them; online states are folded under ``features.spec.state_digest(catalogue)``."""
        return Catalogue.from_table(self.space.items, self.space.item_table)

    @cached_property
    def folder(self) -> Folder | None:
        """What folds events into the user states that this bundle's features read."""
        return None if self.features is None else Folder(self.features.spec, self.catalogue)

    def pipeline(self, *, observer: Observer | None = None) -> Pipeline:
        """The pipeline that serves this bundle."""
        return pipeline_of(self.parts, features=self.hydrator, observer=observer)

    def query(
        self,
        user: str,
        *,
        now: int,
        k: int = 10,
        history: Sequence[tuple[str, str, int]] = (),
        state: UserState | None = None,
        exclude: Sequence[str] = (),
        filters: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        request_id: str = "",
    ) -> Query:
        """A request in this bundle's codes. ``history``: (item id, event name, microseconds), any order; the last ``history_limit`` count.

        ``state``: the user's folded features; without one they are folded from ``history``. Unknown items and filter values are no
        error; a filter on a column that the items do not have is a ``ServeError``.
        """
        if filters:
            self.parts.item_columns.mask(filters)
        events = sorted(history, key=lambda event: event[2])[-self.settings.history_limit :]
        if state is None and events and self.folder is not None:
            state = _folded(self.folder, user, events)
        return Query(
            user,
            self.space.items.encode([item for item, _, _ in events]),
            event_codes(name for _, name, _ in events),
            np.array([at for _, _, at in events], dtype=np.int64),
            now, k, state,
            attributes=dict(attributes or {}),
            context=dict(context or {}),
            exclude=self.space.items.encode(list(exclude)),
            filters=dict(filters or {}),
            request_id=request_id,
        )  # fmt: skip

    def decode(self, slates: Slates) -> list[list[Recommendation]]:
        """Answers in ids and words, one list per query."""
        because = slates.columns.get("reason.item", np.empty(0, np.int32))
        codes = np.unique(np.concatenate([slates.items, because[because >= 0]]))
        ids, titles = self.space.items.decode(codes), self.titles(codes)
        names = {code: (item_id, title) for code, item_id, title in zip(codes.tolist(), ids, titles, strict=True)}
        answers: list[list[Recommendation]] = []
        for start, stop in zip(slates.offsets[:-1].tolist(), slates.offsets[1:].tolist(), strict=True):
            answer = []
            for at in range(start, stop):
                item_id, title = names[int(slates.items[at])]
                why = reason(slates, at, names, self._days, self.new_categories)
                answer.append(Recommendation(item_id, title, float(slates.scores[at]), why.source, why))
            answers.append(answer)
        return answers

    def similar(self, item_id: str, k: int) -> list[tuple[str, float]]:
        """The k available items most like one: (item id, score), by the first source that knows any.

        ``UnknownItem`` if the item is not in the catalogue.
        """
        code = self.space.items.encode([item_id])
        if code[0] < 0:
            raise UnknownItem("this bundle does not know the item; it may be newer than the bundle, or the id is misspelt")
        allowed = self.parts.restrictions.available
        for source in self.parts.retrievers():
            items, scores = source.model.similar(code, min(4 * k + 20, len(allowed)))
            keep = (items[0] >= 0) & allowed[items[0]]
            if keep.any():
                found = items[0][keep][:k]
                return list(zip(self.space.items.decode(found), scores[0][keep][:k].astype(float).tolist(), strict=True))
        return []

    def titles(self, codes: Array) -> list[str | None]:
        """The titles of item codes, None where the catalogue has none."""
        if self._titles is None:
            return [None] * len(codes)
        return [None if text is None else str(text) for text in self._titles.take(pa.array(codes)).to_pylist()]

    def title(self, code: int) -> str | None:
        """The title of an item code, None where the catalogue has none."""
        return self.titles(np.array([code]))[0]

    @property
    def new_categories(self) -> Mapping[int, str]:
        """The category of each item that is newer than this bundle, by item code; a live catalogue has some."""
        return {}

    @cached_property
    def _titles(self) -> pa.StringArray | None:
        table = self.space.item_table
        if "title" not in table.column_names:
            return None
        column = table["title"]
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    @cached_property
    def _days(self) -> float:
        """The popularity window that reasons speak of: of the popularity source, else of the fallback."""
        for source in self.settings.sources:
            if source.model == "popularity" and source.config.get("window_days"):
                return float(source.config["window_days"])
        return self.settings.fallback_days

    # -- the canary ----------------------------------------------------------------------------------------------------

    def _answer(self, canary: Canary) -> Canary:
        query = self.query("canary", now=canary.now, k=canary.k, history=canary.history)
        slates = self.pipeline().run([query], explain=True)
        return replace(canary, items=tuple(self.space.items.decode(slates.items)), scores=tuple(float(score) for score in slates.scores))

    def check_canaries(self) -> None:
        """``ArtifactError`` if a stored question is answered differently now."""
        for place, canary in enumerate(self.canaries):
            try:
                got = self._answer(canary)
            except Exception as error:
                raise ArtifactError(f"bundle {self._label}: canary query {place} failed with {type(error).__name__}: {error}") from error
            if not _same_answer(canary, got):
                raise ArtifactError(
                    f"bundle {self._label}: canary query {place} is answered differently here than where the bundle was made "
                    f"(stored {', '.join(canary.items[:3])} ..., now {', '.join(got.items[:3])} ...). "
                    "Publish the bundle again with this version of Maple."
                )

    @property
    def _label(self) -> str:
        return (self.digest or "in memory")[:12]


def _folded(folder: Folder, user: str, events: Sequence[tuple[str, str, int]]) -> UserState:
    """The state after events in order of time, whose values and prices are not known."""
    unknown = np.full(len(events), np.nan, np.float32)
    items, names, times = zip(*events, strict=True)
    ids = [str(place) for place in range(len(events))]
    rows = Rows(np.array([0, len(events)], np.int64), ids, items, event_codes(names), np.array(times, np.int64), unknown, unknown)
    return folder.advance([folder.empty(user)], rows)[0]


def _questions(data: Dataset, popular: Int32) -> tuple[Canary, ...]:
    """Canaries without answers: a new user, and one who bought three popular items in the last days of the data."""
    end = data.span[1] + 1
    favourites = data.items.decode(popular[:3])
    history = tuple((item, "purchase", end - (place + 1) * 3_600_000_000) for place, item in enumerate(favourites))
    return Canary((), end, 10), Canary(history, end, 10)


def _same_answer(stored: Canary, got: Canary) -> bool:
    """The same scores within tolerance, and the same items but for swaps among scores that are equal within it."""
    if len(stored.items) != len(got.items):
        return False
    before, after = np.array(stored.scores), np.array(got.scores)
    close = CANARY_TOLERANCE * max(1.0, float(np.abs(before).max(initial=0.0)))
    if not (np.abs(before - after) <= close).all():
        return False
    places = {item: place for place, item in enumerate(got.items)}
    last = before[-1] if len(before) else 0.0
    for place, item in enumerate(stored.items):
        there = places.get(item)
        rival = last if there is None else before[there]
        if there != place and abs(before[place] - rival) > close:
            return False
    return True


# -- loading -----------------------------------------------------------------------------------------------------------


def load(home: Place, digest: str, *, canary: bool = True) -> Bundle:
    """The bundle of a home by digest, everything checked. ``ArtifactError`` says what is missing, altered or does not fit."""
    folder = _folder(home, digest)
    files = _verified(folder, digest)
    try:
        bundle = _build(folder, *files)
    except MapleError as error:
        raise ArtifactError(f"bundle {digest[:12]} cannot be loaded by this version of Maple: {error}") from error
    except Exception as error:
        raise ArtifactError(
            f"bundle {digest[:12]} cannot be loaded ({type(error).__name__}: {error}). Publish it again with this version of Maple."
        ) from error
    bundle = replace(bundle, digest=digest)
    if canary:
        bundle.check_canaries()
    return bundle


def cache_locally(home: Place, digest: str, cache_dir: str | Path) -> Path:
    """A local home that holds this bundle: ``home`` itself if it is local, else ``cache_dir``, filled once per node under a lock."""
    source = _folder(home, digest)
    if home.local is not None:
        return home.local
    target = _folder(Place.at(Path(cache_dir)), digest)
    with _locked(Path(cache_dir) / f"{digest}.lock"):
        if (target / MANIFEST).exists():
            with contextlib.suppress(ArtifactError):
                _verified(target, digest)
                return Path(cache_dir)
            target.delete()
        manifest = _manifest(source, digest)
        entries = [write_file(target, name, read_file(source, manifest, name)) for name in sorted(manifest.files)]
        seal(target, KIND, manifest.meta, entries)
    return Path(cache_dir)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _folder(home: Place, digest: str) -> Place:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ArtifactError(f"{digest[:80]!r} is not a bundle digest (64 hexadecimal characters)")
    return home / "bundles" / digest


def _manifest(folder: Place, digest: str) -> Manifest:
    """The manifest, byte for byte as it was written."""
    manifest = open_manifest(folder, KIND)
    if manifest.digest != digest:
        raise ArtifactError(
            f"{folder.uri} holds bundle {manifest.digest[:12]}, not {digest[:12]}: the folder was renamed. Publish it again."
        )
    if json.dumps(manifest.plain(), indent=1, sort_keys=True).encode() != (folder / MANIFEST).read():
        raise ArtifactError(f"{folder.uri}/{MANIFEST} was altered: it is not as Maple wrote it. Publish the bundle again.")
    return manifest


def _verified(folder: Place, digest: str) -> tuple[Manifest, dict[str, memoryview]]:
    """The manifest and the bytes of every file, each checked against its SHA-256; memory-mapped copy-on-write where local."""
    manifest = _manifest(folder, digest)
    return manifest, {name: _bytes(folder, manifest, name) for name in manifest.files}


def _bytes(folder: Place, manifest: Manifest, name: str) -> memoryview:
    local = (folder / name).local
    entry = manifest.files[name]
    if local is None or entry.bytes == 0:
        return memoryview(bytearray(read_file(folder, manifest, name)))
    try:
        with open(local, "rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder.uri}/{name} cannot be read: {error}. Publish the bundle again.") from None
    view = memoryview(mapped)
    if len(view) != entry.bytes or sha256(view) != entry.sha256:
        raise ArtifactError(f"{folder.uri}/{name} was altered or is torn: its SHA-256 is not the manifest's. Publish the bundle again.")
    return view


def _build(folder: Place, manifest: Manifest, files: Mapping[str, memoryview]) -> Bundle:
    meta = manifest.meta
    page = yaml.safe_load(bytes(files["pipeline.yaml"]))
    settings = PipelineSettings.parse(page, f"{folder.uri}/pipeline.yaml")
    table = pa.ipc.open_file(pa.py_buffer(files["items.arrow"])).read_all()
    ids = table["item_id"].combine_chunks()
    arrays = tensors(files["space.safetensors"])
    space = Space(Vocab(ids.chunk(0) if isinstance(ids, pa.ChunkedArray) else ids), table, arrays["signals"])
    sources: dict[str, Retriever] = {}
    for source in settings.sources:
        kind = model_class(source.model)
        config = kind.Config.parse(source.config, f"{folder.uri}/pipeline.yaml: sources.{source.name}.config")
        try:
            sources[source.name] = kind.from_state(config, space, tensors(files[f"models/{source.name}.safetensors"]))
        except MapleError as error:
            raise ArtifactError(f"source {source.name!r}: {error}") from error
    ranker: Ranker | None = None
    if settings.ranker is not None:
        ranks = ranker_class(settings.ranker.model)
        config = ranks.Config.parse(settings.ranker.config, f"{folder.uri}/pipeline.yaml: ranker.config")
        ranker = ranks.from_state(config, tensors(files["ranker.safetensors"]))
    features = None
    if meta["feature_spec"] is not None:
        spec = FeatureSpec.parse(meta["feature_spec"], f"{folder.uri}: feature spec")
        told = meta["feature_extras"]
        content = {
            name: ItemContent.from_tensors(plain, tensors(files[f"content/{name}.safetensors"])) for name, plain in told["content"].items()
        }  # fmt: skip
        extras = Extras.from_tensors(told, tensors(files["extras.safetensors"]), len(table), content)
        features = ItemFeatures(spec, tensors(files["features.safetensors"]), extras)
    parts = Parts(settings, space, sources, arrays["popular"], ranker, tuple(meta["ranker_columns"]))
    about = About(meta["data"], meta["metrics"], meta["versions"])
    return Bundle(parts, about, features, tuple(Canary.of(plain) for plain in meta["canaries"]))


_DTYPES: Mapping[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def tensors(data: memoryview) -> State:
    """The arrays of safetensors bytes without a copy (the library's own reader for numpy copies); views live as long as ``data``.

    The format: 8 bytes little-endian length of a JSON header, the header {name: {dtype, shape, data_offsets}}, the data.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    body = data[8 + size :]
    out: dict[str, Array] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        array = np.frombuffer(body[start:stop], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        out[name] = array if array.flags.aligned else array.copy()
    return out
