"""One contract for every online store, and what is particular to each backend."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis
from needs import require
from shop import ITEMS, T0, table

from maple.data.dataset import Vocab
from maple.errors import ArtifactError, ConfigError, DataError, ServeError
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.states import KEYED, UserState
from maple.features.store import Ack, Event, OnlineStore, rows_of
from maple.features.store_redis import RedisStore
from maple.features.store_sqlite import SqliteStore
from maple.features.view import Key

CATALOGUE = Catalogue.from_table(Vocab(ITEMS["item_id"].combine_chunks()), ITEMS)
FOLDER = Folder(FeatureSpec(), CATALOGUE)
OTHER = Folder(FeatureSpec(half_lives=(2.0,)), CATALOGUE)


def events(count: int = 40, users: int = 3, seed: int = 1) -> list[Event]:
    """Events of a few users, many at the same moment, ids in no order."""
    draw = random.Random(seed)
    kinds = ["view", "purchase", "add_to_cart", "return", "rating"]
    return [
        Event(
            f"e{draw.randrange(10**9):09d}", f"u{draw.randrange(users)}", draw.choice(["apple", "cup", "dish", "egg", "unknown"]),
            draw.choice(kinds), T0 + draw.randrange(6) * DAY, draw.choice([None, 1.0, 2.5]), draw.choice([None, 4.0]), None, None, {},
        )
        for _ in range(count)
    ]  # fmt: skip


def clean(made: list[Event], user: str, folder: Folder = FOLDER) -> UserState:
    """The state of a user folded once, in order, without a store."""
    log = sorted({event.event_id: event for event in made if event.user_id == user}.values(), key=lambda event: event.order)
    return folder.advance([folder.empty(user)], rows_of([log]))[0]


def check_same(one: UserState, two: UserState) -> None:
    assert (one.user, one.items, one.size, one.tail) == (two.user, two.items, two.size, two.tail)
    np.testing.assert_array_equal(one.times, two.times)
    for key in (Key.USER, *KEYED):
        order = [one.keyed[key].index[text] for text in two.keyed[key].ids]
        assert len(order) == len(one.keyed[key].ids)
        np.testing.assert_array_equal(one.keyed[key].state[order], two.keyed[key].state)
        np.testing.assert_array_equal(one.keyed[key].last[order], two.keyed[key].last)


class StoreSuite:
    """What every backend must do. Subclasses give ``store``, and ``again``: another connection to the same data."""

    def test_it_is_a_store(self, store: OnlineStore) -> None:
        assert isinstance(store, OnlineStore)

    def test_the_next_read_sees_an_acknowledged_event(self, store: OnlineStore) -> None:
        for place, event in enumerate(events(10, users=1)):
            assert store.append([event]) == [Ack.STORED]
            assert store.get(["u0"])["u0"].size == place + 1

    def test_states_are_those_of_one_clean_fold(self, store: OnlineStore) -> None:
        made = events()
        store.append(made)
        states = store.get(["u0", "u1", "u2"])
        for user, state in states.items():
            check_same(state, clean(made, user))

    def test_an_unknown_user_has_an_empty_state(self, store: OnlineStore) -> None:
        assert store.get([]) == {}
        check_same(store.get(["nobody"])["nobody"], FOLDER.empty("nobody"))
        assert store.history("nobody") == []
        assert store.append([]) == []

    @pytest.mark.parametrize("seed", range(4))
    def test_repeated_shuffled_and_late_events_change_nothing(self, store: OnlineStore, seed: int) -> None:
        made = events(seed=seed)
        arriving = made * 5
        random.Random(seed).shuffle(arriving)
        acks = []
        while arriving:
            acks += store.append(arriving[:7])
            arriving = arriving[7:]
        assert acks.count(Ack.STORED) == len(made)
        for user in ("u0", "u1", "u2"):
            check_same(store.get([user])[user], clean(made, user))

    def test_the_first_of_two_events_with_one_id_counts(self, store: OnlineStore) -> None:
        first = Event("e", "u", "cup", "purchase", T0)
        assert store.append([first, replace(first, item_id="dish", timestamp=T0 + 5)]) == [Ack.STORED, Ack.DUPLICATE]
        assert store.append([replace(first, item_id="egg")]) == [Ack.DUPLICATE]
        assert store.history("u") == [first]

    def test_the_same_id_of_another_user_is_another_event(self, store: OnlineStore) -> None:
        first = Event("e", "u", "cup", "purchase", T0)
        assert store.append([first, replace(first, user_id="v")]) == [Ack.STORED, Ack.STORED]

    def test_history_keeps_everything_in_order(self, store: OnlineStore) -> None:
        full = Event("b", "ü/{x}:☃", "cup", "purchase", T0, 2.0, 8.5, "s1", "r1", {"device": "phone", "deep": [1, None, "é"]})
        made = [replace(full, event_id="a", timestamp=T0 + 1), full, replace(full, event_id="c"), replace(full, event_id="B")]
        store.append(made)
        assert store.history(full.user_id) == [made[3], made[1], made[2], made[0]]

    def test_deleting_a_user_leaves_the_others(self, store: OnlineStore) -> None:
        made = events()
        store.append(made)
        count = sum(event.user_id == "u0" for event in made)
        assert store.delete("u0") == count
        assert store.delete("u0") == 0
        assert store.history("u0") == []
        assert store.get(["u0"])["u0"].size == 0
        check_same(store.get(["u1"])["u1"], clean(made, "u1"))
        store.append(made[:9])
        check_same(store.get(["u0"])["u0"], clean(made[:9], "u0"))

    def test_backfill_is_append_and_may_be_repeated(self, store: OnlineStore) -> None:
        made = [replace(event, context={}) for event in events(60)]
        store.append(made[::7])
        assert store.backfill(table(made)) == 60 - len(made[::7])
        assert store.backfill(table(made)) == 0
        for user in ("u0", "u1", "u2"):
            check_same(store.get([user])[user], clean(made, user))
            assert sorted(store.history(user), key=lambda event: event.order) == store.history(user)

    def test_other_features_are_folded_from_the_log_when_read(self, store: OnlineStore, again: Callable[[Folder], OnlineStore]) -> None:
        made = events()
        store.append(made[:30])
        for _ in range(2):  # the second time it is found
            check_same(store.get(["u0"], OTHER)["u0"], clean(made[:30], "u0", OTHER))
        store.append(made[30:])
        check_same(store.get(["u0"], OTHER)["u0"], clean(made, "u0", OTHER))
        other = again(OTHER)
        check_same(other.get(["u1"])["u1"], clean(made, "u1", OTHER))
        other.append([replace(made[0], event_id="new", user_id="u1", timestamp=T0 + 50 * DAY)])
        assert store.get(["u1"])["u1"].size == clean(made, "u1").size + 1
        other.close()

    def test_adopting_other_features(self, store: OnlineStore) -> None:
        made = events()
        store.append(made[:20])
        store.adopt(OTHER)
        store.append(made[20:])
        check_same(store.get(["u2"])["u2"], clean(made, "u2", OTHER))

    def test_an_invalid_event_stores_nothing_of_its_call(self, store: OnlineStore) -> None:
        good = Event("e", "u", "cup", "purchase", T0)
        wrong = {
            "event_id": "", "user_id": "a\nb", "item_id": "x" * 257, "event": "buy", "timestamp": -1, "value": float("nan"), "price": 1e30,
            "context": {"much": "x" * 9000},
        }  # fmt: skip
        for name, value in wrong.items():
            with pytest.raises(DataError):
                store.append([good, replace(good, **{"event_id": "f", name: value})])
            assert store.history("u") == []

    def test_many_threads_lose_and_repeat_nothing(self, store: OnlineStore) -> None:
        made = events(160, users=4, seed=9)
        acks: list[Ack] = []
        lock = threading.Lock()

        def work(part: list[Event]) -> None:
            for event in part:
                ack = store.append([event])
                store.get([event.user_id])
                with lock:
                    acks.extend(ack)

        threads = [threading.Thread(target=work, args=(made[place::8] + made[:5],)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert acks.count(Ack.STORED) == len(made)
        assert acks.count(Ack.DUPLICATE) == 8 * 5
        for user in ("u0", "u1", "u2", "u3"):
            check_same(store.get([user])[user], clean(made, user))

    def test_two_stores_on_the_same_data(self, store: OnlineStore, again: Callable[[Folder], OnlineStore]) -> None:
        made = events(80, seed=4)
        second = again(FOLDER)
        parts = [(store, made[::2]), (second, made[1::2])]
        threads = [threading.Thread(target=lambda s=s, part=part: [s.append([event]) for event in part]) for s, part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for user in ("u0", "u1", "u2"):
            check_same(store.get([user])[user], clean(made, user))
            check_same(second.get([user])[user], clean(made, user))
        second.close()


class TestSqlite(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SqliteStore]:
        store = SqliteStore(tmp_path / "store.db", FOLDER)
        yield store
        store.close()

    @pytest.fixture
    def again(self, tmp_path: Path) -> Callable[[Folder], SqliteStore]:
        return lambda folder: SqliteStore(tmp_path / "store.db", folder)

    def test_it_is_written_through_to_disk(self, store: SqliteStore) -> None:
        assert store._file.writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store._file.writer.execute("PRAGMA synchronous").fetchone() == (2,)
        assert os.stat(store.path).st_mode & 0o077 == 0

    def test_callers_at_the_same_time_share_commits(self, store: SqliteStore) -> None:
        made = events(64, users=8)
        commits = 0

        def count(statement: str) -> None:
            nonlocal commits
            commits += statement == "COMMIT"

        store._file.writer.set_trace_callback(count)
        with store._file.turn:  # everyone waits for the one who is committing
            threads = [threading.Thread(target=store.append, args=([event],)) for event in made]
            for thread in threads:
                thread.start()
            while len(store._queue) < len(made):
                time.sleep(0.001)
        for thread in threads:
            thread.join()
        assert commits == 1
        assert sum(len(store.history(f"u{n}")) for n in range(8)) == len(made)

    def test_damaged_and_foreign_states_are_folded_again(self, store: SqliteStore) -> None:
        made = events()
        store.append(made)
        store.get(["u0", "u1", "u2"])
        with sqlite3.connect(store.path) as raw:
            assert raw.execute("SELECT count(*) FROM states").fetchone() == (3,)
            other = raw.execute("SELECT blob FROM states WHERE person = 'u1'").fetchone()[0]
            raw.execute("UPDATE states SET blob = ? WHERE person = 'u0'", (other,))
            raw.execute("UPDATE states SET blob = x'00ff00ff00ff' WHERE person = 'u1'")
            raw.execute("DELETE FROM states WHERE person = 'u2'")
        for _ in range(2):
            for user in ("u0", "u1", "u2"):
                check_same(store.get([user])[user], clean(made, user))
        assert store._file.writer.execute("SELECT count(*) FROM states WHERE length(blob) > 6").fetchone() == (3,)

    def test_a_deleted_user_is_not_in_the_file(self, store: SqliteStore) -> None:
        canary = "canary-77f1"
        store.append([replace(event, user_id=canary, item_id=canary + "-item") for event in events(30)])
        store.append(events(30, seed=2))
        store.delete(canary)
        for file in store.path.parent.iterdir():
            assert canary.encode() not in file.read_bytes(), file.name

    def test_a_file_that_is_not_a_store_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "junk.db").write_bytes(b"not a database, by far" * 200)
        with pytest.raises(ArtifactError, match="cannot be opened as the online store"):
            SqliteStore(tmp_path / "junk.db", FOLDER)
        with sqlite3.connect(tmp_path / "new.db") as raw:
            raw.execute("PRAGMA user_version=99")
        with pytest.raises(ArtifactError, match="version 99"):
            SqliteStore(tmp_path / "new.db", FOLDER)

    def test_a_locked_file_is_an_error_that_says_so_and_can_be_repeated(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "busy.db", FOLDER, busy_seconds=0.05)
        event = events(1)[0]
        raw = sqlite3.connect(tmp_path / "busy.db", isolation_level=None)
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(ServeError, match=r"locked.*Send them again"):
            store.append([event])
        raw.execute("ROLLBACK")
        raw.close()
        assert store.append([event]) == [Ack.STORED]
        store.close()

    def test_prune_keeps_only_named_features(self, store: SqliteStore) -> None:
        made = events()
        store.append(made)
        store.get(["u0", "u1"], OTHER)
        assert store.prune([FOLDER]) == 2
        check_same(store.get(["u0"], OTHER)["u0"], clean(made, "u0", OTHER))

    def test_a_killed_writer_loses_nothing_it_acknowledged(self, tmp_path: Path) -> None:
        script = Path(__file__).with_name("store_writer.py")
        for attempt in range(2):
            path = tmp_path / f"killed{attempt}.db"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            writer = subprocess.Popen([sys.executable, str(script), str(path)], stdout=subprocess.PIPE, env=environment)
            assert writer.stdout is not None
            acked = [int(writer.stdout.readline()) for _ in range(20 + attempt * 17)]
            os.kill(writer.pid, signal.SIGKILL)
            acked += [int(line) for line in writer.stdout.read().split(b"\n")[:-1]]
            writer.wait()
            store = SqliteStore(path, FOLDER)
            found = [event.event_id for user in ("u0", "u1", "u2") for event in store.history(user)]
            assert len(found) == len(set(found))
            assert {f"e{number:06d}" for number in acked} <= set(found)
            for user in ("u0", "u1", "u2"):
                check_same(store.get([user])[user], clean(store.history(user), user))
            store.close()


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Starts a Redis of one's own on a free port, by append-only policy."""
    require("redis", shutil.which("redis-server") is not None, "there is no redis-server; install the Debian package redis-server")
    running: dict[tuple[str, str], tuple[int, subprocess.Popen[bytes]]] = {}

    def start(append_only: str = "yes", policy: str = "always") -> int:
        if (append_only, policy) not in running:
            port = free_port()
            folder = tmp_path_factory.mktemp("redis")
            settings = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
            settings += ["--appendonly", append_only, "--appendfsync", policy]
            process = subprocess.Popen(["redis-server", *settings], stdout=subprocess.DEVNULL)
            running[append_only, policy] = (port, process)
            deadline = time.monotonic() + 20
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                assert process.poll() is None and time.monotonic() < deadline, "redis-server did not start"  # noqa: PT018
                time.sleep(0.02)
        return running[append_only, policy][0]

    yield start
    for _, process in running.values():
        process.terminate()
        process.wait()


class TestRedis(StoreSuite):
    @pytest.fixture
    def again(self, redis_port: Callable[..., int], tmp_path: Path) -> Callable[[Folder], RedisStore]:
        return lambda folder: RedisStore(f"redis://127.0.0.1:{redis_port()}/0", folder, prefix=tmp_path.name)

    @pytest.fixture
    def store(self, again: Callable[[Folder], RedisStore]) -> Iterator[RedisStore]:
        store = again(FOLDER)
        yield store
        store.close()

    def test_a_redis_that_may_lose_events_is_refused(self, redis_port: Callable[..., int]) -> None:
        with pytest.raises(ConfigError, match="no append-only file"):
            RedisStore(f"redis://127.0.0.1:{redis_port('no', 'no')}/0", FOLDER)
        with pytest.raises(ConfigError, match="everysec"):
            RedisStore(f"redis://127.0.0.1:{redis_port('yes', 'everysec')}/0", FOLDER)
        RedisStore(f"redis://127.0.0.1:{redis_port('no', 'no')}/0", FOLDER, durable=False).close()

    def test_reading_is_one_round_trip(self, store: RedisStore) -> None:
        store.append(events())
        trips = 0
        send = redis.connection.Connection.send_packed_command

        def counted(self: object, *args: object, **kwargs: object) -> object:
            nonlocal trips
            trips += 1
            return send(self, *args, **kwargs)

        try:
            redis.connection.Connection.send_packed_command = counted
            assert {state.size > 0 for state in store.get(["u0", "u1", "u2"]).values()} == {True}
        finally:
            redis.connection.Connection.send_packed_command = send
        assert trips == 1

    def test_damaged_and_foreign_states_are_folded_again(self, store: RedisStore) -> None:
        made = events()
        store.append(made)
        store.get(["u0", "u1", "u2"])
        client = store._link.client
        places = {user: f"{store._stem(user)}:state:{FOLDER.digest}" for user in ("u0", "u1", "u2")}
        client.hset(places["u0"], "blob", client.hget(places["u1"], "blob"))
        client.hset(places["u1"], "blob", b"\x00\xff")
        client.delete(places["u2"])
        for user, place in places.items():
            check_same(store.get([user])[user], clean(made, user))
            epoch, count, blob = client.hmget(place, "epoch", "count", "blob")
            assert FOLDER.unpack(blob, user, f"{epoch.decode()}:{count.decode()}") is not None

    def test_a_deleted_user_has_no_keys(self, store: RedisStore) -> None:
        store.append([replace(event, user_id="canary-77f1") for event in events(20)])
        for folder in (FOLDER, OTHER):
            store.get(["canary-77f1"], folder)
        store.append([Event("one more", "canary-77f1", "cup", "view", T0)])
        store.describe("canary-77f1", {"age": 7})
        parts = ["about", "head", "log", "recent", f"state:{FOLDER.digest}", f"state:{OTHER.digest}"]
        client = store._link.client
        assert sorted(key.decode().split(":", 4)[-1] for key in client.keys("*canary-77f1*")) == sorted(parts)
        store.delete("canary-77f1", block=True)
        assert client.keys("*canary-77f1*") == []
        assert not any(b"canary-77f1" in member for member in client.smembers(store._blocked))

    def test_no_redis_is_an_error_that_says_so(self) -> None:
        with pytest.raises(ServeError, match="Redis failed"):
            RedisStore(f"redis://127.0.0.1:{free_port()}/0", FOLDER, timeout=0.5)
        with pytest.raises(ConfigError, match="redis://host"):
            RedisStore("nonsense", FOLDER)
