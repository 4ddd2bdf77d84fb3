"""The tables of the embedded online store, its statements, and how older files become this version."""

from __future__ import annotations

import sqlite3

VERSION = 2
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS events (
       user_id TEXT NOT NULL, event_id TEXT NOT NULL, seq INTEGER NOT NULL, timestamp INTEGER NOT NULL, item_id TEXT NOT NULL,
       event TEXT NOT NULL, value REAL, price REAL, session_id TEXT, request_id TEXT, context TEXT,
       PRIMARY KEY (user_id, event_id)) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS events_by_seq ON events (user_id, seq)",
    "CREATE TABLE IF NOT EXISTS people (person TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID",
    # only of people who have several ids
    "CREATE TABLE IF NOT EXISTS members (user_id TEXT PRIMARY KEY, person TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS members_by_person ON members (person)",
    "CREATE TABLE IF NOT EXISTS links (alias TEXT NOT NULL, target TEXT NOT NULL, PRIMARY KEY (alias, target)) WITHOUT ROWID",
    """CREATE TABLE IF NOT EXISTS states (
       person TEXT NOT NULL, digest TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL, written INTEGER NOT NULL,
       blob BLOB NOT NULL, PRIMARY KEY (person, digest))""",
    """CREATE TABLE IF NOT EXISTS attributes (
       user_id TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (user_id, name)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS blocked (hash TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS counter (one INTEGER PRIMARY KEY CHECK (one = 1), value INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO counter VALUES (1, 0)",
    "CREATE TABLE IF NOT EXISTS salt (one INTEGER PRIMARY KEY CHECK (one = 1), value TEXT NOT NULL)",
)
COLUMNS = "user_id, event_id, seq, timestamp, item_id, event, value, price, session_id, request_id, context"
LINE = "e.event_id, e.item_id, e.event, e.timestamp, e.value, e.price"
INSERT = f"INSERT OR IGNORE INTO events ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # constants only
ONE = f"SELECT {LINE} FROM events e WHERE user_id = ? AND event_id = ?"  # noqa: S608
AMEND = "UPDATE events SET item_id = ?, event = ?, timestamp = ?, value = ?, price = ? WHERE user_id = ? AND event_id = ?"
FIND = """
SELECT q.value, ifnull(m.person, q.value), p.epoch, s.seq, s.blob, (SELECT json_group_array(user_id) FROM members WHERE person = m.person)
FROM json_each(?) q LEFT JOIN members m ON m.user_id = q.value LEFT JOIN people p ON p.person = ifnull(m.person, q.value)
LEFT JOIN states s ON s.person = p.person AND s.digest = ? AND s.epoch = p.epoch"""
SINCE = f"""
SELECT json_extract(q.value, '$[0]'), e.seq, {LINE}
FROM json_each(?) q CROSS JOIN events e ON e.user_id = json_extract(q.value, '$[1]') AND e.seq > json_extract(q.value, '$[2]')"""  # noqa: S608
PAST = f"SELECT e.seq, {LINE} FROM events e WHERE e.user_id IN (SELECT value FROM json_each(?))"  # noqa: S608
TOLD = "SELECT user_id, name, value FROM attributes WHERE user_id IN (SELECT value FROM json_each(?))"
KEEP = """
INSERT OR REPLACE INTO states SELECT ?1, ?2, ?3, ?4, ?5, ?6
WHERE EXISTS (SELECT 1 FROM people WHERE person = ?1 AND epoch = ?3)
AND NOT EXISTS (SELECT 1 FROM states WHERE person = ?1 AND digest = ?2 AND epoch = ?3 AND seq > ?4)"""
# an alias that sends what another id of the same person has sent already: the log grew by nothing new
CLASH = """
UPDATE people SET epoch = ?1 WHERE person = ?2 AND EXISTS (
  SELECT 1 FROM members m JOIN events e ON e.user_id = m.user_id WHERE m.person = ?2 AND m.user_id <> ?3 AND e.event_id = ?4)"""
EPOCH = "INSERT OR IGNORE INTO people SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM events WHERE user_id = ?1)"


def from_version_1(connection: sqlite3.Connection) -> None:
    """Events without numbers, states with another idea of what they cover."""
    for table in ("states", "users"):
        connection.execute(f"DROP TABLE {table}")
    connection.execute("ALTER TABLE events RENAME TO old_events")
    connection.execute(SCHEMA[0])
    names = COLUMNS.replace("seq", "0")
    connection.execute(f"INSERT INTO events ({COLUMNS}) SELECT {names} FROM old_events")  # noqa: S608  # constants only
    connection.execute("DROP TABLE old_events")
    connection.execute(SCHEMA[2])
    connection.execute("INSERT INTO people SELECT DISTINCT user_id, 0 FROM events")
