"""The outside world of the tests: what steps did to it, kept in an SQLite file that no saga knows of."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator import current_step


@dataclass(frozen=True)
class Effect:
    """Something that a body did; ``at`` is on the machine's monotonic clock, the same in every process."""

    instance: str
    name: str
    what: str  # begin, effect, end
    seq: int
    attempt: int
    process: int
    at: float


class Effects:
    """Written by bodies, read by tests."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("CREATE TABLE IF NOT EXISTS effect (instance, name, what, seq, attempt, process, at)")
            yield connection

    def note(self, name: str, what: str) -> None:
        """Record that the running step did ``what``."""
        step = current_step()
        assert step is not None
        row = (step.instance_id, name, what, step.seq, step.attempt, os.getpid(), time.monotonic())
        with self._open() as connection:
            connection.execute("INSERT INTO effect VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def list_effects(self, instance: str | None = None, what: str | None = None) -> list[Effect]:
        with self._open() as connection:
            rows = [Effect(*row) for row in connection.execute("SELECT * FROM effect ORDER BY rowid")]
        return [e for e in rows if instance in (None, e.instance) and what in (None, e.what)]

    def names(self, instance: str, what: str = "effect") -> list[str]:
        return [effect.name for effect in self.list_effects(instance, what)]

    def holders(self) -> set[int]:
        """Return which of the processes that have noted something have the file open (told by Linux's ``/proc``)."""
        return {process for process in {effect.process for effect in self.list_effects()} if self._is_open_in(process)}

    def _is_open_in(self, process: int) -> bool:
        return any(os.path.realpath(held).startswith(self.path) for held in Path(f"/proc/{process}/fd").glob("*"))
