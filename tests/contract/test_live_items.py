"""The contract of live items, on each backend."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_server import RedisServer

from maple.errors import ArtifactError, DataError
from maple.features import live_items_redis
from maple.features.live_items import FIELDS, LiveItem, LiveItems
from maple.features.live_items_redis import RedisItems
from maple.features.live_items_sqlite import SqliteItems

NewPlace = Callable[[], Callable[[], LiveItems]]

FULL: dict[str, Any] = {
    "available": True, "stock": 12, "price": 9.5, "promotion": (5, None), "title": "Kännchen ☕", "category": "home", "brand": "b",
    "created_at": 1_700_000_000_000_000, "attributes": {"colour": "red", "weight": 1, "new": True, "tags": ["a", "b"]},
}  # fmt: skip
WRONG: dict[str, list[Any]] = {
    "available": [1, "yes"],
    "stock": [-1, float("nan"), True, "3"],
    "price": [-0.5, 2e9, float("inf"), "1"],
    "title": [3, "x" * 2000, "\ud800"],
    "promotion": [(5, 5), (7, 3), 5, (1,), ("a", None), (-1, None)],
    "category": ["", "a\nb", "x" * 300],
    "brand": [7],
    "created_at": [-1, 1.5, 1 << 60],
    "attributes": [3, {"a": {"b": 1}}, {"": 1}, {f"a{n}": n for n in range(101)}],
    "deleted": ["yes"],
    "colour": ["red"],
}

changes = st.dictionaries(st.sampled_from([name for name in FIELDS if name not in ("deleted", "attributes")]), st.booleans(), max_size=3)


class LiveSuite:
    """What both backends must do; they give ``new_place``: an empty place at each call, that can be connected to many times."""

    @pytest.fixture
    def again(self, new_place: NewPlace) -> Callable[[], LiveItems]:
        return new_place()

    @pytest.fixture
    def items(self, again: Callable[[], LiveItems]) -> Iterator[LiveItems]:
        items = again()
        yield items
        items.close()

    def test_it_is_the_overlay(self, items: LiveItems) -> None:
        assert isinstance(items, LiveItems)
        assert items.get("nothing") is None
        assert items.since(0) == (0, [])

    def test_an_item_needs_nothing_but_an_id(self, items: LiveItems) -> None:
        made = items.put("ü/{x}:☃", {})
        assert made == LiveItem("ü/{x}:☃", number=0, version=1) == items.get("ü/{x}:☃")
        assert items.since(0) == (1, [made])

    def test_everything_can_be_said_and_taken_away(self, items: LiveItems) -> None:
        made = items.put("cup", FULL)
        assert {name: getattr(made, name) for name in FULL} == FULL
        assert made == items.get("cup")
        assert items.put("cup", {"price": 8.0, "stock": None, "attributes": {"colour": None, "size": "L"}}).attributes == {
            "weight": 1, "new": True, "tags": ["a", "b"], "size": "L",
        }  # fmt: skip
        found = items.get("cup")
        assert found is not None
        assert (found.price, found.stock, found.title) == (8.0, None, "Kännchen ☕")
        bare = items.put("cup", dict.fromkeys(FULL))
        assert bare == LiveItem("cup", number=0, version=bare.version)

    def test_versions_grow_and_since_gives_each_changed_item_once(self, items: LiveItems, again: Callable[[], LiveItems]) -> None:
        for name in ("a", "b", "c"):
            items.put(name, {"stock": 1})
        seen, all_three = items.since(0)
        assert [(item.item_id, item.number) for item in all_three] == [("a", 0), ("b", 1), ("c", 2)]
        items.put("b", {"stock": 2})
        items.put("a", {"stock": 3})
        items.put("b", {"price": 4.0})
        other = again()  # as after a restart
        latest, changed = other.since(seen)
        assert [(item.item_id, item.stock, item.price) for item in changed] == [("a", 3, None), ("b", 2, 4.0)]
        assert latest == changed[-1].version > seen
        assert other.since(latest) == (latest, [])
        assert other.put("d", {}).number == 3
        other.close()

    def test_a_version_of_another_store_gives_everything(self, items: LiveItems) -> None:
        items.put("a", {})
        assert items.since(1000) == (1, [items.get("a")])

    def test_withdrawing_and_coming_back(self, items: LiveItems) -> None:
        items.put("a", FULL)
        items.put("b", {})
        for gone in (items.delete("a"), items.put("a", {"deleted": True})):
            assert gone == LiveItem("a", number=0, version=gone.version, deleted=True)
        assert [(item.item_id, item.deleted) for item in items.since(0)[1]] == [("b", False), ("a", True)]
        back = items.put("a", {"stock": 1})
        assert back == LiveItem("a", number=0, version=back.version, stock=1.0)
        assert items.delete("never seen").deleted
        with pytest.raises(DataError, match="withdrawn and described"):
            items.put("a", {"deleted": True, "stock": 1})

    def test_what_is_not_legal_changes_nothing(self, items: LiveItems) -> None:
        items.put("a", {"stock": 1})
        for name, values in WRONG.items():
            for value in values:
                with pytest.raises(DataError, match=name.removesuffix("s") if name in FIELDS else "Known: attributes"):
                    items.put("a", {"available": False, name: value})
        for wrong in ("", "a\nb", "x" * 257):
            with pytest.raises(DataError, match="item_id"):
                items.put(wrong, {})
        items.put("a", {"attributes": {f"a{n}": n for n in range(100)}})
        with pytest.raises(DataError, match="101 attributes"):
            items.put("a", {"attributes": {"one more": 1}})
        assert [(item.version, item.available) for item in items.since(0)[1]] == [(2, None)]

    def test_changes_at_the_same_time_lose_no_field(self, items: LiveItems, again: Callable[[], LiveItems]) -> None:
        second = again()
        said = [(items, {"stock": 1}), (second, {"price": 2.0}), (items, {"title": "t"}), (second, {"attributes": {"a": 1}})]
        said += [(items, {"attributes": {"b": 2}}), (second, {"category": "c"})]
        start = threading.Barrier(len(said))

        def work(where: LiveItems, what: dict[str, Any]) -> None:
            start.wait()
            for number in range(8):
                where.put("one", what)
                where.put(f"{next(iter(what))}{number}", {})

        threads = [threading.Thread(target=work, args=each) for each in said]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one = items.get("one")
        assert one is not None
        assert (one.stock, one.price, one.title, one.attributes, one.category) == (1, 2.0, "t", {"a": 1, "b": 2}, "c")
        latest, found = second.since(0)
        assert sorted(item.number for item in found) == list(range(len(found)))
        assert len(found) == 1 + 5 * 8
        versions = [item.version for item in found]
        assert versions == sorted(set(versions))
        assert versions[-1] == latest == 2 * 6 * 8
        second.close()

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(["a", "b"]), changes), max_size=12), st.lists(st.integers(0, 12), max_size=4))
    def test_an_overlay_fed_by_since_is_the_store(
        self, new_place: NewPlace, said: list[tuple[str, dict[str, bool]]], polls: list[int]
    ) -> None:
        items = new_place()()
        overlay: dict[str, LiveItem] = {}
        seen = 0
        for place, (name, named) in enumerate(said):
            items.put(name, {field: FULL[field] if there else None for field, there in named.items()})
            if place in polls:
                seen, changed = items.since(seen)
                overlay |= {item.item_id: item for item in changed}
        seen, changed = items.since(seen)
        overlay |= {item.item_id: item for item in changed}
        expected: dict[str, dict[str, Any]] = {}
        for name, named in said:
            expected.setdefault(name, {}).update({field: FULL[field] if there else None for field, there in named.items()})
        assert {name: {field: getattr(item, field) for field in expected[name]} for name, item in overlay.items()} == expected
        items.close()


class TestSqliteItems(LiveSuite):
    @pytest.fixture
    def new_place(self, tmp_path: Path) -> NewPlace:
        numbers = itertools.count()

        def make() -> Callable[[], LiveItems]:
            path = tmp_path / f"live{next(numbers)}.sqlite"
            return lambda: SqliteItems(path)

        return make

    def test_a_file_that_is_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "junk").write_bytes(b"not a database, by far" * 200)
        with pytest.raises(ArtifactError, match="cannot be opened as the live items"):
            SqliteItems(tmp_path / "junk")


class TestRedisItems(LiveSuite):
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
        server = RedisServer(tmp_path_factory.mktemp("redis"))
        yield server
        server.stop()

    @pytest.fixture
    def new_place(self, server: RedisServer, tmp_path: Path) -> NewPlace:
        numbers = itertools.count()

        def make() -> Callable[[], LiveItems]:
            prefix = f"{tmp_path.name}{next(numbers)}"
            return lambda: RedisItems(server.url, prefix=prefix)

        return make

    def test_many_changes_come_in_pages(self, items: LiveItems, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(live_items_redis, "_PAGE", 3)
        for number in range(7):
            items.put(f"i{number}", {})
        latest, found = items.since(0)
        assert [item.item_id for item in found] == [f"i{number}" for number in range(7)]
        assert latest == 7
