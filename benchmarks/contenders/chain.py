"""The baseline: Celery's own ``chain`` and ``chord``, acknowledged late, with results in Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from celery import chain, chord

from benchmarks.app import AppSettings
from benchmarks.contenders.contender import Run
from benchmarks.contenders.on_celery import OnCelery

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

    def open(self, lab: Lab) -> PlainCelery:
        settings = AppSettings(self.name, lab.valkey.url(0), results=lab.valkey.url(1), acks_late=True)
        return PlainCelery(self.name, settings, lab.folder)
