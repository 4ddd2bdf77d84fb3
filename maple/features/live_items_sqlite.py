"""Live items in one SQLite file, for one node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maple.features.live_items import LiveItem, changed, check_changes, from_text, to_text
from maple.features.sqlite_file import SqliteFile

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS items (
       item_id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, version INTEGER NOT NULL UNIQUE, said TEXT NOT NULL) WITHOUT ROWID""",
)
# items are never deleted, so the largest of each is the last
_NEXT = "SELECT ifnull(max(number) + 1, 0), ifnull((SELECT max(version) FROM items) + 1, 1) FROM items"


class SqliteItems:
    """See ``LiveItems``."""

    def __init__(self, path: str | Path, *, busy_seconds: float = 10.0) -> None:
        self._file = SqliteFile(path, "the live items", 1, _SCHEMA, {}, busy_seconds=busy_seconds)

    def put(self, item_id: str, changes: Mapping[str, Any]) -> LiveItem:
        """See ``LiveItems``."""
        check_changes(item_id, changes)
        with self._file.write() as writer:
            old = writer.execute("SELECT number, said FROM items WHERE item_id = ?", (item_id,)).fetchone()
            number, version = writer.execute(_NEXT).fetchone()
            number, said = old or (number, "{}")
            text = to_text(changed(item_id, json.loads(said), changes))
            writer.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)", (item_id, number, version, text))
        return from_text(item_id, number, version, text)

    def delete(self, item_id: str) -> LiveItem:
        """See ``LiveItems``."""
        return self.put(item_id, {"deleted": True})

    def get(self, item_id: str) -> LiveItem | None:
        """See ``LiveItems``."""
        with self._file.read() as reader:
            row = reader.execute("SELECT item_id, number, version, said FROM items WHERE item_id = ?", (item_id,)).fetchone()
        return from_text(*row) if row else None

    def since(self, version: int) -> tuple[int, list[LiveItem]]:
        """See ``LiveItems``."""
        with self._file.read() as reader:
            latest = int(reader.execute("SELECT ifnull(max(version), 0) FROM items").fetchone()[0])
            if latest == version:
                return latest, []
            after = version if version < latest else 0
            rows = reader.execute(
                "SELECT item_id, number, version, said FROM items WHERE version > ? ORDER BY version", (after,)
            ).fetchall()
        return latest, [from_text(*row) for row in rows]

    def close(self) -> None:
        """See ``LiveItems``."""
        self._file.close()
