"""Which tasks and workflows the live workers have, as they told the store."""

from __future__ import annotations

import time

from orchestrator.store import workers
from orchestrator.store.engine import Store


class KnownTasks:
    """The tasks registered on live workers; asked only for those that are not registered here."""

    refresh_seconds = 5.0

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks: frozenset[str] = frozenset()
        self._read_at = -self.refresh_seconds

    def on_live_worker(self, task: str) -> bool:
        if task not in self._tasks and time.monotonic() - self._read_at > self.refresh_seconds:
            try:
                with self._store.read("known-tasks") as connection:
                    self._tasks = frozenset(name for w in workers.list_workers(connection) for name in w.tasks)
            except Exception:
                return True  # nobody can say; a worker that does not know it will
            self._read_at = time.monotonic()
        return task in self._tasks
