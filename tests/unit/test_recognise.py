"""Folders of known layouts are read as they are; what fits several, or none, is an error that says what to write."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place
from maple.data.presets import load_source
from maple.data.report import UNREADABLE
from maple.data.sources import SourceConfig
from maple.data.tables import Tables
from maple.errors import ConfigError
from maple.schema import EVENTS, ITEMS, USERS

WHEN = datetime(2024, 3, 1, 10, tzinfo=UTC)
STAMP = int(WHEN.timestamp())


def rows(source: SourceConfig, folder: Path, what: str = "events") -> pa.Table:
    tables = {"events": source.events, "items": (source.items,), "users": (source.users,)}[what]
    found = Tables.open([table for table in tables if table], {"events": EVENTS, "items": ITEMS, "users": USERS}[what], Place.at(folder))
    made = pa.concat_tables(list(found.batches()))
    assert made[UNREADABLE].null_count == made.num_rows
    return made


def check(folder: Path, about: str, *, rating: bool = True) -> SourceConfig:
    source, root = load_source(str(folder))
    assert about in source.about
    assert root.local == folder
    events = rows(source, folder)
    assert events["user_id"].to_pylist() == ["1", "2"]
    assert events["item_id"].to_pylist() == ["10", "20"]
    assert events["timestamp"][0].as_py() == WHEN
    assert events["value"].to_pylist() == ([4.5, 3.0] if rating else [None, None])
    assert set(events["event"].to_pylist()) == set(source.targets) == {"rating" if rating else "click"}
    return source


def test_movielens_of_every_age(tmp_path: Path) -> None:
    for name in ("1m", "100k", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "1m" / "ratings.dat").write_text(f"1::10::4.5::{STAMP}\n2::20::3::{STAMP + 1}\n")
    (tmp_path / "1m" / "movies.dat").write_bytes("10::Café (1995)::Drama|War\n20::Heat (1996)::War\n".encode("latin-1"))
    (tmp_path / "1m" / "users.dat").write_text("1::F::25::4::12345\n")
    source = check(tmp_path / "1m", "ratings.dat")
    films = rows(source, tmp_path / "1m", "items").select(["title", "category", "year", "genres"]).to_pylist()
    assert films[0] == {"title": "Café (1995)", "category": "Drama", "year": 1995, "genres": "Drama|War"}
    assert rows(source, tmp_path / "1m", "users")["occupation"].to_pylist() == ["4"]
    (tmp_path / "100k" / "u.data").write_text(f"1\t10\t4.5\t{STAMP}\n2\t20\t3\t{STAMP}\n")
    (tmp_path / "100k" / "u.item").write_bytes(("10|Café (1995)|01-Jan-1995||http://x" + "|0" * 19 + "\n").encode("latin-1"))
    (tmp_path / "100k" / "u.user").write_text("1|24|M|technician|85711\n")
    source = check(tmp_path / "100k", "u.data")
    assert rows(source, tmp_path / "100k", "items").select(["title", "year"]).to_pylist() == [{"title": "Café (1995)", "year": 1995}]
    assert rows(source, tmp_path / "100k", "users")["age"].to_pylist() == [24]
    (tmp_path / "new" / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n1,10,4.5,{STAMP}\n2,20,3,{STAMP}\n")
    (tmp_path / "new" / "movies.csv").write_text('movieId,title,genres\n10,"Heat, The (1995)",Drama|War\n')
    source = check(tmp_path / "new", "ratings.csv")
    assert rows(source, tmp_path / "new", "items")["title"].to_pylist() == ["Heat, The (1995)"]


def test_atomic_files_use_their_types(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text(
        f"user_id:token\titem_id:token\trating:float\ttimestamp:float\tprice:float\n1\t10\t4.5\t{STAMP}\t9\n2\t20\t3\t{STAMP}\t8\n"
    )
    (tmp_path / "x.item").write_text(
        "item_id:token\tname:token_seq\tclass:token_seq\tvector:float_seq\n10\tRed hat\tA B\t1 -2.5\n20\tCap\tB\t\n"
    )
    (tmp_path / "x.user").write_text("user_id:token\tage:float\tzip:token\n1\t24\t007\n")
    source = check(tmp_path, "x.inter")
    assert rows(source, tmp_path)["price"].to_pylist() == [9.0, 8.0]
    items = rows(source, tmp_path, "items").select(["title", "category", "class", "vector"]).to_pylist()
    assert items == [
        {"title": "Red hat", "category": "A", "class": ["A", "B"], "vector": [1.0, -2.5]},
        {"title": "Cap", "category": "B", "class": ["B"], "vector": None},
    ]
    assert rows(source, tmp_path, "users").select(["age", "zip"]).to_pylist() == [{"age": 24.0, "zip": "007"}]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_frames_of_microsoft_recommenders(tmp_path: Path, kind: str) -> None:
    frame = pa.table({"userID": [1, 2], "itemID": [10, 20], "rating": [4.5, 3.0], "timestamp": [STAMP, STAMP + 5]})
    if kind == "parquet":
        pq.write_table(frame, tmp_path / "train.parquet")
    else:
        (tmp_path / "train.csv").write_text(f"userID,itemID,rating,timestamp\n1,10,4.5,{STAMP}\n2,20,3,{STAMP}\n")
    assert check(tmp_path, f"train.{kind}").events[0].clock.unit == "s"


def test_frames_may_have_no_rating_and_times_of_any_kind(tmp_path: Path) -> None:
    for unit, text in (("ms", str(STAMP * 1000)), ("iso", "2024-03-01T10:00:00Z"), ("us", str(STAMP * 1_000_000))):
        (tmp_path / unit).mkdir()
        (tmp_path / unit / "log.jsonl").write_text("".join(f'{{"user_id": {n}, "item_id": {n}0, "timestamp": "{text}"}}\n' for n in (1, 2)))
        assert check(tmp_path / unit, "log.jsonl", rating=False).events[0].clock.unit == unit
    (tmp_path / "order").mkdir()
    (tmp_path / "order" / "log.csv").write_text("user_id,item_id,timestamp\n1,2,7\n")
    source = load_source(str(tmp_path / "order"))[0]
    assert (source.ordered, source.session_gap_minutes) == (True, None)


def test_lists_of_items(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1 5 6\n2 5\n")
    (tmp_path / "test.txt").write_text("1 7\n3 5 5\n")
    (tmp_path / "about.txt").write_text("Made in 2019 by me\n")
    source, _ = load_source(str(tmp_path))
    assert "recognised by train.txt, test.txt" in source.about
    found = rows(source, tmp_path).sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    assert found["user_id"].to_pylist() == ["1", "1", "1", "2", "3", "3"]
    assert found["item_id"].to_pylist() == ["5", "6", "7", "5", "5", "5"]  # what test.txt has of a user comes after train.txt
    (tmp_path / "more.txt").write_text("1 2\n")
    with pytest.raises(ConfigError, match=r"several lists of items .*format: lists"):
        load_source(str(tmp_path))


def test_what_fits_several_layouts_or_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("client;article\n1;2\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"(?s)no known layout.*orders.csv: client;article"):
        load_source(str(tmp_path))
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(f"userID,itemID,timestamp\n1,2,{STAMP}\n")
    with pytest.raises(ConfigError, match=r"several layouts .*columns of a\.csv; .*columns of b\.csv"):
        load_source(str(tmp_path))
    (tmp_path / "a.csv").unlink()
    assert load_source(str(tmp_path))[0].events[0].path == "b.csv"
    with pytest.raises(ConfigError, match="reads no https:// addresses"):
        load_source("https://example.org/data")


def test_published_lists_are_recognised(data_dir: Path) -> None:
    source, root = load_source(str(data_dir / "ml-1m" / "ultragcn-split"))
    assert Tables.open(source.events, EVENTS, root).num_rows == 796_244 + 99_455
