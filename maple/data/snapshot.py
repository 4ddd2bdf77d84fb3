"""A snapshot: the immutable, digest-checked result of an ingestion, its events in buckets of whole users sorted by time.

It may lie over a parent and hold only what an append brought; reading it reads the whole stack. What the users of the home's tombstones
did does not come out of any snapshot, whatever its age.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa

from maple.artifacts import Manifest, Place, latest, open_manifest, read_file
from maple.data.dataset import Dataset
from maple.data.identity import Stitching
from maple.data.layers import IDENTITIES_FILE, ITEMS_FILE, KIND, REPORT_FILE, USERS_FILE, Layer, Stack, joined, left_file
from maple.data.report import TableReport, ValidationReport
from maple.data.tombstones import NONE, Tombstones
from maple.errors import ArtifactError, unknown_name
from maple.hashing import combine


@dataclass(frozen=True)
class Snapshot:
    """A finished snapshot: its own folder, the layers below it (the base first), and who is to be forgotten."""

    folder: Place
    manifest: Manifest
    below: tuple[Layer, ...] = ()
    tombstones: Tombstones = NONE

    @staticmethod
    def open(home: Place, name: str | None = None) -> Snapshot:
        """A snapshot of a home by name, or the latest; ``ArtifactError`` if there is none or it is damaged."""
        if name is None:
            name = latest(home, "snapshot")
        elif name not in names(home):
            raise ArtifactError(
                unknown_name("snapshot", name, names(home)) + f" They lie in {(home / 'snapshots').uri}; `maple ingest` makes one."
            )
        folder = home / "snapshots" / name
        manifest = open_manifest(folder, KIND)
        below: list[Layer] = []
        top = Layer(folder, manifest)
        while parent := top.manifest.meta.get("parent"):
            beneath = home / "snapshots" / parent["name"]
            top = Layer(beneath, open_manifest(beneath, KIND))
            if top.manifest.digest != parent["digest"]:
                raise ArtifactError(f"{beneath.uri} is not the snapshot that {name} was made over: it was replaced. Ingest again.")
            below.insert(0, top)
        if "content" not in manifest.meta:
            raise ArtifactError(f"{folder.uri} was made by an older Maple and cannot be read; ingest its source again")
        return Snapshot(folder, manifest, tuple(below), Tombstones.of(home))

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def stack(self) -> Stack:
        """All layers, the base first."""
        return Stack((*self.below, Layer(self.folder, self.manifest)))

    @property
    def parent(self) -> str | None:
        """The name of the snapshot that this one lies over, None for a base."""
        return self.below[-1].folder.name if self.below else None

    @property
    def digest(self) -> str:
        """Identifies the content: the same input gives the same under any parallelism, compaction keeps it, a deletion changes it."""
        content = str(self.manifest.meta["content"])
        return combine([content, self.tombstones.digest]) if self.hides else content

    @cached_property
    def hides(self) -> bool:
        """Whether there are tombstones that some layer was made without: then rows are looked at when they are read."""
        made = {str(layer.manifest.meta.get("tombstones", "")) for layer in self.stack.layers}
        return bool(self.tombstones) and made != {self.tombstones.digest}

    @property
    def num_buckets(self) -> int:
        """How many buckets the users are hashed into, a power of two; some may be empty."""
        return int(self.manifest.meta["num_buckets"])

    @cached_property
    def num_events(self) -> int:
        """Clean events in all buckets."""
        if not self.hides:
            return self.stack.num_events
        return sum(self.events([bucket], ["user_id"]).num_rows for bucket in range(self.num_buckets))

    @property
    def targets(self) -> tuple[str, ...]:
        """Event kinds that count as relevant."""
        return tuple(self.manifest.meta["targets"])

    @property
    def signals(self) -> dict[str, float]:
        """Interest per event kind."""
        return dict(self.manifest.meta["signals"])

    def events(self, buckets: Iterable[int] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Events of some buckets (default all), bucket by bucket, each sorted by (timestamp, event_id)."""
        wanted = range(self.num_buckets) if buckets is None else buckets
        found = [part for bucket in wanted if (part := self.bucket(bucket, columns)) is not None]
        if found:
            return joined(found)
        empty = self.stack.schema().empty_table()
        return empty if columns is None else empty.select(list(columns))

    def bucket(self, bucket: int, columns: Sequence[str] | None = None, since: int | None = None) -> pa.Table | None:
        """The events of one bucket, None where it has none; with ``since`` (microseconds) at least those from there on."""
        if not self.hides:
            return self.stack.events(bucket, columns, since)
        known = self.stack.schema().names
        who = [name for name in ("user_id", "source_user_id") if columns is not None and name in known]
        table = self.stack.events(bucket, None if columns is None else list(dict.fromkeys([*columns, *who])), since)
        if table is None:
            return None
        kept = self.tombstones.keep(table)
        return kept if columns is None else kept.select(list(columns))

    def items(self) -> pa.Table:
        """The ITEMS table, by item id."""
        table = self.stack.newest(ITEMS_FILE, "item_id")
        assert table is not None, "a base has an item table"
        return table

    def users(self) -> pa.Table | None:
        """The USERS table, by user id; None where the source has none."""
        table = self.stack.newest(USERS_FILE, "user_id")
        return table if table is None or not self.hides else self.tombstones.keep(table)

    def quarantine(self) -> pa.Table:
        """The event rows that were set aside, as they came, with ``reason``, ``file``, ``row`` and ``unreadable``."""
        parts = [part for bucket in range(self.num_buckets) if (part := self.stack.quarantine(bucket)) is not None]
        if not parts:
            return pa.table({"reason": pa.array([], pa.string())})
        return self.tombstones.keep(joined(parts)) if self.hides else joined(parts)

    def report(self) -> ValidationReport:
        """What the ingestion counted: that of the rows which this snapshot brought."""
        return ValidationReport.of(json.loads(read_file(self.folder, self.manifest, REPORT_FILE)))

    def whole_report(self) -> ValidationReport:
        """The report with the counts and the profile of the events of all layers. Users of several layers count in each."""
        below = [json.loads(read_file(layer.folder, layer.manifest, REPORT_FILE)) for layer in self.below]
        own = self.report()
        events = TableReport.merge([*(ValidationReport.of(plain).events for plain in below), own.events])
        return replace(own, events=events)

    def holds_deleted(self) -> bool:
        """Whether files of this snapshot hold rows of deleted users, clean or set aside, or texts that may be theirs."""
        if not self.hides:
            return False
        for bucket in range(self.num_buckets):
            for part in (self.stack.events(bucket), self.stack.quarantine(bucket)):
                if part is not None and self.tombstones.keep(part) != part:
                    return True
        named = (USERS_FILE, left_file(USERS_FILE), "quarantine/users.parquet")
        tables = [layer.table(name) for layer in self.stack.layers for name in named if layer.has(name)]
        edges = self.stack.last(IDENTITIES_FILE)
        gone = [self.tombstones.covers(table["user_id"]) for table in tables]
        gone += [] if edges is None else [self.tombstones.covers(edges[name]) for name in edges.column_names]
        return any(bool(each.any()) for each in gone)

    def identities(self) -> pa.Table | None:
        """The edges device_id -> user_id that ids were stitched by, None where they were not."""
        edges = self.stack.last(IDENTITIES_FILE)
        if edges is None or not self.hides:
            return edges
        return edges.filter(pa.array(~(self.tombstones.covers(edges["device_id"]) | self.tombstones.covers(edges["user_id"]))))

    def stitching(self) -> Stitching | None:
        """The canonical ids, None where ids were not stitched."""
        edges = self.identities()
        return None if edges is None else Stitching.of(edges)

    def dataset(self) -> Dataset:
        """Everything in memory, for training."""
        return Dataset.from_tables(self.events(), self.items(), self.users(), signals=self.signals, targets=self.targets)


def names(home: Place) -> list[str]:
    """The names in the folder of snapshots, finished or not, oldest first."""
    return [child.name for child in (home / "snapshots").children() if "." not in child.name]
