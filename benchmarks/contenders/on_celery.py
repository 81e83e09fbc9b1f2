"""What contenders that run on Celery have in common: a queue, a worker, an app, and marks of what has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.app import AppSettings, make_app
from benchmarks.contenders.contender import Contender, Run
from benchmarks.marks import FIRST, LAST, Marks, now
from benchmarks.workers import PROCESSES, Process, start_worker

#: A run is given up when it takes so long: something hangs.
PATIENCE_SECONDS, PATIENCE_SECONDS_PER_STEP = 60.0, 0.2


def queue_of(name: str, processes: int) -> str:
    """Return the queue of a contender, which no other has that runs beside it."""
    return name if processes == PROCESSES else f"{name}-{processes}"


class OnCelery(Contender):
    """A worker of its own on the broker that all share."""

    def __init__(
        self, name: str, settings: AppSettings, folder: Path, *, has_worker: bool = True, processes: int = PROCESSES
    ) -> None:
        self.name = name
        self.settings = settings
        self.app, self.orchestrator = make_app(settings)
        self.marks = Marks(settings.broker, settings.queue)
        self.worker: Process | None = None
        if has_worker:
            self.worker = start_worker(settings.queue, settings.to_environment(), folder, processes)

    def task(self, name: str) -> Any:
        return self.app.tasks[f"benchmarks.{name}"]

    def check(self) -> None:
        if self.worker is not None:
            self.worker.check()

    def list_pids(self) -> list[int]:
        assert self.worker is not None
        return [self.worker.pid]

    def warm(self) -> None:
        if self.worker is not None:
            for _ in range(3):
                self.crowd(4, 5)

    def run(self, begin: Callable[[], object], steps: int, *, ends: int = 1, first: bool = False) -> Run:
        """Begin something and wait until ``ends`` of it have ended."""
        self.marks.clear()
        began = now()
        begin()
        marks = self.marks.wait(
            2 * ends if first else ends, PATIENCE_SECONDS + steps * PATIENCE_SECONDS_PER_STEP, self.check
        )
        ended = max(mark.at for mark in marks if mark.task in LAST)
        return Run(began, ended, min((mark.at for mark in marks if mark.task == FIRST), default=None))

    def tell_to_stop(self) -> None:
        if self.worker is not None:
            self.worker.tell_to_stop()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.app.close()
