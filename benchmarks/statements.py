"""How long a worker's main process spends in statements: what its poller asks of the database, and how often."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import redis
from sqlalchemy import Engine, event


@dataclass(frozen=True, slots=True)
class Statements:
    """So many statements, and the seconds until the last row of each had come."""

    count: int
    seconds: float


class StatementCounter:
    """Counts, in the main process of a worker, the statements of all threads; any process may read the count."""

    _TELL_EVERY_SECONDS = 0.5

    def __init__(self, url: str, queue: str) -> None:
        self._url, self._key = url, f"benchmarks:statements:{queue}"
        self._lock = threading.Lock()
        self._count, self._seconds = 0, 0.0
        self._pid = os.getpid()

    def install(self) -> None:
        """Count from now on, in this process and not in those that it forks."""
        event.listen(Engine, "before_cursor_execute", self._before)
        event.listen(Engine, "after_cursor_execute", self._after)
        threading.Thread(target=self._tell, name="benchmarks-statements", daemon=True).start()

    def _before(self, connection: Any, *_args: Any) -> None:
        connection.info["benchmarks_began"] = time.perf_counter()

    def _after(self, connection: Any, *_args: Any) -> None:
        seconds = time.perf_counter() - connection.info["benchmarks_began"]
        if os.getpid() == self._pid:
            with self._lock:
                self._count += 1
                self._seconds += seconds

    def _tell(self) -> None:
        client = redis.Redis.from_url(self._url)
        while True:
            time.sleep(self._TELL_EVERY_SECONDS)
            client.hset(self._key, mapping={"count": self._count, "seconds": repr(self._seconds)})

    def read(self) -> Statements:
        """Return what was counted so far, as it was told last."""
        with redis.Redis.from_url(self._url) as client:
            told: Any = client.hgetall(self._key)
        return Statements(int(told.get(b"count", 0)), float(told.get(b"seconds", 0)))
