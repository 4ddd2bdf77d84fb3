"""How a file is cut into pieces that tasks read alone: ranges of whole lines, or of rows of a Parquet file.

Where the cuts lie never changes what is read: every piece knows the record number of its first row. Text is cut at line ends, so a text
whose quoted fields hold line breaks, or whose encoding hides them, stays one piece, and so does a compressed one.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from maple.artifacts import Place
from maple.data.files import FREE_EXPANSION, MAX_EXPANSION, MAX_LINE, delimiter_of, is_compressed, open_parquet, readable
from maple.data.sources import FileSource
from maple.errors import DataError

FRAGMENT_ROWS = 1_000_000  # of Parquet
FRAGMENT_BYTES = 64 << 20  # of text
CHUNK = 8 << 20
MAX_QUOTED_LINES = 1000  # of one field; more are a quote that never closed


@dataclass(frozen=True)
class Fragment:
    """What one task reads: a file, or a part of it."""

    label: str  # how rows name the file
    place: Place
    table: int = 0  # of its source's tables
    number: int = 0  # the file's place among the files of its table
    first: int = 0  # the record number of its first row
    rows: int = 0  # exact for Parquet, records for text
    start: int = 0  # bytes of text; the whole file where there is no ``stop``
    stop: int | None = None
    groups: tuple[int, ...] | None = None  # row groups of Parquet
    skip: int = 0  # rows of the first of them


@dataclass(frozen=True)
class Cut:
    """A range of bytes and what lies in it."""

    start: int
    stop: int | None
    first: int
    rows: int


class Quotes:
    """Follows the quoted fields of a CSV file, to find one that swallows the records behind it. ``DataError`` where it does."""

    def __init__(self, label: str, at: int, delimiter: bytes) -> None:
        self.label, self.delimiter = label, delimiter
        self.at = at  # bytes before the next chunk, which starts outside of quotes
        self.opened: int | None = None  # where the field that is open began
        self.lines = 0  # line ends in it
        self.before = b"\n"

    def feed(self, chunk: bytes) -> None:
        """The next bytes."""
        raw = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(raw == 10)
        starts = set(self.delimiter) | {10, 13}
        previous, skipped = 0, -1
        for place in np.flatnonzero(raw == 34).tolist():
            if self.opened is not None:
                self._count(ends, previous, place)
            if place == skipped:
                pass
            elif self.opened is None:
                if (chunk[place - 1] if place else self.before[-1]) in starts:
                    self.opened, self.lines = self.at + place, 0
            elif chunk[place + 1 : place + 2] == b'"':
                skipped = place + 1
            else:
                self.opened = None
            previous = place
        if self.opened is not None:
            self._count(ends, previous, len(chunk))
        self.at, self.before = self.at + len(chunk), chunk[-1:]

    def close(self) -> None:
        """The end of the file."""
        if self.opened is not None:
            raise DataError(f"{self.label}: a quote that opens at byte {self.opened:,} never closes; the file may be cut off or damaged")

    def _count(self, ends: npt.NDArray[np.int64], start: int, stop: int) -> None:
        self.lines += int(np.searchsorted(ends, stop) - np.searchsorted(ends, start))
        if self.lines > MAX_QUOTED_LINES:
            raise DataError(
                f"{self.label}: a quoted field that opens at byte {self.opened:,} runs over more than {MAX_QUOTED_LINES} lines; "
                "a quote is missing there, or export the column without line breaks"
            )


def cut_parquet(file: pq.ParquetFile, rows: int) -> list[tuple[tuple[int, ...], int, int, int]]:
    """(row groups, rows to skip in them, record number of the first row, rows) of each piece of about ``rows`` rows."""
    out: list[tuple[tuple[int, ...], int, int, int]] = []
    groups: list[int] = []
    first = held = 0
    for group in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if groups and held + size > rows:
            out.append((tuple(groups), 0, first, held))
            first, held, groups = first + held, 0, []
        if size > rows:
            edges = np.linspace(0, size, -(-size // rows) + 1).astype(int).tolist()
            out += [((group,), start, first + start, stop - start) for start, stop in itertools.pairwise(edges)]
            first += size
        else:
            groups.append(group)
            held += size
    if groups or not out:
        out.append((tuple(groups), 0, first, held))
    return out


def cut_text(place: Place, label: str, table: FileSource, size: int) -> list[Cut]:
    """The pieces of a text file of about ``size`` bytes, by one reading of it. ``DataError`` for what can be no text of records.

    Records are counted as the readers number them: non-blank lines of CSV, all lines of JSON and of fields without quotes, pairs of lists.
    """
    kind = table.format_of(label)
    heading = 1 if kind == "atomic" or (kind in ("csv", "tsv", "dat") and not table.header) else 0
    quote = delimiter_of(table, kind).encode() if kind in ("csv", "tsv") else None
    whole = is_compressed(place) or not _cuttable(table.encoding)
    edges, counts = [0], [0]
    at = records = 0
    quotes: Quotes | None = None
    with readable(label, table.encoding):
        for lines in _whole_lines(place, label, min(CHUNK, size)):
            plain = lines.removeprefix(codecs.BOM_UTF8) if at == 0 else lines
            if quotes is None and _hides_ends(plain, quote):
                whole, quotes = True, Quotes(label, at, quote or b"")
            if quotes is not None and quote is not None:
                quotes.feed(plain)
            at += len(lines)
            records += _records(lines, kind, table.delimiter)
            if at - edges[-1] >= size:
                edges.append(at)
                counts.append(records)
    if quotes is not None:
        quotes.close()
    if whole or at == 0:
        return [Cut(0, None, 0, max(records - heading, 0))]
    if edges[-1] < at:
        edges.append(at)
        counts.append(records)
    firsts = [max(count - heading, 0) for count in counts]
    return [Cut(edges[n], edges[n + 1], firsts[n], firsts[n + 1] - firsts[n]) for n in range(len(edges) - 1)]


def check_parquet(file: pq.ParquetFile, place: Place, label: str) -> None:
    """``DataError`` where a Parquet file says that it grows beyond measure when it is read."""
    size = place.fs.get_file_info(place.path).size
    groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
    check_growth(sum(group.total_byte_size for group in groups), size, label)


def check_growth(read: int, size: int, label: str) -> None:
    if read > FREE_EXPANSION and read > MAX_EXPANSION * size:
        raise DataError(
            f"{label} grows more than {MAX_EXPANSION}-fold when it is unpacked (over {read >> 20} MiB from {size:,} bytes); "
            "Maple takes that for a decompression bomb. Unpack it yourself if it is honest."
        )


def _whole_lines(place: Place, label: str, chunk_bytes: int) -> Iterator[bytes]:
    """The bytes of a file in chunks that end at a line end, but for the last."""
    size = place.fs.get_file_info(place.path).size
    rest = b""
    read = 0
    with place.fs.open_input_stream(place.path) as stream:
        while chunk := bytes(stream.read(chunk_bytes)):
            read += len(chunk)
            if is_compressed(place):
                check_growth(read, size, label)
            end = chunk.rfind(b"\n") + 1
            if end:
                yield rest + chunk[:end]
                rest = chunk[end:]
            else:
                rest += chunk
            if len(rest) > MAX_LINE:
                raise DataError(f"{label} has a line of more than {MAX_LINE >> 20} MiB; the file may be damaged or of another format")
    if rest:
        yield rest


def _cuttable(encoding: str) -> bool:
    """Whether a byte 10 is always a line end, and nothing else is needed to start reading after one."""
    return codecs.lookup(encoding).name.startswith(("utf-8", "ascii", "iso8859", "latin", "cp12", "cp85", "koi8", "mac-"))


def _hides_ends(lines: bytes, delimiter: bytes | None) -> bool:
    """Whether some record may end elsewhere than at a line feed: lone carriage returns, or quotes that do not plainly close in their line.

    Quotes are plain where each line has an even number of them, and each odd one opens a field or doubles the one before it.
    """
    if b"\r" in lines and lines.count(b"\r") != lines.count(b"\r\n"):
        return True
    if delimiter is None or b'"' not in lines:
        return False
    raw = np.frombuffer(lines, np.uint8)
    quotes, ends = np.flatnonzero(raw == 34), np.flatnonzero(raw == 10)
    if len(quotes) % 2 or (np.searchsorted(quotes, ends) % 2).any():
        return True
    opening = quotes[::2]
    before = raw[np.maximum(opening - 1, 0)]
    return not bool(((opening == 0) | np.isin(before, (10, 34, *delimiter))).all())


def _records(lines: bytes, kind: str, delimiter: str | None) -> int:
    ends = lines.count(b"\n") + (not lines.endswith(b"\n")) + lines.count(b"\r") - lines.count(b"\r\n")
    if kind == "lists":
        return _pairs(lines, delimiter)
    if kind not in ("csv", "tsv") or not (lines.startswith((b"\n", b"\r")) or b"\n\n" in lines or b"\n\r" in lines):
        return ends
    return sum(1 for line in lines.splitlines() if line)


def _pairs(lines: bytes, delimiter: str | None) -> int:
    """How many (user, item) pairs lines of ``user item item ...`` hold; a user alone counts as one record."""
    raw = np.frombuffer(lines, np.uint8)
    blank = (raw <= 32) if delimiter is None else (raw <= 32) | (raw == ord(delimiter))
    starts = np.flatnonzero(~blank & np.concatenate([[True], blank[:-1]]))
    words = np.bincount(np.searchsorted(np.flatnonzero(raw == 10), starts))
    return int(np.maximum(words[words > 0] - 1, 1).sum())


def fragments_of(table: FileSource, found: list[tuple[str, Place]], number: int, size: int, rows: int) -> list[Fragment]:
    """The fragments of a table's files, in their order. ``number``: the table's place among its source's."""
    out: list[Fragment] = []
    for place_number, (label, place) in enumerate(found):
        if table.format_of(label) == "parquet":
            file = open_parquet(place, label)
            check_parquet(file, place, label)
            for groups, skip, first, held in cut_parquet(file, rows):
                out.append(Fragment(label, place, number, place_number, first, held, groups=groups, skip=skip))
        else:
            for cut in cut_text(place, label, table, size):
                out.append(Fragment(label, place, number, place_number, cut.first, cut.rows, cut.start, cut.stop))
    return out
