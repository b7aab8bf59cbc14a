"""What the GCS must not forget: a table of records in SQLite, or in memory.

Relied on by ``gcs.server`` and the simulator. One writer, one transaction for each batch of events.

JOURNAL-1 (before the answer): ``commit`` returns when the records survive the death of every process of the session;
the server sends what depends on them only then.
JOURNAL-2 (last wins): a record replaces the one of the same kind and key; value None deletes it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from hpc_ray.machine import Journal

Record = tuple[str, bytes, bytes]


class MemoryJournal:
    """Keeps records as long as the process lives; for sessions without a journal file, and for tests."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, bytes], bytes] = {}

    def load(self) -> list[Record]:
        return [(kind, key, value) for (kind, key), value in self._records.items()]

    def commit(self, records: Iterable[Journal]) -> None:
        for record in records:
            if record.value is None:
                self._records.pop((record.kind, record.key), None)
            else:
                self._records[record.kind, record.key] = record.value

    def close(self) -> None:
        pass


class SqliteJournal:
    """A file. WAL with synchronous=NORMAL: a killed process loses nothing, a machine that loses power perhaps the last
    transactions, and never the file's consistency."""

    def __init__(self, path: str):
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, "
            "key BLOB NOT NULL, value BLOB NOT NULL, UNIQUE (kind, key))"
        )

    def load(self) -> list[Record]:
        """In the order of their first writing."""
        return list(self._connection.execute("SELECT kind, key, value FROM records ORDER BY number"))

    def commit(self, records: Iterable[Journal]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        for record in records:
            if record.value is None:
                self._connection.execute("DELETE FROM records WHERE kind = ? AND key = ?", (record.kind, record.key))
            else:
                self._connection.execute(
                    "INSERT INTO records (kind, key, value) VALUES (?, ?, ?) "
                    "ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value",
                    (record.kind, record.key, record.value),
                )
        self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


def open_journal(path: str) -> MemoryJournal | SqliteJournal:
    return SqliteJournal(path) if path else MemoryJournal()
