"""One SQLite file of this package: durable commits by one writer at a time, a reader per thread, errors that say what to do."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from maple.errors import ArtifactError, ServeError

Migration = Callable[[sqlite3.Connection], None]


class SqliteFile:
    """A file (WAL) with a schema and a version. ``turn`` is held by the thread that writes; other processes wait in SQLite.

    A commit is on disk when it returns (synchronous=FULL); without ``durable`` it survives the end of the process, but the last ones may
    be lost with the machine. Pages that are freed are overwritten, the file is for its owner only.
    ``migrations`` bring older versions, by their number, to this one. ``what`` names the file in errors.
    """

    def __init__(
        self, path: str | Path, what: str, version: int, schema: Sequence[str], migrations: Mapping[int, Migration], *,
        busy_seconds: float, durable: bool = True,
    ) -> None:  # fmt: skip
        self.path = Path(path)
        self.turn = threading.Lock()
        self.busy_ms = int(busy_seconds * 1000)
        self._synchronous = "FULL" if durable else "NORMAL"
        self._what = what
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # what people did is nobody else's business
        try:
            self.writer = self._connect()
            self.writer.execute("PRAGMA journal_mode=WAL")
            with self.transaction() as writer:
                found = writer.execute("PRAGMA user_version").fetchone()[0]
                if found not in (0, version, *migrations):
                    raise ArtifactError(f"{self.path} is {what} of version {found}, this Maple reads {version}")
                if found in migrations:
                    migrations[found](writer)
                for statement in schema:
                    writer.execute(statement)
                writer.execute(f"PRAGMA user_version={version}")
        except ArtifactError:
            self.close()
            raise
        except sqlite3.DatabaseError as error:
            self.close()
            raise ArtifactError(
                f"{self.path} cannot be opened as {what}: {error}. If it is damaged, move it away; what snapshots hold can be loaded again."
            ) from None

    def reader(self) -> sqlite3.Connection:
        """This thread's connection for reading."""
        if not hasattr(self._local, "connection"):
            connection = self._connect()
            connection.execute("PRAGMA query_only=ON")
            self._local.connection = connection
        found: sqlite3.Connection = self._local.connection
        return found

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside is written at once or not at all; on disk at the end. Hold ``turn``."""
        with _inside(self.writer, "BEGIN IMMEDIATE"):
            yield self.writer

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """``transaction`` when it is this thread's turn, with errors as ``ServeError``."""
        with self.turn, self.errors(), self.transaction() as writer:
            yield writer

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A consistent view of the file, with errors as ``ServeError``."""
        with self.errors(), _inside(self.reader(), "BEGIN") as reader:
            yield reader

    def write_if_idle(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """For what may be lost: a transaction that neither waits for its turn nor for the disk; nothing where someone is writing."""
        if not self.turn.acquire(blocking=False):
            return
        try:
            self.writer.execute("PRAGMA busy_timeout=0")
            self.writer.execute("PRAGMA synchronous=NORMAL")
            with contextlib.suppress(sqlite3.Error), self.transaction() as writer:
                work(writer)
        finally:
            self.writer.execute(f"PRAGMA synchronous={self._synchronous}")
            self.writer.execute(f"PRAGMA busy_timeout={self.busy_ms}")
            self.turn.release()

    def scrub(self) -> None:
        """Empty the write-ahead log, so that what was deleted is in no file."""
        with self.turn, self.errors():
            self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ServeError(f"{self._what} {self.path} failed: {error}. Check the disk and who locks the file, then try again.") from error

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self.busy_ms / 1000, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        connection.execute("PRAGMA secure_delete=ON")
        return connection


@contextlib.contextmanager
def _inside(connection: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
    connection.execute(begin)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
