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
        self._workflows: frozenset[str] = frozenset()
        self._read_at = -self.refresh_seconds

    def on_live_worker(self, task: str) -> bool:
        if task not in self._tasks:
            try:
                self._read()
            except Exception:
                return True  # nobody can say; a worker that does not know it will
        return task in self._tasks

    def is_workflow(self, name: str) -> bool:
        """Tell whether a live worker has a workflow of that name."""
        if name not in self._tasks:
            self._read()
        return name in self._workflows

    def _read(self) -> None:
        if time.monotonic() - self._read_at <= self.refresh_seconds:
            return
        with self._store.read("known-tasks") as connection:
            live = workers.list_workers(connection)
        self._tasks = frozenset(name for worker in live for name in worker.tasks)
        self._workflows = frozenset(name for worker in live for name in worker.workflows)
        self._read_at = time.monotonic()
