"""The offline feature build, piece by piece: what one bucket gives, how the pieces become an artifact, and the artifact itself.

Per bucket of users: point-in-time user and user-item features of every target event, and what its users do to items, split into
shards of items. Then one task per shard folds its items from the pieces of all buckets, and the manifest comes last. Every task needs
memory for one bucket or one shard, whatever their number. ``build_ray`` maps these functions over a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maple.artifacts import (
    FileEntry,
    Manifest,
    Place,
    arrow_bytes,
    latest,
    open_manifest,
    point,
    read_file,
    scratch,
    seal,
    tensors_of,
    write_file,
)
from maple.data.dataset import Dataset, Int64, Vocab, align
from maple.data.shuffle import gather, scatter
from maple.data.snapshot import Snapshot
from maple.errors import ArtifactError, unknown_name
from maple.features.catalogue import Catalogue
from maple.features.content import NO_CONTENT, ItemContent
from maple.features.log_reader import LogReader
from maple.features.page import listing, markdown
from maple.features.spec import FeatureSpec
from maple.features.ticks import PARTIALS, ItemTimeline, partials
from maple.hashing import mix64, stable_hash
from maple.schema import EVENT_TYPES, TIMESTAMP

KIND = "features"
ITEMS_FILE, PAGE_FILE = "items.arrow", "features.md"
BETWEEN = "partials"  # the folder of what lies between the two phases; gone when the features are finished
SHARD = "_shard"
#: What the features take of an event. Rows of a bucket are in the order of (timestamp, event_id), so the id itself is not needed.
EVENT_COLUMNS = ("user_id", "item_id", "event", "timestamp", "value", "price")
KEYS = ["user_id", "timestamp", "item_id", "event"]  # of a feature row
Progress = Callable[[str], None]


def rows_file(bucket: int) -> str:
    """Where the feature rows of a bucket's target events lie."""
    return f"user_events/bucket={bucket:05d}/part.parquet"


def partials_file(bucket: int) -> str:
    """Where what a bucket's users do to the items lies: an Arrow file with one record batch per shard."""
    return f"{BETWEEN}/bucket={bucket:05d}.arrow"


def ticks_file(shard: int) -> str:
    """Where the timeline of a shard's items lies."""
    return f"item_ticks/shard={shard:05d}/part.arrow"


def content_file(name: str) -> str:
    """Where the item vectors of a content feature lie, with the state of the encoder that made them."""
    return f"content/{name}.safetensors"


@dataclass(frozen=True)
class Plan:
    """What every task needs: the snapshot, its item table, the spec, and the folder to write to."""

    snapshot: Snapshot
    items: pa.Table
    spec: FeatureSpec
    folder: Place

    @property
    def num_shards(self) -> int:
        """Parts that the items are hashed into: as many as buckets, so that a shard has the events of a bucket on average."""
        return self.snapshot.num_buckets


@dataclass(frozen=True)
class Made:
    """What one task hands back: the files that it made, and the items it met that the item table lacks."""

    files: tuple[FileEntry, ...] = ()
    items: tuple[str, ...] = ()


def target_rows(data: Dataset, spec: FeatureSpec, catalogue: Catalogue) -> pa.Table:
    """One row per target event, by (user, time): its keys, and the user and user-item features as they were strictly before it."""
    log = data.log
    rows = np.flatnonzero(np.isin(log.event, data.targets))
    user, time = log.user[rows], log.time[rows]
    starts = np.flatnonzero(np.r_[True, (user[1:] != user[:-1]) | (time[1:] != time[:-1])]) if len(rows) else rows
    offsets = np.append(starts, len(rows)).astype(np.int64)
    reader = LogReader(data, spec, catalogue)
    own, paired = reader.columns(user[starts], time[starts], offsets, log.item[rows])
    query = np.repeat(np.arange(len(starts)), np.diff(offsets))
    columns = {name: column[query] for name, column in own.items()} | paired
    keys = {
        "user_id": data.users.ids.take(pa.array(user)),
        "timestamp": pa.array(time).cast(TIMESTAMP),
        "item_id": data.items.ids.take(pa.array(log.item[rows])),
        "event": pa.array(EVENT_TYPES).take(pa.array(log.event[rows])),
    }
    return pa.table(keys | columns)


def build_bucket(plan: Plan, bucket: int) -> Made:
    """First phase: a bucket's feature rows (no file for an empty bucket), and its partials for ``build_shard``."""
    events = plan.snapshot.events([bucket], EVENT_COLUMNS)
    place = plan.folder / partials_file(bucket)
    if events.num_rows == 0:
        scatter(place, PARTIALS, (), SHARD, plan.num_shards, 1)
        return Made()
    # only the items that the bucket met: a task costs what its bucket costs, however large the catalogue
    met = pc.is_in(plan.items["item_id"].cast(pa.string()), value_set=pc.unique(events["item_id"].cast(pa.string())))
    data = Dataset.from_tables(events, plan.items.filter(met), targets=plan.snapshot.targets)
    part = partials(data, plan.spec)
    part = part.append_column(SHARD, pa.array(_shards(plan, part["item_id"])))
    scatter(place, PARTIALS, [part], SHARD, plan.num_shards, part.num_rows)
    rows = target_rows(data, plan.spec, Catalogue.of(data))
    return Made((write_file(plan.folder, rows_file(bucket), _rows_bytes(rows), rows.num_rows),))


def _rows_bytes(rows: pa.Table) -> bytes:
    """Feature rows as Parquet: features are numbers that rarely repeat, so a dictionary of them would cost time and space."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", compression_level=1, use_dictionary=KEYS, write_statistics=KEYS)
    return bytes(sink.getvalue().to_pybytes())


def _shards(plan: Plan, ids: pa.ChunkedArray) -> Int64:
    """The shard of each item: by its place in the item table, or by its id where it is not there."""
    rows = pc.index_in(ids, value_set=plan.items["item_id"].cast(pa.string()).combine_chunks())
    out = mix64(np.asarray(rows.fill_null(0)).astype(np.uint64))
    strange = np.flatnonzero(np.asarray(rows.is_null()))
    out[strange] = [stable_hash("shard", text) for text in ids.take(pa.array(strange)).to_pylist()]
    return np.asarray(out % np.uint64(plan.num_shards)).astype(np.int64)


def build_shard(plan: Plan, shard: int) -> Made:
    """Second phase: the timeline of a shard's items, from the partials of all buckets in their order."""
    places = [plan.folder / partials_file(bucket) for bucket in range(plan.snapshot.num_buckets)]
    table = gather(places, PARTIALS, shard, plan.num_shards)
    if table.num_rows == 0:
        return Made()
    ids = Vocab.of(table["item_id"])
    catalogue = Catalogue.from_table(ids, align(plan.items, "item_id", ids))
    ticks = ItemTimeline.of([table], plan.spec, catalogue).table()
    strange = ids.ids.filter(pc.invert(pc.is_in(ids.ids, value_set=plan.items["item_id"].cast(pa.string()).combine_chunks())))
    return Made((write_file(plan.folder, ticks_file(shard), arrow_bytes(ticks), ticks.num_rows),), tuple(strange.to_pylist()))


@dataclass(frozen=True)
class FeatureArtifact:
    """Finished features of a snapshot. Every read checks the digest of the file it reads."""

    folder: Place
    manifest: Manifest

    @staticmethod
    def open(home: Place, name: str | None = None) -> FeatureArtifact:
        """The features of a home by name, or the latest; ``ArtifactError`` if there are none or they are damaged."""
        if name is None:
            name = latest(home, "features")
        known = [child.name for child in (home / "features").children() if not child.name.endswith(".json")]
        if name not in known:
            raise ArtifactError(unknown_name("features", name, known) + " `maple features build` makes them.")
        folder = home / "features" / name
        return FeatureArtifact(folder, open_manifest(folder, KIND))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def digest(self) -> str:
        """Identifies the content."""
        return self.manifest.digest

    @property
    def snapshot_digest(self) -> str:
        """The snapshot that these features were built from."""
        return str(self.manifest.meta["snapshot"])

    @property
    def spec(self) -> FeatureSpec:
        """What was built."""
        return FeatureSpec.parse(self.manifest.meta["spec"], f"{self.folder.uri}/manifest.json")

    @property
    def num_rows(self) -> int:
        """Feature rows of target events."""
        return sum(entry.rows or 0 for name, entry in self.manifest.files.items() if name.startswith("user_events/"))

    def user_events(self, buckets: Iterable[int] | None = None) -> pa.Table:
        """Feature rows of target events, of some buckets or all: user_id, timestamp, item_id, event, then float32 features."""
        wanted = sorted(name for name in self.manifest.files if name.startswith("user_events/"))
        if buckets is not None:
            names = {rows_file(bucket) for bucket in buckets}
            wanted = [name for name in wanted if name in names]
        return pa.concat_tables([self._parquet(name) for name in wanted]) if wanted else pa.table({})

    def catalogue(self) -> Catalogue:
        """The catalogue whose item codes the timeline has: those of the snapshot's data set."""
        table = pa.ipc.open_file(read_file(self.folder, self.manifest, ITEMS_FILE)).read_all()
        return Catalogue.from_table(Vocab(table["item_id"].combine_chunks()), table)

    def timeline(self) -> ItemTimeline:
        """The item features of all ticks, in memory: about 300 bytes per item and tick in which something happened to it."""
        names = sorted(name for name in self.manifest.files if name.startswith("item_ticks/"))
        tables = [pa.ipc.open_file(read_file(self.folder, self.manifest, name)).read_all() for name in names]
        return ItemTimeline.joined(tables, self.spec, self.catalogue())

    def content(self) -> dict[str, ItemContent]:
        """The content features by name, their vectors in the order of the catalogue's item codes."""
        return {
            name: ItemContent.from_tensors(plain, tensors_of(read_file(self.folder, self.manifest, content_file(name))))
            for name, plain in self.manifest.meta.get("content", {}).items()
        }

    def _parquet(self, name: str) -> pa.Table:
        return pq.ParquetFile(pa.BufferReader(read_file(self.folder, self.manifest, name))).read()


def plan(snapshot: Snapshot, spec: FeatureSpec, home: Place) -> Plan:
    """What to build, and where: one folder per snapshot and spec, so that building again finds the result."""
    folder = home / "features" / f"{snapshot.digest[:12]}-{spec.digest[:12]}"
    return Plan(snapshot, snapshot.items(), spec, folder)


def finished(todo: Plan, home: Place) -> FeatureArtifact | None:
    """The same features, if they are there already and whole; then they become the latest."""
    try:
        found = FeatureArtifact(todo.folder, open_manifest(todo.folder, KIND))
    except ArtifactError:
        return None
    point(home, "features", todo.folder.name)
    return found


def publish(todo: Plan, home: Place, made: Iterable[Made], content: Mapping[str, ItemContent] = NO_CONTENT) -> FeatureArtifact:
    """Write what all tasks share, remove what was between the phases, seal, and make it the latest.

    ``content``: vectors by name, in the order of the snapshot's item table; an item that it lacks has none.
    """
    parts = list(made)
    files = sorted((entry for part in parts for entry in part.files), key=lambda entry: entry.name)
    strange = pa.array([text for part in parts for text in part.items], pa.string())
    ids = Vocab.of(pa.chunked_array([*todo.items["item_id"].cast(pa.string()).chunks, strange]))
    table = align(todo.items, "item_id", ids)
    files.append(write_file(todo.folder, ITEMS_FILE, arrow_bytes(table), table.num_rows))
    files.append(write_file(todo.folder, PAGE_FILE, markdown(listing(todo.spec)).encode()))
    for name, vectors in content.items():
        data = vectors.aligned(todo.items["item_id"], ids).to_bytes()
        files.append(write_file(todo.folder, content_file(name), data, len(ids)))
    (todo.folder / BETWEEN).delete()
    meta = json.loads(json.dumps({"snapshot": todo.snapshot.digest, "spec": todo.spec.plain(), "spec_digest": todo.spec.digest}))
    meta["content"] = {name: dict(vectors.plain) for name, vectors in content.items()}
    manifest = seal(todo.folder, KIND, meta, files)
    point(home, "features", todo.folder.name)
    return FeatureArtifact(todo.folder, manifest)


def build_local(snapshot: Snapshot, spec: FeatureSpec, home: Place, content: Mapping[str, ItemContent] = NO_CONTENT) -> FeatureArtifact:
    """The whole build in this process; the same artifact, digest for digest, as on a cluster."""
    todo = plan(snapshot, spec, home)
    done = finished(todo, home)
    if done is not None:
        return done
    with scratch(todo.folder):
        made = [build_bucket(todo, bucket) for bucket in range(snapshot.num_buckets)]
        return publish(todo, home, made + [build_shard(todo, shard) for shard in range(todo.num_shards)], content)
