"""The offline feature build, piece by piece: what one bucket gives, how the pieces become an artifact, and the artifact itself.

Per bucket of users: point-in-time user and user-item features of every target event, and the bucket's partial sums for items.
Then one small reduce makes the item timeline, and the manifest comes last. ``build_ray`` maps these functions over a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from maple.artifacts import (
    FileEntry,
    Manifest,
    Place,
    arrow_bytes,
    latest,
    open_manifest,
    parquet_bytes,
    point,
    read_file,
    seal,
    tensor_bytes,
    write_file,
)
from maple.data.dataset import Dataset, Vocab, align
from maple.data.snapshot import Snapshot
from maple.errors import ArtifactError, unknown_name
from maple.features.catalogue import Catalogue
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.ticks import ItemTimeline, partials
from maple.features.views import catalogue as catalogue_page
from maple.schema import EVENT_TYPES, TIMESTAMP

KIND = "features"
ITEMS_FILE, TICKS_FILE, PAGE_FILE = "items.arrow", "item_ticks.safetensors", "features.md"
Progress = Callable[[str], None]


def rows_file(bucket: int) -> str:
    """Where the feature rows of a bucket's target events lie."""
    return f"user_events/bucket={bucket:05d}.parquet"


def partials_file(bucket: int) -> str:
    """Where what a bucket's users add to the items lies."""
    return f"partials/bucket={bucket:05d}.parquet"


@dataclass(frozen=True)
class Plan:
    """What every task needs: the snapshot, its item table, the spec, and the folder to write to."""

    snapshot: Snapshot
    items: pa.Table
    spec: FeatureSpec
    folder: Place


def target_rows(data: Dataset, spec: FeatureSpec, catalogue: Catalogue) -> pa.Table:
    """One row per target event, by (user, time): its keys, and the user and user-item features as they were strictly before it."""
    log = data.log
    rows = np.flatnonzero(np.isin(log.event, data.targets))
    user, time = log.user[rows], log.time[rows]
    starts = np.flatnonzero(np.r_[True, (user[1:] != user[:-1]) | (time[1:] != time[:-1])]) if len(rows) else rows
    offsets = np.append(starts, len(rows)).astype(np.int64)
    reader = LogReader(data, spec, catalogue)
    users, now = user[starts], time[starts]
    own = reader.user_columns(users, now)
    query = np.repeat(np.arange(len(starts)), np.diff(offsets))
    columns = {name: column[query] for name, column in own.items()} | reader.user_item_columns(users, now, offsets, log.item[rows])
    keys = {
        "user_id": data.users.ids.take(pa.array(user)),
        "timestamp": pa.array(time).cast(TIMESTAMP),
        "item_id": data.items.ids.take(pa.array(log.item[rows])),
        "event": pa.array(EVENT_TYPES).take(pa.array(log.event[rows])),
    }
    return pa.table(keys | columns)


def build_bucket(plan: Plan, bucket: int) -> list[FileEntry]:
    """Build and write one bucket; the files it made (none for an empty bucket)."""
    events = plan.snapshot.events([bucket])
    if events.num_rows == 0:
        return []
    data = Dataset.from_tables(events, plan.items, targets=plan.snapshot.targets)
    catalogue = Catalogue.of(data)
    made = []
    for name, table in (
        (rows_file(bucket), target_rows(data, plan.spec, catalogue)),
        (partials_file(bucket), partials(data, plan.spec, catalogue)),
    ):
        made.append(write_file(plan.folder, name, parquet_bytes(table), table.num_rows))
    return made


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
        """The item features of all ticks."""
        tensors = safetensors.numpy.load(read_file(self.folder, self.manifest, TICKS_FILE))
        return ItemTimeline.from_tensors(tensors, self.spec, self.catalogue())

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


def publish(todo: Plan, home: Place, entries: Iterable[FileEntry]) -> FeatureArtifact:
    """Reduce the buckets' partial sums to the item timeline, seal, and make it the latest."""
    files = sorted(entries, key=lambda entry: entry.name)
    parts = []
    for entry in files:
        if entry.name.startswith("partials/"):
            parts.append(pq.ParquetFile(pa.BufferReader((todo.folder / entry.name).read())).read())
    ids = Vocab.of(pa.chunked_array([chunk for table in (todo.items, *parts) for chunk in table["item_id"].cast(pa.string()).chunks]))
    table = align(todo.items, "item_id", ids)
    catalogue = Catalogue.from_table(ids, table)
    timeline = ItemTimeline.of(parts, todo.spec, catalogue)
    files.append(write_file(todo.folder, ITEMS_FILE, arrow_bytes(table), table.num_rows))
    files.append(write_file(todo.folder, TICKS_FILE, tensor_bytes(timeline.tensors()), len(timeline.ticks)))
    files.append(write_file(todo.folder, PAGE_FILE, catalogue_page(todo.spec.all_views).encode()))
    meta = json.loads(json.dumps({"snapshot": todo.snapshot.digest, "spec": todo.spec.plain(), "spec_digest": todo.spec.digest}))
    manifest = seal(todo.folder, KIND, meta, files)
    point(home, "features", todo.folder.name)
    return FeatureArtifact(todo.folder, manifest)


def build_local(snapshot: Snapshot, spec: FeatureSpec, home: Place) -> FeatureArtifact:
    """The whole build in this process; the same artifact, digest for digest, as on a cluster."""
    todo = plan(snapshot, spec, home)
    return finished(todo, home) or publish(
        todo, home, [entry for bucket in range(snapshot.num_buckets) for entry in build_bucket(todo, bucket)]
    )
