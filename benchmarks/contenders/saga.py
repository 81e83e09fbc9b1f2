"""``celery-saga``: Celery chains with a task that records each step in Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import Celery

from benchmarks.app import AppSettings
from benchmarks.contenders.contender import Run, Unavailable
from benchmarks.contenders.on_celery import OnCelery
from benchmarks.tasks import Refused

if TYPE_CHECKING:
    from benchmarks.lab import Lab


def prepare(app: Celery, state: str) -> None:
    """Register its steps, which take keyword arguments, and have it keep its state where its manual says."""
    import celery_saga
    from celery_saga.backends import RedisSagaBackend

    for function in (saga_step, saga_undo, saga_fail):
        app.task(name=f"benchmarks.{function.__name__}", shared=False)(function)
    celery_saga.set_default_backend(RedisSagaBackend(url=state))


def saga_step(**_context: object) -> dict[str, object]:
    return {}


def saga_undo(_compensation_data: object) -> None:
    pass


def saga_fail(**_context: object) -> None:
    raise Refused("the fifth step fails")


class CelerySaga(OnCelery):
    """It finds its app by being the current one."""

    def sequence(self, steps: int) -> Run:
        return self.run(lambda: self._begin(steps), steps)

    def crowd(self, instances: int, steps: int) -> Run:
        return self.run(lambda: [self._begin(steps) for _ in range(instances)], instances * steps, ends=instances)

    def undo(self) -> Run:
        return self.run(lambda: self._begin(4, fails=True), 9)

    def _begin(self, steps: int, *, fails: bool = False) -> Any:
        from celery_saga import Saga

        self.app.set_current()
        saga = Saga("benchmark")
        for _ in range(steps):
            saga = saga.add_step(self.task("saga_step"), compensate=self.task("saga_undo"))
        if fails:
            saga = saga.add_step(self.task("saga_fail"), no_compensation=True)
        return saga.run()


@dataclass(frozen=True, slots=True)
class SagaSpec:
    name: str = "celery-saga"

    def open(self, lab: Lab) -> CelerySaga:
        try:
            import celery_saga  # noqa: F401 - whether it is there
        except ImportError as error:
            raise Unavailable(f"not installed: {error}") from error
        settings = AppSettings(self.name, lab.valkey.url(0), acks_late=True, saga_state=lab.valkey.url(2))
        return CelerySaga(self.name, settings, lab.folder)
