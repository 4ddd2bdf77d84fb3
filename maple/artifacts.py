"""What Maple writes, and how it stays whole: places on any pyarrow filesystem, files with digests, a manifest written last.

A folder without ``manifest.json`` does not exist for any reader, so a writer may die at any point. Readers check the
SHA-256 of every file they use. No pickle anywhere: arrays are safetensors, tables are Arrow or Parquet, the rest is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import safetensors.numpy

from maple.errors import ArtifactError, ConfigError
from maple.hashing import combine, sha256

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Place:
    """A file or folder on a pyarrow filesystem. ``Place.at`` takes a local path or a URI; ``/`` joins names."""

    fs: pafs.FileSystem
    path: str

    @staticmethod
    def at(uri: str | Path | Place) -> Place:
        """The place that a local path or a URI (``file://``, ``s3://``, ``gs://`` ...) names."""
        if isinstance(uri, Place):
            return uri
        text = str(uri)
        try:
            if "://" in text:
                fs, path = pafs.FileSystem.from_uri(text)
                return Place(fs, path.rstrip("/"))
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{text!r} is not a usable URI: {error}") from None
        return Place(pafs.LocalFileSystem(), os.path.abspath(text))

    def __truediv__(self, name: str) -> Place:
        assert ".." not in name.split("/"), f"a name inside a place may not climb out of it: {name}"
        return Place(self.fs, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """The local path, or None on other filesystems."""
        return Path(self.path) if isinstance(self.fs, pafs.LocalFileSystem) else None

    @property
    def uri(self) -> str:
        return self.path if self.local else f"{self.fs.type_name}://{self.path}"

    def exists(self) -> bool:
        return bool(self.fs.get_file_info(self.path).type != pafs.FileType.NotFound)

    def read(self) -> bytes:
        """All bytes; ``ArtifactError`` if the file is missing."""
        try:
            with self.fs.open_input_stream(self.path) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            raise ArtifactError(f"{self.uri} does not exist") from None

    def write(self, data: bytes) -> None:
        """Write the whole file: it appears complete or not at all."""
        parent = self.path.rsplit("/", 1)[0]
        self.fs.create_dir(parent, recursive=True)
        target = f"{self.path}.{uuid.uuid4().hex[:8]}.tmp" if self.local else self.path
        if self.local:
            with open(target, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(target, self.path)
        else:
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)

    def children(self) -> list[Place]:
        """The entries of a folder by name; empty if it does not exist."""
        found = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return [Place(self.fs, info.path) for info in sorted(found, key=lambda info: str(info.path))]

    def delete(self) -> None:
        """Remove a file or folder; nothing happens if it is not there."""
        kind = self.fs.get_file_info(self.path).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path)
        elif kind == pafs.FileType.File:
            self.fs.delete_file(self.path)


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its name in the folder, SHA-256 and size; rows where it is a table."""

    name: str
    sha256: str
    bytes: int
    rows: int | None = None

    def plain(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.bytes} | ({} if self.rows is None else {"rows": self.rows})


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself. ``digest`` identifies the content: kind, meta and every file's SHA-256."""

    kind: str
    meta: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    digest: str

    def plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "kind": self.kind, "digest": self.digest, "meta": dict(self.meta),
            "files": {name: entry.plain() for name, entry in sorted(self.files.items())},
        }  # fmt: skip


def manifest_of(kind: str, meta: Mapping[str, Any], files: Mapping[str, FileEntry]) -> Manifest:
    """The manifest over finished files, its digest computed."""
    parts = [kind, json.dumps(meta, sort_keys=True)]
    for name, entry in sorted(files.items()):
        parts += [name, entry.sha256]
    return Manifest(kind, meta, dict(files), combine(parts))


def write_file(folder: Place, name: str, data: bytes, rows: int | None = None) -> FileEntry:
    """Write one file of an artifact; it is not part of it before ``seal``."""
    (folder / name).write(data)
    return FileEntry(name, sha256(data), len(data), rows)


def seal(folder: Place, kind: str, meta: Mapping[str, Any], files: list[FileEntry]) -> Manifest:
    """Publish an artifact: write its manifest, last. From here on it exists."""
    manifest = manifest_of(kind, meta, {entry.name: entry for entry in files})
    (folder / MANIFEST).write(json.dumps(manifest.plain(), indent=1, sort_keys=True).encode())
    return manifest


def open_manifest(folder: Place, kind: str) -> Manifest:
    """Read and check a manifest; ``ArtifactError`` if it is missing, torn, of another kind or does not match its own digest."""
    if not (folder / MANIFEST).exists():
        raise ArtifactError(f"{folder.uri} is not a finished {kind}: it has no {MANIFEST}. Build it again, or check the path.")
    try:
        plain = json.loads((folder / MANIFEST).read())
        files = {name: FileEntry(name, entry["sha256"], entry["bytes"], entry.get("rows")) for name, entry in plain["files"].items()}
        manifest = manifest_of(plain["kind"], plain["meta"], files)
        stated, form = plain["digest"], plain["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder.uri}/{MANIFEST} cannot be read ({type(error).__name__}: {error}). Build the {kind} again.") from None
    if form != FORMAT:
        raise ArtifactError(f"{folder.uri} has format {form}, this version of Maple reads format {FORMAT}. Make the {manifest.kind} again.")
    if manifest.kind != kind:
        raise ArtifactError(f"{folder.uri} is a {manifest.kind}, not a {kind}")
    if manifest.digest != stated:
        raise ArtifactError(f"{folder.uri}/{MANIFEST} was altered: its digest does not match its content. Build the {kind} again.")
    return manifest


def read_file(folder: Place, manifest: Manifest, name: str) -> bytes:
    """One file of an artifact, its digest checked."""
    entry = manifest.files.get(name)
    if entry is None:
        raise ArtifactError(f"{folder.uri} has no file {name!r}; it has: {', '.join(sorted(manifest.files))}")
    data = (folder / name).read()
    if len(data) != entry.bytes or sha256(data) != entry.sha256:
        raise ArtifactError(
            f"{folder.uri}/{name} was altered or is torn: its SHA-256 is not the manifest's. Build the {manifest.kind} again."
        )
    return data


def verify(folder: Place, manifest: Manifest) -> None:
    """Check the digest of every file; ``ArtifactError`` names the first that differs."""
    for name in manifest.files:
        read_file(folder, manifest, name)


# -- bytes of the formats ----------------------------------------------------------------------------------------------


def parquet_bytes(table: pa.Table, group_rows: int | None = None) -> bytes:
    """A table as one Parquet file, in row groups of at most ``group_rows``; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=True, row_group_size=group_rows)
    return bytes(sink.getvalue().to_pybytes())


def arrow_bytes(table: pa.Table) -> bytes:
    """A table as one uncompressed Arrow IPC file, to be memory-mapped."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue().to_pybytes())


def tensor_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Named arrays as one safetensors file."""
    return bytes(safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def load_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Named arrays of a local safetensors file, memory-mapped where the library can."""
    try:
        return dict(safetensors.numpy.load_file(path))
    except Exception as error:  # the library raises its own error types for torn files
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from None


def tensors_of(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Named arrays of the bytes of a safetensors file."""
    try:
        return dict(safetensors.numpy.load(data))
    except Exception as error:  # the library raises its own error types for torn files
        raise ArtifactError(f"these bytes are not a readable safetensors file: {error}") from None


def check_writable(home: Place) -> None:
    """A ``ConfigError`` where the home cannot be written to, before a step has done its work for nothing."""
    probe = home / f"probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.write(b"")
        probe.delete()
    except OSError as error:
        raise ConfigError(
            f"Maple's home {home.uri} cannot be written to: {error.strerror or error}. "
            "Choose another with --home or MAPLE_HOME, or look at its permissions and the space on its disk."
        ) from None


# -- pointers ----------------------------------------------------------------------------------------------------------


_FOLDERS = {"snapshot": "snapshots", "features": "features", "run": "runs"}


def point(home: Place, kind: Literal["snapshot", "features", "run"], name: str) -> None:
    """Make ``name`` the latest artifact of its kind in this home."""
    (home / _FOLDERS[kind] / "latest.json").write(json.dumps({"name": name}).encode())


def latest(home: Place, kind: Literal["snapshot", "features", "run"]) -> str:
    """The name of the latest artifact of a kind; ``ArtifactError`` says which command makes one."""
    place = home / _FOLDERS[kind] / "latest.json"
    maker = {"snapshot": "maple ingest", "features": "maple features build", "run": "maple train"}[kind]
    if not place.exists():
        raise ArtifactError(f"{home.uri} has no {kind} yet; make one with `{maker}`, or point MAPLE_HOME to where one is")
    return str(json.loads(place.read())["name"])


@contextlib.contextmanager
def scratch(folder: Place) -> Iterator[Place]:
    """A folder that is removed if the block fails: a convenience, since what has no manifest does not exist anyway."""
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.delete()
        raise
