"""The files of a table: finding them, what columns they have, and opening Parquet without running anything it carries."""

from __future__ import annotations

import base64
import codecs
import csv
import fnmatch
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from maple.artifacts import Place
from maple.data.sources import COMPRESSED, LIST_COLUMNS, FileSource
from maple.errors import DataError, MapleError, unknown_name

MAX_LINE = 8 << 20  # bytes; a longer line is a damaged file, not a record
MAX_EXPANSION = 100  # times that compressed bytes may grow, beyond FREE_EXPANSION
FREE_EXPANSION = 256 << 20
HEAD_RECORDS = 1000  # JSON lines whose keys count as the columns of a file
LISTED = 20


def files(table: FileSource, root: Place) -> list[tuple[str, Place]]:
    """Label and place of every file of a table, sorted within each path; ``DataError`` where a path matches nothing or a file is empty.

    The label is the path inside ``root``, or the URI.
    """
    out: list[tuple[str, Place]] = []
    for path in table.paths:
        place = Place.at(path) if "://" in path else root / path
        if any(sign in path for sign in "*?["):
            at = place.path
            base = at[: re.search(r"[*?\[]", at).start()].rpartition("/")[0]  # type: ignore[union-attr]
            listed = place.fs.get_file_info(pafs.FileSelector(base, recursive="/" in at[len(base) + 1 :], allow_not_found=True))
            found = sorted(info.path for info in listed if info.type == pafs.FileType.File and fnmatch.fnmatchcase(info.path, at))
            if not found:
                raise DataError(f"no file matches {path!r} in {root.uri}; check `path:` in the source YAML")
            front = path[: len(path) - len(at)] if path.endswith(at) else ""  # of a URI: its scheme
            out += [(f"{front}{name}" if "://" in path else name[len(root.path) :].lstrip("/"), Place(place.fs, name)) for name in found]
        else:
            out.append((path, place))
    for label, place in out:
        info = place.fs.get_file_info(place.path)
        if info.type != pafs.FileType.File:
            raise DataError(f"the file {label} does not exist in {root.uri}; check `path:` in the source YAML{_present(place)}")
        if info.size == 0:
            raise DataError(f"{label} in {root.uri} is empty; export it again, or remove it from `path:`")
    return out


def columns_of(place: Place, table: FileSource | None = None) -> list[str]:
    """The column names of a file, without reading its rows; ``[]`` where it has no header. For advice and checks."""
    table = table or FileSource(path=place.name)
    kind = table.format_of(place.name)
    if kind == "lists":
        return list(LIST_COLUMNS)
    if table.header:
        return list(table.header)
    if kind == "parquet":
        return [str(name) for name in open_parquet(place, place.name).schema_arrow.names]
    if kind == "jsonl":
        return _keys(place, table)
    text = head(place, table)
    if kind == "dat":
        return [] if table.delimiter is None and "::" in text else text.split(table.delimiter or "::")
    if kind == "atomic":
        return [name.split(":", 1)[0] for name in text.split(table.delimiter or "\t")]
    with readable(place.name, table.encoding):
        return next(csv.reader([text], delimiter=delimiter_of(table, kind)), [])


def atomic_types(place: Place, table: FileSource) -> dict[str, str]:
    """The types that the header of a RecBole file declares: {column: token | float | token_seq | float_seq}."""
    names = [name.split(":", 1) for name in head(place, table).split(table.delimiter or "\t")]
    return {name[0]: name[1] for name in names if len(name) == 2}


def head(place: Place, table: FileSource) -> str:
    """The first line of a text file."""
    with readable(place.name, table.encoding):
        return re.split("[\r\n]", decoded(_start(place), table.encoding), maxsplit=1)[0]


def decoded(start: bytes, encoding: str) -> str:
    """The text that a file starts with, without its byte order mark; a character cut off at the end is left out."""
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    return codecs.getincrementaldecoder(name)().decode(start)


def delimiter_of(table: FileSource, kind: str) -> str:
    """What separates the fields of a CSV or TSV file."""
    return table.delimiter or ("\t" if kind == "tsv" else ",")


def is_compressed(place: Place) -> bool:
    """Whether a file's ending says that it is compressed."""
    return place.name.lower().rpartition(".")[2] in COMPRESSED


def check_columns(needed: Sequence[str], present: Sequence[str], label: str) -> None:
    """``DataError`` where a needed column is not present, with the nearest one that is."""
    for name in needed:
        if name not in present:
            text = unknown_name("column", name, present)
            raise DataError(f"{label}: {text if len(present) <= LISTED else text[:600] + ' ...'} Correct the source YAML.")


@contextmanager
def readable(label: str, encoding: str = "utf-8") -> Iterator[None]:
    """What goes wrong in reading a file, as a ``DataError`` that names it and says what to do."""
    try:
        yield
    except MapleError:
        raise
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        found = _marked(getattr(error, "object", b""))
        which = f"it begins like {found}: declare `encoding: {found}`" if found else "declare its `encoding:`, for example latin-1"
        raise DataError(f"{label} is not {encoding} text ({reason}); {which}") from None
    except (pa.ArrowException, OSError, EOFError, csv.Error, MemoryError) as error:
        hint = "declare its `encoding:`, for example latin-1" if "UTF8" in str(error) else "the file may be damaged or of another format"
        raise DataError(f"{label} cannot be read: {brief(error)}; {hint}") from None


def _marked(start: bytes | str) -> str:
    """The encoding that a byte order mark names; empty where there is none."""
    marks = (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    )
    return next((name for mark, name in marks if isinstance(start, bytes) and start.startswith(mark)), "")


def open_parquet(place: Place, label: str, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    """A Parquet file whose footer declares no extension types (loading those may run code); ``DataError`` if corrupt or unsafe.

    ``dictionaries``: columns to read as codes of their distinct values.
    """
    try:
        with place.fs.open_input_file(place.path) as handle:
            footer = _footer(handle)
        if _has_extension(footer):
            raise DataError(
                f"{label} declares Arrow extension types (such as tensors); Maple refuses them because reading one can run code. "
                "Write the file again with plain columns (numbers, text, times, lists of those)."
            )
        return pq.ParquetFile(place.fs.open_input_file(place.path), read_dictionary=list(dictionaries), page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:
        raise DataError(f"{label} is not a readable Parquet file ({brief(error)}); it may be cut off or damaged: write it again") from None


def brief(error: BaseException) -> str:
    """An error of a library in a few words."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _start(place: Place) -> bytes:
    out = bytearray()
    with place.fs.open_input_stream(place.path) as stream:
        while b"\n" not in out and len(out) <= MAX_LINE and (part := stream.read(1 << 16)):
            out += part
    if b"\n" not in out and len(out) > MAX_LINE:
        raise DataError(f"{place.name}: its first line is longer than {MAX_LINE >> 20} MiB; the file may be damaged or of another format")
    return bytes(out)


def _keys(place: Place, table: FileSource) -> list[str]:
    """The keys of the first records of a JSON lines file, those of nested objects with dots."""
    with readable(place.name, table.encoding):
        start = bytearray(_start(place))
        with place.fs.open_input_stream(place.path) as stream:
            start = start if len(start) > 1 << 20 else bytearray(stream.read(1 << 20))
        lines = decoded(bytes(start), table.encoding).splitlines()[:HEAD_RECORDS]
    found: dict[str, None] = {}
    objects = 0
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            objects += 1
            found |= dict.fromkeys(_paths(record, "", 0))
    if not objects:
        raise DataError(f"{place.name}: no line of its beginning is a JSON object; jsonl has one object a line")
    return list(found)


def _paths(record: dict[str, Any], front: str, depth: int) -> Iterator[str]:
    for key, value in record.items():
        yield front + key
        if isinstance(value, dict) and depth < 3:
            yield from _paths(value, f"{front}{key}.", depth + 1)


def _footer(handle: pa.NativeFile) -> bytes:
    size = handle.size()
    if size < 12:
        raise OSError("too short")
    handle.seek(size - 8)
    tail = bytes(handle.read(8))
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > size - 12:
        raise OSError("its end is not that of a Parquet file")
    handle.seek(size - 8 - length)
    return bytes(handle.read(length))


def _has_extension(footer: bytes) -> bool:
    marks = (b"ARROW:extension", b"ray.data.")
    if any(mark in footer for mark in marks):
        return True
    # The Arrow schema is stored as base64; its start may be preceded by a length byte.
    for run in re.finditer(rb"[A-Za-z0-9+/=]{48,}", footer):
        text = run.group().rstrip(b"=")
        for shift in range(4):
            part = text[shift:]
            plain = base64.b64decode(part[: len(part) // 4 * 4])
            if any(mark in plain for mark in marks):
                return True
    return False


def _present(place: Place) -> str:
    folder = Place(place.fs, place.path.rpartition("/")[0])
    names = [child.name for child in folder.children()][:LISTED]
    return f"; the folder has: {', '.join(names)}" if names else ""
