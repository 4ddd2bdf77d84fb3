"""A snapshot: the immutable, digest-checked result of an ingestion, its events in buckets of whole users sorted by time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from maple.artifacts import FileEntry, Manifest, Place, latest, open_manifest, parquet_bytes, read_file, write_file
from maple.data.dataset import Dataset
from maple.data.report import ValidationReport
from maple.errors import ArtifactError, unknown_name

KIND = "snapshot"
ITEMS_FILE, USERS_FILE, REPORT_FILE = "items.parquet", "users.parquet", "report.json"


def events_file(bucket: int) -> str:
    """Where a bucket's clean events lie."""
    return f"events/bucket={bucket:05d}.parquet"


def quarantine_file(bucket: int) -> str:
    """Where the rows of a bucket that were set aside lie."""
    return f"quarantine/bucket={bucket:05d}.parquet"


def write_table(folder: Place, name: str, table: pa.Table) -> FileEntry:
    """Write one table of a snapshot that is not sealed yet."""
    return write_file(folder, name, parquet_bytes(table.combine_chunks().replace_schema_metadata(None)), table.num_rows)


@dataclass(frozen=True)
class Snapshot:
    """A finished snapshot. Every read checks the digest of the file it reads."""

    folder: Place
    manifest: Manifest

    @staticmethod
    def open(home: Place, name: str | None = None) -> Snapshot:
        """A snapshot of a home by name, or the latest; ``ArtifactError`` if there is none or it is damaged."""
        snapshots = home / "snapshots"
        if name is None:
            name = latest(home, "snapshot")
        elif not name or "/" in name or name.startswith(".") or not (snapshots / name).exists():
            known = [child.name for child in snapshots.children() if not child.name.endswith(".json")]
            raise ArtifactError(unknown_name("snapshot", name, known) + f" They lie in {snapshots.uri}; `maple ingest` makes one.")
        folder = snapshots / name
        return Snapshot(folder, open_manifest(folder, KIND))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def digest(self) -> str:
        """Identifies the content: the same input gives the same digest, under any parallelism."""
        return self.manifest.digest

    @property
    def num_buckets(self) -> int:
        """How many buckets the users are hashed into, a power of two; some may be empty."""
        return int(self.manifest.meta["num_buckets"])

    @property
    def num_events(self) -> int:
        """Clean events in all buckets."""
        return sum(entry.rows or 0 for name, entry in self.manifest.files.items() if name.startswith("events/"))

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
        names = [events_file(bucket) for bucket in wanted]
        parts = [self._table(name, columns) for name in names if name in self.manifest.files]
        return pa.concat_tables(parts) if parts else self._table(self._first("events/"), columns).slice(0, 0)

    def items(self) -> pa.Table:
        """The ITEMS table, by item id."""
        return self._table(ITEMS_FILE)

    def users(self) -> pa.Table | None:
        """The USERS table, by user id; None where the source has none."""
        return self._table(USERS_FILE) if USERS_FILE in self.manifest.files else None

    def quarantine(self) -> pa.Table:
        """The event rows that were set aside, as they came, with ``reason``, ``file``, ``row`` and ``unreadable``."""
        names = sorted(name for name in self.manifest.files if name.startswith("quarantine/bucket="))
        return pa.concat_tables([self._table(name) for name in names]) if names else pa.table({"reason": pa.array([], pa.string())})

    def report(self) -> ValidationReport:
        """What the ingestion counted."""
        return ValidationReport.of(json.loads(read_file(self.folder, self.manifest, REPORT_FILE)))

    def dataset(self) -> Dataset:
        """Everything in memory, for training."""
        return Dataset.from_tables(self.events(), self.items(), self.users(), signals=self.signals, targets=self.targets)

    def _first(self, prefix: str) -> str:
        return next(name for name in sorted(self.manifest.files) if name.startswith(prefix))

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        data = read_file(self.folder, self.manifest, name)
        file = pq.ParquetFile(pa.BufferReader(data))
        for column in columns or ():
            if column not in file.schema_arrow.names:
                raise ArtifactError(f"{self.folder.uri}/{name}: {unknown_name('column', column, file.schema_arrow.names)}")
        return file.read(columns=None if columns is None else list(columns))
