"""Our side: the same tasks as steps of workflows, over each kind of store, by doorbell or with hand-off.

As they come out of the box, or (``live``) with functions that stand where they wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.app import AppSettings
from benchmarks.contenders.contender import Run
from benchmarks.contenders.on_celery import OnCelery, queue_of
from benchmarks.filling import fill, run_one, start_sleeper
from benchmarks.workers import PROCESSES
from orchestrator import Orchestrator
from orchestrator.store.engine import Store

if TYPE_CHECKING:
    from benchmarks.lab import Lab


#: How many functions a process keeps where they wait.
LIVE_PASSES = 100


class Ours(OnCelery):
    """Every instance is started durably, by ``orchestrator.start``."""

    #: How many instances are put into the store when the worker runs.
    ended = sleeping = 0

    def warm(self) -> None:
        super().warm()
        ended, sleeping, self.ended, self.sleeping = self.ended, self.sleeping, 0, 0
        if ended:
            fill(self.orchestrators, run_one(self.orchestrators), ended)
        if sleeping:
            fill(self.orchestrators, start_sleeper(self.orchestrators), sleeping)

    def settle(self) -> None:
        if self.worker is None:
            self.app.control.purge()

    @property
    def orchestrators(self) -> Orchestrator:
        assert self.orchestrator is not None
        return self.orchestrator

    def start(self, workflow: str, *args: Any) -> Any:
        return self.orchestrators.start(self.task(workflow).s(*args))

    def sequence(self, steps: int) -> Run:
        return self.run(lambda: self.start("sequence", steps), steps, first=True)

    def crowd(self, instances: int, steps: int) -> Run:
        def begin() -> None:
            for _ in range(instances):
                self.start("sequence", steps)

        return self.run(begin, instances * steps, ends=instances, first=True)

    def echoes(self, steps: int, size: int) -> Run:
        return self.run(lambda: self.start("echoes", steps, size), steps, first=True)

    def fan_out(self, width: int) -> Run:
        return self.run(lambda: self.start("fan_out", width), width)

    def map(self, items: int, concurrency: int | None) -> Run:
        return self.run(lambda: self.start("map", items, concurrency), items)

    def undo(self) -> Run:
        return self.run(lambda: self.start("undone"), 9)

    def local(self, steps: int) -> Run:
        return self.run(lambda: self.start("local", steps), steps)

    def close(self) -> None:
        super().close()
        self.orchestrators.store.dispose()


@dataclass(frozen=True, slots=True)
class OursSpec:
    """``label`` tells apart contenders that are otherwise alike, each with a store of its own."""

    store: str
    hand_off: bool = False
    live: bool = False
    label: str = ""
    counts_statements: bool = False
    has_worker: bool = True
    ended: int = 0
    sleeping: int = 0
    processes: int = PROCESSES

    @property
    def name(self) -> str:
        modes = ("hand-off" if self.hand_off else "", "live" if self.live else "")
        return "-".join(filter(None, ("ours", self.store, *modes, self.label)))

    def open(self, lab: Lab) -> Ours:
        url = lab.new_database(self.store, self.name)
        store = Store(url)
        store.prepare()  # who makes the tables loads Alembic: once in the life of a database, and not in every worker's
        store.dispose()
        settings = AppSettings(
            queue_of(self.name, self.processes),
            lab.valkey.url(0),
            store=url,
            hand_off=self.hand_off,
            live_passes=LIVE_PASSES if self.live else 0,
            counts_statements=self.counts_statements,
        )
        contender = Ours(self.name, settings, lab.folder, has_worker=self.has_worker, processes=self.processes)
        contender.ended, contender.sleeping = self.ended, self.sleeping
        return contender
