"""The contract of online stores on each backend, and what is particular to each."""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from redis_server import RedisServer, free_port
from shop import T0
from store_suite import FOLDER, OTHER, StoreSuite, check_same, clean, events

from maple.errors import ArtifactError, ConfigError, ServeError
from maple.features.folder import Folder
from maple.features.store import Ack, Event, OnlineStore
from maple.features.store_redis import RedisStore
from maple.features.store_sqlite import SqliteStore


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


def write_and_kill(where: str, names: list[str], kill: Callable[[list[subprocess.Popen[bytes]]], object]) -> dict[str, int]:
    """Several processes append until ``kill``; by name of the writer, how many events it was told are stored."""
    script = Path(__file__).with_name("store_writer.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), where]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) for name in names]
    for writer in writers:
        assert writer.stdout is not None
        for _ in range(15):
            assert writer.stdout.readline()
    kill(writers)
    told = {}
    for name, writer in zip(names, writers, strict=True):
        assert writer.stdout is not None
        lines = writer.stdout.read().split(b"\n")[:-1]
        writer.wait()
        told[name] = int(lines[-1]) if lines else 0
    return told


def check_nothing_lost(store: OnlineStore, told: dict[str, int]) -> None:
    """Every acknowledged event is there, none twice, and the states are those of what is there."""
    users = ("u0", "u1", "u2")
    found = [event for user in users for event in store.history(user)]
    ids = [event.event_id for event in found]
    assert len(ids) == len(set(ids))
    assert {f"{name}{number:06d}" for name, count in told.items() for number in range(count)} <= set(ids)
    for user in users:
        check_same(store.get([user])[user], clean(found, user))


class TestSqlite(StoreSuite):
    @pytest.fixture
    def new_place(self, tmp_path: Path) -> Callable[[], Callable[[Folder], SqliteStore]]:
        numbers = itertools.count()

        def make() -> Callable[[Folder], SqliteStore]:
            path = tmp_path / f"store{next(numbers)}.db"
            return lambda folder: SqliteStore(path, folder)

        return make

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

    def test_killed_writers_lose_nothing_they_acknowledged(self, tmp_path: Path) -> None:
        path = tmp_path / "killed.db"
        told = write_and_kill(str(path), ["a", "b"], lambda writers: [writer.kill() for writer in writers])
        store = SqliteStore(path, FOLDER)
        check_nothing_lost(store, told)
        store.close()

    def test_reading_is_one_transaction_of_three_statements(self, store: SqliteStore) -> None:
        made = sorted(events(60, users=5), key=lambda event: event.order)  # what comes late is another matter
        store.append(made[:50])
        users = [f"u{number}" for number in range(5)]
        store.get(users)
        store.append(made[50:])
        statements: list[str] = []
        store._file.reader().set_trace_callback(statements.append)
        assert sum(state.size for state in store.get(users).values()) == 60
        assert [statement.split()[0] for statement in statements] == ["BEGIN", "SELECT", "SELECT", "SELECT", "COMMIT"]

    def test_states_not_refreshed_for_long_are_pruned(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "store.db", FOLDER, state_days=-1)
        made = events()
        store.append(made)
        store.get(["u0", "u1"])
        assert store.prune([FOLDER]) == 2
        check_same(store.get(["u0"])["u0"], clean(made, "u0"))
        store.close()

    def test_a_file_of_the_first_version_keeps_its_events(self, tmp_path: Path) -> None:
        made = events()
        with sqlite3.connect(tmp_path / "old.db") as raw:
            raw.execute(
                "CREATE TABLE events (user_id TEXT NOT NULL, event_id TEXT NOT NULL, timestamp INTEGER NOT NULL, item_id TEXT NOT NULL, "
                "event TEXT NOT NULL, value REAL, price REAL, session_id TEXT, request_id TEXT, context TEXT, "
                "PRIMARY KEY (user_id, event_id)) WITHOUT ROWID"
            )
            raw.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY, revision TEXT NOT NULL) WITHOUT ROWID")
            raw.execute("CREATE TABLE states (user_id TEXT NOT NULL, digest TEXT NOT NULL, blob BLOB NOT NULL)")
            raw.execute("CREATE TABLE counter (one INTEGER PRIMARY KEY CHECK (one = 1), value INTEGER NOT NULL)")
            raw.execute("INSERT INTO counter VALUES (1, 9)")
            rows = [(e.user_id, e.event_id, e.timestamp, e.item_id, e.event, e.value, e.price, None, None, None) for e in made]
            raw.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            raw.execute("PRAGMA user_version=1")
        for _ in range(2):
            store = SqliteStore(tmp_path / "old.db", FOLDER)
            assert store.append(made[:3]) == [Ack.DUPLICATE] * 3
            for user in ("u0", "u1", "u2"):
                check_same(store.get([user])[user], clean(made, user))
            store.close()


class TestRedis(StoreSuite):
    @pytest.fixture
    def new_place(self, redis_server: RedisServer, tmp_path: Path) -> Callable[[], Callable[[Folder], RedisStore]]:
        numbers = itertools.count()

        def make() -> Callable[[Folder], RedisStore]:
            prefix = f"{tmp_path.name}[{next(numbers)}]*"
            return lambda folder: RedisStore(redis_server.url, folder, prefix=prefix)

        return make

    def test_a_redis_that_may_lose_events_is_refused(self, tmp_path: Path) -> None:
        for append_only, policy, why in (("no", "no", "no append-only file"), ("yes", "everysec", "everysec")):
            server = RedisServer(tmp_path, append_only, policy)
            with pytest.raises(ConfigError, match=why):
                RedisStore(server.url, FOLDER)
            RedisStore(server.url, FOLDER, durable=False).close()
            server.stop()

    def test_reading_and_appending_are_one_round_trip(self, store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
        made = sorted(events(60, users=5), key=lambda event: event.order)  # what comes late is another matter
        users = [f"u{number}" for number in range(5)]
        store.append(made[:50])
        store.get(users)
        trips = 0
        send = redis.connection.Connection.send_packed_command

        def counted(self: object, *args: object, **kwargs: object) -> object:
            nonlocal trips
            trips += 1
            return send(self, *args, **kwargs)

        monkeypatch.setattr(redis.connection.Connection, "send_packed_command", counted)
        store.append(made[50:])
        assert trips == 1
        assert sum(state.size for state in store.get(users).values()) == 60
        assert trips == 2

    def test_states_expire_and_come_back(self, redis_server: RedisServer, tmp_path: Path) -> None:
        store = RedisStore(redis_server.url, FOLDER, prefix=tmp_path.name, state_days=0.0)  # a second, the shortest there is
        made = events()
        store.append(made)
        store.get(["u0"])
        state = f"{store._stem('u0')}:state:{FOLDER.digest}"
        assert 0 < store._link.client.pttl(state) <= 1000
        store._link.client.pexpire(state, 0)
        for _ in range(2):
            check_same(store.get(["u0"])["u0"], clean(made, "u0"))
        store.close()

    def test_a_killed_server_loses_nothing_it_acknowledged(self, tmp_path: Path) -> None:
        server = RedisServer(tmp_path)
        store = RedisStore(server.url, FOLDER)
        told = write_and_kill(server.url, ["a", "b"], lambda _: server.kill())
        with pytest.raises(ServeError):
            store.get(["u0"])
        server.start()
        check_nothing_lost(store, told)  # the store of before connects again
        store.merge(["u1"], "u0")
        store.delete("u2", block=True)
        store.describe("u0", {"age": 3})
        server.kill()
        server.start()
        assert store.aliases("u0") == ["u0", "u1"]
        assert store.append([events(1)[0], Event("x", "u2", "cup", "view", T0)])[1] == Ack.DELETED
        assert store.attributes("u0") == {"age": 3}
        store.close()
        server.stop()

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
