"""The baseline: Celery's own ``chain`` and ``chord``, acknowledged late, with results in Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from celery import chain, chord

from benchmarks.app import AppSettings
from benchmarks.contenders.contender import Run
from benchmarks.contenders.on_celery import OnCelery, queue_of
from benchmarks.tasks import make_text
from benchmarks.workers import PROCESSES

if TYPE_CHECKING:
    from benchmarks.lab import Lab


class PlainCelery(OnCelery):
    """Nothing is durable but the messages that are under way."""

    def sequence(self, steps: int) -> Run:
        return self.run(lambda: self._chain(steps).apply_async(), steps, first=True)

    def crowd(self, instances: int, steps: int) -> Run:
        def begin() -> None:
            for _ in range(instances):
                self._chain(steps).apply_async()

        return self.run(begin, instances * steps, ends=instances, first=True)

    def _chain(self, steps: int) -> Any:
        step = self.task("step")
        return chain(self.task("first").si(), *[step.si() for _ in range(steps - 2)], self.task("finish").si())

    def echoes(self, steps: int, size: int) -> Run:
        echo, last = self.task("echo"), self.task("echo_last")

        def begin() -> None:
            # each passes its result on: given as an argument, the text would be in the messages of all before it
            rest = [*[echo.s() for _ in range(steps - 3)], last.s()]
            chain(self.task("first").si(), echo.si(make_text(size)), *rest).apply_async()

        return self.run(begin, steps, first=True)

    def fan_out(self, width: int) -> Run:
        step, join = self.task("step"), self.task("join")
        return self.run(lambda: chord([step.si(value) for value in range(width)], join.s()).apply_async(), width)

    def close(self) -> None:
        super().close()
        # a result that is still held somewhere would ask a server that has gone by then
        self.app.backend.remove_pending_result = lambda _result: None

    def settle(self) -> None:
        # results that nobody reads: they would only fill the server
        assert self.settings.results is not None
        with redis.Redis.from_url(self.settings.results) as client:
            client.flushdb()


@dataclass(frozen=True, slots=True)
class ChainSpec:
    name: str = "chain"
    processes: int = PROCESSES

    def open(self, lab: Lab) -> PlainCelery:
        queue = queue_of(self.name, self.processes)
        settings = AppSettings(queue, lab.valkey.url(0), results=lab.valkey.url(1), acks_late=True)
        return PlainCelery(self.name, settings, lab.folder, processes=self.processes)
