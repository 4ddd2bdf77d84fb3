"""Crafted files that a shop, a broken export or an attacker might hand in, and what must become of each.

A case is bytes, the mapping that reads them, and the verdict: ``refuse`` (a typed error that names the file) or the number of records that
must be accounted for as clean or quarantined. ``judge`` ingests one and says what happened.
"""

from __future__ import annotations

import bz2
import gzip
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maple.artifacts import MANIFEST, Place
from maple.data.ingest import ingest_local
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.errors import ConfigError, DataError

COLUMNS = {"user_id": "u", "item_id": "i", "timestamp": "t", "value": "q"}
HEAD = b"u,i,t,q\n"
NOW = 1_800_000_000_000_000
Ingest = Callable[[SourceConfig, Place, Place], Snapshot]


@dataclass(frozen=True)
class Case:
    """One crafted file. ``records``: how many rows must come out as clean or quarantined; None = it must be refused."""

    name: str
    data: bytes
    records: int | None = None
    table: dict[str, Any] = field(default_factory=dict)
    clean: int | None = None  # of the records, where that is known
    may_refuse: bool = False


@dataclass(frozen=True)
class Verdict:
    """What became of a case, in words, and whether that is what must."""

    holds: bool
    told: str


def judge(case: Case, scratch: Path, marker: Path, ingest: Ingest | None = None) -> Verdict:
    """Ingest a case in a fresh folder. ``marker``: the file that carried code would leave."""
    folder, home = scratch / "in", scratch / "home"
    folder.mkdir(parents=True)
    (folder / case.name).write_bytes(case.data)
    plain = {"path": case.name, "columns": COLUMNS, "constants": {"event": "purchase"}, **case.table}
    try:
        source = SourceConfig.parse({"name": "shop", "events": plain, "max_quarantined_share": 1.0, "checks": {}}, case.name)
        found = (ingest or _local)(source, Place.at(folder), Place.at(home))
    except (DataError, ConfigError) as error:
        left = [path for path in home.rglob("*") if path.is_file()] if home.exists() else []
        named = Path(case.name).name in str(error) or "no events are left" in str(error)
        holds = (case.records is None or case.may_refuse) and named and not left and "Traceback" not in str(error)
        told = (
            f"refused: {error}" + ("" if named else " (the message does not name the file)") + (f" (left behind: {left})" if left else "")
        )
    except Exception as error:
        holds, told = False, f"{type(error).__name__}: {error}"
    else:
        rows, aside = found.num_events, found.quarantine().num_rows
        accounted = found.report().events.rows_in == rows + aside == case.records and (home / "snapshots" / found.name / MANIFEST).exists()
        holds = accounted and case.clean in (None, rows)
        told = f"{rows} clean + {aside} quarantined of {case.records}: {found.report().events.reasons}"
    if marker.exists():
        return Verdict(False, f"CODE WAS EXECUTED; {told}")
    return Verdict(holds, told)


def _local(source: SourceConfig, root: Place, home: Place) -> Snapshot:
    return ingest_local(source, root, home, now=NOW)


def must_refuse(marker: Path) -> Iterator[Case]:
    """Files that cannot be used; some carry code that would leave ``marker``."""
    yield from _text_to_refuse()
    yield from _packed_to_refuse()
    yield from _parquet_to_refuse()
    yield from _extensions(marker)
    yield from _large_to_refuse()


def must_account() -> Iterator[Case]:
    """Files with bad rows, each of which must be accounted for."""
    yield from _text_to_account()
    yield from _json_to_account()
    yield from _parquet_to_account()
    yield from _large_to_account()


# -- text --------------------------------------------------------------------------------------------------------------


def lines(count: int, start: int = 0) -> bytes:
    return b"".join(b"u%d,i%d,2024-01-01T00:00:%02d,1\n" % (n, n % 7, n % 60) for n in range(start, start + count))


def _text_to_refuse() -> Iterator[Case]:
    yield Case("empty.csv", b"")
    yield Case("header-only.csv", HEAD)
    yield Case("one-newline.csv", b"\n")
    yield Case("nul-bytes-only.csv", b"\0" * 5000)
    yield Case("latin-1-as-utf-8.csv", HEAD + lines(3) + "u,caf\xe9,2024-01-01,1\n".encode("latin-1"))
    yield Case("utf-16-as-utf-8.csv", (HEAD + lines(3)).decode().encode("utf-16"))
    yield Case("invalid-utf-8.jsonl", b'{"u": "a", "i": "b", "t": "2024-01-01", "q": 1}\n{"u": "\xff\xfe"}\n')
    yield Case("cut-in-a-character.dat", b"u::i::2024-01-01::1\nu::\xc3", table={"header": ["u", "i", "t", "q"]})
    yield Case("other-delimiter.csv", HEAD.replace(b",", b";") + lines(3).replace(b",", b";"))
    yield Case("missing-column.csv", b"u,i,when,q\n" + lines(3))
    yield Case("a-web-page.csv", b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n")
    yield Case("a-picture.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    yield Case("a-json-array.jsonl", json.dumps([{"u": "a", "i": "b", "t": "2024-01-01", "q": 1}] * 3, indent=1).encode())
    yield Case("all-ragged.csv", HEAD + b"u,i\n" * 20)
    yield Case("unclosed-quote.csv", HEAD + lines(2) + b'u,"i,2024-01-01,1\n' + lines(5000))
    yield Case("unclosed-quote-in-the-last-column.csv", HEAD + lines(2) + b'u,i,2024-01-01,"1\n' + lines(5000))
    yield Case("two-unclosed-quotes-far-apart.csv", HEAD + lines(2) + b'u,"i,2024-01-01,1\n' + lines(5000) + b'u,"i,2024-01-01,1\n')
    yield Case("unknown-ending.xlsx", b"PK\x03\x04" + b"\0" * 100)


def _text_to_account() -> Iterator[Case]:
    good = HEAD + lines(4)
    yield Case("byte-order-mark.csv", b"\xef\xbb\xbf" + good, 4, clean=4)
    yield Case("utf-16.csv", good.decode().encode("utf-16"), 4, {"encoding": "utf-16"}, clean=4)
    yield Case("windows-line-ends.csv", good.replace(b"\n", b"\r\n"), 4, clean=4)
    yield Case("old-mac-line-ends.csv", good.replace(b"\n", b"\r"), 4, clean=4)
    yield Case(
        "mixed-line-ends.csv", HEAD + lines(1) + lines(1, 1).replace(b"\n", b"\r\n") + lines(1, 2) + b"\r\n\n" + lines(1, 3), 4, clean=4
    )
    yield Case("no-last-line-end.csv", good.rstrip(b"\n"), 4, clean=4)
    yield Case("blank-lines.csv", HEAD + b"\n\n" + lines(2) + b"\n" + lines(2, 2) + b"\n\n", 4, clean=4)
    yield Case("ragged-rows.csv", good + b"short\nu,i,2024-01-01,1,too,long\n,,,\n" + lines(1, 9), 8, clean=5)
    yield Case("nul-in-an-id.csv", good + b"u\0x,i,2024-01-01,1\n", 5, clean=4)
    yield Case(
        "control-characters-in-ids.csv", good + b"u\x1b[2J,i,2024-01-01,1\nu\x7f,i,2024-01-01,1\nu\xe2\x80\xa8,i,2024-01-01,1\n", 7, clean=4
    )
    yield Case("ids-of-300-bytes.csv", good + b"x" * 300 + b",i,2024-01-01,1\nu," + "é".encode() * 129 + b",2024-01-01,1\n", 6, clean=4)
    yield Case("line-breaks-in-quotes.csv", good + b'u,"i\n1",2024-01-01,1\n"a ""b"" c",i,2024-01-01,1\n', 6, clean=5)
    yield Case("quotes-inside-words.csv", good + b'5" nail,i"i,2024-01-01,1\n', 5, clean=5)
    times = [
        "0000-00-00",
        "9999-12-31T23:59:60",
        "10000-01-01",
        "1969-12-31",
        "-1",
        "NaN",
        "inf",
        "2024-02-30",
        "2024-01-01T25:00",
        "1e30",
        "",
        " ",
    ]
    yield Case("times-that-are-none.csv", good + b"".join(b"u,i,%s,1\n" % text.encode() for text in times), 4 + len(times), clean=4)
    stamps = ["-1", "1e400", "99999999999999999999999999", "NaN", "1704067200.5", "0x10", "1_000", "\u0661\u0662"]
    numbers = b"".join(b"u,i,%s,1\n" % text.encode() for text in stamps)
    yield Case("seconds-out-of-range.csv", HEAD + b"u,i,1704067200,1\n" + numbers, 1 + len(stamps), {"clock": {"unit": "s"}}, clean=2)
    values = ["1e999", "-inf", "nan", "1,5", "1 000", "0x1F", "=1+1", "@SUM(A1)", "'1"]
    quoted = b"".join(b'u,i,2024-01-01,"%s"\n' % text.encode() for text in values)
    yield Case("numbers-that-are-none.csv", good + quoted, 4 + len(values), clean=4)
    yield Case(
        "ids-that-look-like-paths.csv",
        HEAD + b"../../etc/passwd,;DROP TABLE users,2024-01-01,1\n${jndi:ldap://x},<script>,2024-01-01,1\n",
        2,
        clean=2,
    )
    yield Case("short-and-long.dat", b"u::i::2024-01-01::1\nu::i\na::b::c::d::e\n", 3, {"header": ["u", "i", "t", "q"]}, clean=1)
    lists = {"columns": {"user_id": "user", "item_id": "item", "timestamp": "place"}, "clock": {"unit": "order"}, "format": "lists"}
    yield Case("lists.txt", b"1 2 3\n\n  4   5 \n6\n7\t8\r\n", 5, lists, clean=4)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json_to_account() -> Iterator[Case]:
    def record(**more: str) -> bytes:
        cells = {"u": '"u"', "i": '"i"', "t": '"2024-01-01"', "q": "1", **more}
        return ("{" + ", ".join(f'"{name}": {text}' for name, text in cells.items()) + "}\n").encode()

    bad = {
        "lone-surrogate": record(u=r'"\ud800"'),
        "duplicate-key": record()[:-2] + b', "u": "other"}\n',
        "not-a-number": record(q="NaN"),
        "infinity": record(q="-Infinity"),
        "object-as-id": record(u='{"id": 1}'),
        "list-as-id": record(u='["a", "b"]'),
        "broken": b'{"u": "u", \n',
        "a-number-of-5000-digits": record(q="9" * 5000),
        "deep": record(u="[" * 100_000 + "]" * 100_000),
        "array": b"[1, 2]\n",
        "text": b'"u"\n',
        "nothing": b"null\n",
        "control-character": record(u='"a\x01b"'),
        "escaped-control-character": record(u=r'"a\u0000b"'),
        "huge-exponent": record(q="1e99999"),
        "single-quotes": b"{'u': 'u'}\n",
        "two-on-a-line": record()[:-1] + record(),
    }
    for name, line in bad.items():
        yield Case(f"{name}.jsonl", record() + line, 2, clean=1)
    yield Case("numbers-as-ids.jsonl", record(u="7") + record(u="12345678901234567890123") + record(u="7.0") + record(u="true"), 4, clean=4)
    yield Case("missing-keys.jsonl", record() + b"{}\n" + b'{"u": null, "i": "i"}\n', 3, clean=1)
    yield Case("a-thousand-keys.jsonl", record(**{f"c{n}": "1" for n in range(1000)}), 1, clean=1)


# -- packed files ------------------------------------------------------------------------------------------------------


def _packed_to_refuse() -> Iterator[Case]:
    whole = gzip.compress(HEAD + lines(2000), mtime=0)
    yield Case("cut-off.csv.gz", whole[: len(whole) // 2])
    yield Case("flipped.csv.gz", whole[:200] + bytes([whole[200] ^ 0xFF]) + whole[201:])
    yield Case("wrong-checksum.csv.gz", whole[:-8] + b"\0\0\0\0" + whole[-4:])
    yield Case("not-packed.csv.gz", HEAD + lines(20))
    yield Case("cut-off.csv.bz2", bz2.compress(HEAD + lines(2000))[:-50])
    yield Case("cut-off.csv.zst", bytes(pa.compress(HEAD + lines(2000), "zstd", asbytes=True))[:-20])


# -- Parquet -----------------------------------------------------------------------------------------------------------


def parquet(table: pa.Table, **how: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **how)
    return bytes(sink.getvalue().to_pybytes())


def frame(rows: int = 4, **columns: Any) -> pa.Table:
    """A good table, some of its columns replaced."""
    good = {
        "u": pa.array([f"u{n}" for n in range(rows)]), "i": pa.array([f"i{n}" for n in range(rows)]),
        "t": pa.array([1_704_067_200_000_000 + n for n in range(rows)], pa.timestamp("us")), "q": pa.array(np.ones(rows)),
    }  # fmt: skip
    return pa.table({**good, **columns})


class Payload:
    """What runs when a pickle of it is read: it leaves a marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def _extensions(marker: Path) -> Iterator[Case]:
    """Arrow extension types whose metadata is a pickle, as in CVE-2026-41486 (``ray.data.arrow_tensor``) and CVE-2023-47248 (pyarrow)."""
    names = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_pickled_object", "arrow.py_extension_type", "some.other")
    for name in names:
        metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Payload(marker), protocol=0)}
        fields = [*frame().schema, pa.field("x", pa.list_(pa.int64()), metadata=metadata)]
        yield Case(f"extension-{name}.parquet", parquet(pa.table([*frame().columns, pa.array([[1]] * 4)], schema=pa.schema(fields))))


def _parquet_to_refuse() -> Iterator[Case]:
    whole = parquet(frame(2000))
    yield Case("empty.parquet", b"")
    yield Case("no-rows.parquet", parquet(frame(0)))
    yield Case("cut-off.parquet", whole[: len(whole) // 2])
    yield Case("head-only.parquet", b"PAR1")
    yield Case("magic-only.parquet", b"PAR1PAR1PAR1")
    yield Case("zeros.parquet", b"PAR1" + bytes(500) + b"\x10\0\0\0PAR1")
    yield Case("length-beyond-the-file.parquet", whole[:-8] + b"\xff\xff\xff\x7fPAR1")
    yield Case("footer-of-noise.parquet", whole[:-108] + bytes(range(100)) + whole[-8:])
    yield Case("encrypted-footer.parquet", whole[:-4] + b"PARE")
    yield Case("pages-of-noise.parquet", whole[:4] + bytes(byte ^ 0xFF for byte in whole[4:400]) + whole[400:])
    yield Case("a-csv-file.parquet", HEAD + lines(100))
    kinds: dict[str, pa.Array] = {
        "binary": pa.array([b"\xff\x00"] * 4, pa.binary()), "fixed-binary": pa.array([b"ab"] * 4, pa.binary(2)),
        "struct": pa.array([{"a": 1}] * 4), "map": pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
        "list": pa.array([["a"]] * 4), "duration": pa.array([1] * 4, pa.duration("s")), "time": pa.array([1] * 4, pa.time64("us")),
        "time-stamp": pa.array([1] * 4, pa.timestamp("us")), "nested-list": pa.array([[[1]]] * 4),
    }  # fmt: skip
    for kind, column in kinds.items():
        yield Case(f"user-of-{kind}.parquet", parquet(frame(u=column)))
    for kind in ("binary", "struct", "map", "duration", "time"):
        yield Case(f"kept-{kind}.parquet", parquet(frame(x=kinds[kind])), None, {"keep": ["x"]})
    yield Case("time-of-list.parquet", parquet(frame(t=kinds["list"])))
    yield Case("time-of-bool.parquet", parquet(frame(t=pa.array([True] * 4))))
    yield Case("time-of-numbers-without-unit.parquet", parquet(frame(t=pa.array([1_704_067_200] * 4))))
    yield Case("value-of-bool.parquet", parquet(frame(q=pa.array([True] * 4))))
    yield Case("missing-column.parquet", parquet(frame().drop_columns(["t"])))


def _zero_pages() -> bytes:
    """512 MiB of zeros, packed into some KiB."""
    part = pa.table({"x": pa.array(["\0" * (1 << 20)] * 32), **{name: pa.repeat(frame(1)[name][0], 32) for name in "uitq"}})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, part.schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for _ in range(16):
            writer.write_table(part)
    return bytes(sink.getvalue().to_pybytes())


def _parquet_to_account() -> Iterator[Case]:
    yield Case("plain.parquet", parquet(frame()), 4, clean=4)
    yield Case("many-row-groups.parquet", parquet(frame(100), row_group_size=3), 100, clean=100)
    kinds: dict[str, tuple[dict[str, Any], int]] = {
        "dictionary": ({"u": pa.array(["a", "b", "a", None]).dictionary_encode()}, 3),
        "large-string": ({"u": pa.array(list("abcd"), pa.large_string())}, 4),
        "string-view": ({"u": pa.array(list("abcd"), pa.string_view())}, 4),
        "decimal": ({"q": pa.array([Decimal("1.5")] * 4)}, 4),
        "decimal-256": ({"q": pa.array([Decimal("1.5")] * 4, pa.decimal256(50, 3))}, 4),
        "half-float": ({"q": pa.array(np.ones(4, np.float16))}, 4),
        "unsigned-id": ({"u": pa.array([2**64 - 1, 1, 2, 3], pa.uint64())}, 4),
        "float-id": ({"u": pa.array([1.0, 2.5, float("nan"), 1e300])}, 1),
        "bool-id": ({"u": pa.array([True, False, None, True])}, 3),
        "all-null": ({"q": pa.nulls(4)}, 4),
        "date": ({"t": pa.array([0, 19_000, 2**31 - 1, -(2**31)], pa.date32())}, 2),
        "date-64": ({"t": pa.array([0, 86_400_000, 2**62, -86_400_000], pa.date64())}, 2),
        "beyond-time": ({"t": pa.array([1_704_067_200_000, 2**62, -(2**62), None], pa.timestamp("ms"))}, 1),
        "nanoseconds": ({"t": pa.array([1_704_067_200_000_000_001, 1, -2_000, 2**63 - 1], pa.timestamp("ns"))}, 2),
        "zoned": ({"t": pa.array([1_704_067_200_000] * 4, pa.timestamp("ms", "America/New_York"))}, 4),
        "infinite-value": ({"q": pa.array([float("inf"), float("-inf"), float("nan"), 1.0])}, 2),
        "huge-value": ({"q": pa.array([1e300, 1.0, -1e300, 2.0])}, 2),
        "text-value": ({"q": pa.array(["1", "x", "", "1e3"])}, 2),
        "nul-id": ({"u": pa.array(["a\0b", "c", "d", "e"])}, 3),
    }
    for kind, (columns, clean) in kinds.items():
        yield Case(f"{kind}.parquet", parquet(frame(**columns)), 4, clean=clean)
    yield Case("lists.parquet", parquet(frame(x=pa.array([[1.0], None, [], [2.0, None]]))), 4, {"keep": ["x"]}, clean=4)
    yield Case("unused-struct.parquet", parquet(frame(x=pa.array([{"a": 1}] * 4))), 4, clean=4)


# -- large files -------------------------------------------------------------------------------------------------------


def _large_to_refuse() -> Iterator[Case]:
    yield Case("a-line-without-end.csv", HEAD + lines(2) + b"u," + b"x" * (20 << 20) + b",2024-01-01,1\n")
    yield Case("a-line-without-end.jsonl", b'{"u": "a"}\n{"u": "' + b"x" * (20 << 20) + b'"}\n')
    yield Case("no-line-end-at-all.jsonl", b"[" * (9 << 20))
    zeros = gzip.compress(bytes(16 << 20), mtime=0)
    yield Case("a-bomb-of-zeros.csv.gz", gzip.compress(HEAD + lines(2), mtime=0) + zeros * 64)  # 1 GiB in 1 MiB
    rows = gzip.compress(b"u,i,2024-01-01,1\n" * 1_000_000, mtime=0)
    yield Case("a-bomb-of-rows.csv.gz", gzip.compress(HEAD, mtime=0) + rows * 64)  # 64 million rows in 3 MiB
    yield Case(
        "a-bomb-of-lines.jsonl.gz",
        gzip.compress(b'{"u": "u", "i": "i", "t": "2024", "q": 1}\n', mtime=0) + gzip.compress(b"{}\n" * 5_000_000, mtime=0) * 32,
    )
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int32)), pa.array(["x" * (1 << 20)]))
    bomb = pa.table({"u": long, **{name: pa.repeat(frame(1)[name][0], 2_000_000) for name in "itq"}})
    packed = parquet(bomb, use_dictionary=["u"], dictionary_pagesize_limit=4 << 20)  # 2 TB when decoded
    yield Case("a-bomb-of-one-long-text.parquet", packed)
    yield Case("a-bomb-of-zero-pages.parquet", _zero_pages(), None, {"keep": ["x"]})


def _large_to_account() -> Iterator[Case]:
    good = HEAD + lines(4)
    yield Case("a-cell-of-5-mb.csv", good + b"u," + b"x" * (5 << 20) + b",2024-01-01,1\n", 5, clean=4)
    yield Case("a-title-of-5-mb.csv", b"u,i,t,q,title\n" + b"u,i,2024-01-01,1," + b"x" * (5 << 20) + b"\n", 1, {"keep": ["title"]}, clean=1)
    many = b",".join(b"c%d" % n for n in range(996))
    wide = b"u,i,t,q," + many + b"\n" + b"".join(line + b",1" * 996 + b"\n" for line in lines(4).splitlines())
    yield Case("a-thousand-columns.csv", wide, 4, clean=4)
    yield Case("a-thousand-kept-columns.csv", wide, 4, {"keep": many.decode().split(",")}, clean=4)
    long = json.dumps({"u": "x" * (5 << 20), "i": "i", "t": "2024-01-01", "q": 1}).encode() + b"\n"
    yield Case("a-string-of-5-mb.jsonl", long + b'{"u": "u", "i": "i", "t": "2024-01-01", "q": 1}\n', 2, clean=1)
    columns = frame(4, **{f"c{n}": pa.array([1, 2, 3, 4]) for n in range(996)})
    yield Case("a-thousand-columns.parquet", parquet(columns), 4, {"keep": [f"c{n}" for n in range(996)]}, clean=4)
    yield Case("a-text-of-5-mb.parquet", parquet(frame(u=pa.array(["x" * (5 << 20), "b", "c", "d"]))), 4, clean=3)


def flipped(count: int) -> Iterator[Case]:
    """A Parquet file with one byte changed, ``count`` times at places spread over it: refused, or every row it claims accounted for."""
    whole = parquet(frame(50))
    for place in np.linspace(4, len(whole) - 5, count).astype(int).tolist():
        yield Case(f"byte-{place}.parquet", whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :], 50, may_refuse=True)
