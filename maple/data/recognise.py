"""Data folders of a layout known from elsewhere: MovieLens, RecBole atomic files, lists of items, (user, item, rating, time) frames.

A layout is recognised by names of files and columns, never by values alone, and says so in ``about``. Two that fit are an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import Place
from maple.data.files import atomic_types, columns_of, decoded, open_parquet
from maple.data.fragments import Fragment
from maple.data.readers import raw_batches
from maple.data.sources import FileSource, SourceConfig, TableSource
from maple.errors import ConfigError, DataError, MapleError

READABLE = (".csv", ".tsv", ".jsonl", ".parquet", ".dat", ".inter", ".item", ".user")
TITLES = ("title", "movie_title", "name", "item_name", "product_title")
CATEGORIES = ("category", "categories", "genre", "genres", "class")
#: Numbers at least this large count seconds, milliseconds or microseconds since 1970; smaller ones are only an order.
EPOCHS = (("us", 10**14), ("ms", 10**11), ("s", 10**8))

Plain = dict[str, Any]


def recognise(root: Place) -> SourceConfig | None:
    """The source of a folder whose layout is known; None where it is not; ``ConfigError`` where it fits several."""
    found = [plain for layout in LAYOUTS for plain in layout(root)]
    if len(found) > 1:
        told = "; ".join(plain["about"] for plain in found)
        raise ConfigError(f"{root.uri} fits several layouts ({told}). Write source.yaml there to say which tables hold the events.")
    if not found:
        return None
    plain = {"name": re.sub(r"[^\w.-]+", "-", root.name) or "custom", **found[0]}
    kind = plain["events"]["constants"]["event"]
    shared: Plain = {"targets": [kind], "signals": {kind: 1.0}, "items_from_events": {"price": False, "created_at": False}}
    if plain["events"].get("clock", {}).get("unit") == "order":
        shared["session_gap_minutes"] = None
    return SourceConfig.parse({**shared, **plain}, f"layout of {root.uri}")


def _movielens(root: Place) -> Iterator[Plain]:
    """MovieLens: ``ratings.dat`` (1M, 10M), ``u.data`` (100K), ``ratings.csv`` (since 20M), with their films and users."""
    columns = {"user_id": "user", "item_id": "movie", "value": "rating", "timestamp": "time"}
    base = {"constants": {"event": "rating"}, "clock": {"unit": "s"}}
    title_year = {"year": {"column": "title", "pattern": r"\((?P<value>\d{4})\)\s*$"}}
    films: Plain = {"columns": {"item_id": "movie", "title": "title"}, "keep": ["genres"], "types": {"year": "int"}, "encoding": "latin-1"}
    genre = {"category": {"column": "genres", "pattern": r"^(?P<value>[^|]+)"}}
    if _has(root, "ratings.dat"):
        people = {"path": "users.dat", "header": ["user", "gender", "age", "occupation", "zip"], "columns": {"user_id": "user"}}
        yield {
            "about": "MovieLens, recognised by ratings.dat",
            "events": {"path": "ratings.dat", "header": ["user", "movie", "rating", "time"], "columns": columns, **base},
            "items": {**films, "path": "movies.dat", "header": ["movie", "title", "genres"], "extract": {**title_year, **genre}}
            if _has(root, "movies.dat")
            else None,
            "users": {**people, "keep": ["gender", "age", "occupation", "zip"]} if _has(root, "users.dat") else None,
        }
    if _has(root, "u.data"):
        names = ["movie", "title", "released", "video", "url", *(f"g{number}" for number in range(19))]
        film = {"path": "u.item", "format": "csv", "delimiter": "|", "header": names, "columns": films["columns"], "encoding": "latin-1"}
        people = {"path": "u.user", "format": "csv", "delimiter": "|", "header": ["user", "age", "gender", "occupation", "zip"]}
        yield {
            "about": "MovieLens 100K, recognised by u.data",
            "events": {"path": "u.data", "format": "tsv", "header": ["user", "movie", "rating", "time"], "columns": columns, **base},
            "items": {**film, "extract": title_year, "types": {"year": "int"}} if _has(root, "u.item") else None,
            "users": {**people, "columns": {"user_id": "user"}, "keep": ["age", "gender", "occupation", "zip"], "types": {"age": "int"}}
            if _has(root, "u.user")
            else None,
        }
    if _has(root, "ratings.csv") and columns_of(root / "ratings.csv") == ["userId", "movieId", "rating", "timestamp"]:
        theirs = {"user_id": "userId", "item_id": "movieId", "value": "rating", "timestamp": "timestamp"}
        new = {"path": "movies.csv", "columns": {"item_id": "movieId", "title": "title"}, "extract": {**title_year, **genre}}
        yield {
            "about": "MovieLens, recognised by ratings.csv",
            "events": {"path": "ratings.csv", "columns": theirs, **base},
            "items": {**new, "keep": ["genres"], "types": {"year": "int"}} if _has(root, "movies.csv") else None,
        }


def _atomic(root: Place) -> Iterator[Plain]:
    """RecBole atomic files: ``<name>.inter`` with typed columns, and ``.item`` and ``.user`` beside it."""
    for place in _named(root, r"\.inter$"):
        name = place.name.removesuffix(".inter")
        types = atomic_types(place, FileSource(path=place.name))
        if not {"user_id", "item_id", "timestamp"} <= set(types):
            continue
        columns = {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp"}
        columns |= {to: name for to, name in (("value", "rating"), ("price", "price")) if types.get(name) == "float"}
        plain: Plain = {
            "about": f"RecBole atomic files, recognised by {place.name}",
            "events": {
                "path": place.name, "columns": columns, "constants": {"event": "rating" if "value" in columns else "click"},
                "keep": {_free(key): key for key in types if key not in columns.values()}, "clock": {"unit": _unit(place, "timestamp")},
            },
        }  # fmt: skip
        for ending, what, key in ((".item", "items", "item_id"), (".user", "users", "user_id")):
            side = root / f"{name}{ending}"
            if side.exists():
                declared = atomic_types(side, FileSource(path=side.name))
                mapped, first = {key: key}, {}
                if what == "items":
                    title = next((name for name in TITLES if name in declared), None)
                    mapped |= {"title": title} if title else {}
                    mapped |= {name: name for name in ("brand", "price") if name in declared}
                    category = next((name for name in CATEGORIES if name in declared), None)
                    first = {"category": {"column": category, "pattern": r"^(?P<value>[^ ]+)"}} if category else {}
                kept = {_free(name, first): name for name in declared if name not in mapped.values()}
                plain[what] = {"path": side.name, "columns": mapped, "extract": first, "keep": kept}
        yield plain


def _lists(root: Place) -> Iterator[Plain]:
    """Lines of ``user item item ...`` in whole numbers, oldest first: one text file, or ``train.txt`` (``valid.txt``) and ``test.txt``."""
    found = [place for place in _named(root, r"\.txt$") if _is_list(place)]
    parts = [root / name for name in ("train.txt", "valid.txt", "test.txt")]
    names = [place.name for place in found]
    chosen = [part.name for part in parts if part.name in names] if "train.txt" in names else names[:1]
    if not found or set(names) != set(chosen):
        if len(found) > 1:
            raise ConfigError(
                f"{root.uri} holds several lists of items ({', '.join(names)}). Write source.yaml there: events: {{path: {names[0]}, "
                "format: lists, columns: {user_id: user, item_id: item, timestamp: place}, constants: {event: click}, clock: {unit: order}}"
            )
        return
    yield {
        "about": f"lists of items per user, recognised by {', '.join(chosen)}; the order of a line stands for time",
        "events": {
            "path": chosen, "format": "lists", "columns": {"user_id": "user", "item_id": "item", "timestamp": "place"},
            "constants": {"event": "click"}, "clock": {"unit": "order"},
        },
    }  # fmt: skip


def _frames(root: Place) -> Iterator[Plain]:
    """(userID, itemID, rating, timestamp) tables as Microsoft Recommenders writes them, whatever the case and underscores of the names."""
    for place in _named(root, r"\.(csv|tsv|parquet|jsonl)(\.gz)?$"):
        try:
            names = columns_of(place)
        except DataError:  # a damaged file beside the others; reading it says so
            continue
        known = {re.sub(r"[^a-z]", "", name.lower()): name for name in names}
        if not {"userid", "itemid", "timestamp"} <= set(known):
            continue
        columns = {"user_id": known["userid"], "item_id": known["itemid"], "timestamp": known["timestamp"]}
        columns |= {"value": known["rating"]} if "rating" in known else {}
        kept = {_free(name): name for name in names if name not in columns.values()}
        yield {
            "about": f"(user, item, rating, time) table, recognised by the columns of {place.name}",
            "events": {
                "path": place.name, "columns": columns, "constants": {"event": "rating" if "value" in columns else "click"}, "keep": kept,
                "clock": {"unit": _unit(place, columns["timestamp"])},
            },
        }  # fmt: skip


LAYOUTS: Sequence[Callable[[Place], Iterator[Plain]]] = (_movielens, _atomic, _lists, _frames)


def how_to_write(root: Place, presets: Sequence[str]) -> str:
    """What to tell someone whose folder Maple does not know: the columns found, and a mapping to start from."""
    found: list[tuple[str, list[str]]] = []
    for child in root.children():
        if child.name.lower().endswith(READABLE) and len(found) < 5:
            try:
                found.append((child.name, columns_of(child)))
            except MapleError:
                found.append((child.name, []))
    if not found:
        return f"{root.uri} holds no table that Maple reads ({', '.join(READABLE)}); check the path (presets: {', '.join(presets)})"
    listed = "\n".join(f"  {name}: {', '.join(columns[:30]) or '(no columns could be read)'}" for name, columns in found)
    return (
        f"{root.uri} has no source.yaml, is not a preset ({', '.join(presets)}) and has no known layout. Its tables:\n{listed}\n"
        "Write source.yaml there, for example:\n"
        f"  events:\n    path: {found[0][0]}\n    columns: {{user_id: <column>, item_id: <column>, timestamp: <column>, "
        "session_id: <column>, value: <quantity>, price: <unit price>}\n    constants: {event: purchase}"
    )


def _has(root: Place, name: str) -> bool:
    return (root / name).exists()


def _named(root: Place, pattern: str) -> list[Place]:
    return [child for child in root.children() if re.search(pattern, child.name)]


def _free(name: str, others: Collection[str] = ()) -> str:
    """A name that a kept column may have beside ``others``."""
    taken = {*others, "user_id", "item_id", "event", "event_id", "timestamp", "value", "price", "session_id", "request_id", "reason"}
    return f"source_{name}" if name in taken or name.startswith("_") else name


def _is_list(place: Place) -> bool:
    with place.fs.open_input_stream(place.path) as stream:
        start = bytes(stream.read(1 << 16))
    try:
        lines = decoded(start, "utf-8").splitlines()
    except UnicodeDecodeError:
        return False
    lines = lines[:-1] if len(start) == 1 << 16 else lines  # the last one may be cut off
    words = [line.split() for line in lines if line.strip()]
    whole = all(word.isdecimal() for line in words for word in line)
    return bool(words) and whole and sum(len(line) >= 2 for line in words) > 0.9 * len(words)


def _unit(place: Place, column: str) -> str:
    """How a time column counts, told from its type or its first values."""
    table = TableSource(path=place.name)
    groups: tuple[int, ...] | None = None
    if table.format_of(place.name) == "parquet":
        groups = tuple(range(open_parquet(place, place.name).metadata.num_row_groups))
    head = Fragment(place.name, place, rows=1 << 62, groups=groups)
    for raw, _, _ in islice(raw_batches(table, [column], head), 1):
        values = raw[column].drop_null()
        if pa.types.is_temporal(values.type) or len(values) == 0:
            return "iso"
        texts = pc.utf8_trim_whitespace(values.cast(pa.string()).slice(0, 1000))
        if not pc.all(pc.match_substring_regex(texts, r"^-?\d+(\.\d*)?([eE]\+?\d+)?$")).as_py():
            return "iso"
        largest = pc.max(texts.cast(pa.float64())).as_py()
        return next((unit for unit, least in EPOCHS if largest >= least), "order")
    return "iso"
