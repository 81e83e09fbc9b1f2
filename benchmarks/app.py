"""The Celery app of one contender, made from settings: by the client directly, by the worker from its environment."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass

from celery import Celery

from benchmarks.marks import Marks
from benchmarks.tasks import register_steps, register_workflows
from orchestrator import Orchestrator

VARIABLE = "BENCHMARKS_APP"
LOOK_FOR_PARENT_EVERY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class AppSettings:
    """What distinguishes the apps of contenders."""

    queue: str
    broker: str
    results: str | None = None
    acks_late: bool = False
    store: str | None = None
    hand_off: bool = False
    live_passes: int = 0
    #: Where ``celery-saga`` keeps its state.
    saga_state: str | None = None
    #: Whether the worker counts its statements; it costs some time.
    counts_statements: bool = False

    def to_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def read(cls) -> AppSettings:
        return cls(**json.loads(os.environ[VARIABLE]))


def make_app(settings: AppSettings) -> tuple[Celery, Orchestrator | None]:
    """Return the app with its tasks, and for our side with its workflows."""
    app = Celery(settings.queue, broker=settings.broker, backend=settings.results, set_as_current=False)
    app.conf.update(
        task_default_queue=settings.queue,
        task_acks_late=settings.acks_late,
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=True,
    )
    register_steps(app)
    orchestrator = None
    if settings.store is not None:
        own = {"hand_off": settings.hand_off, "live_passes": settings.live_passes}
        orchestrator = Orchestrator(app, store=settings.store, **own)
        register_workflows(app, orchestrator)
    if settings.saga_state is not None:
        from benchmarks.contenders.saga import prepare

        prepare(app, settings.saga_state)
    return app, orchestrator


def make_worker_app() -> Celery:
    """Return the app of the worker that this process is."""
    settings = AppSettings.read()
    app, _ = make_app(settings)
    app.set_default()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    Marks(settings.broker, settings.queue).install()
    if settings.counts_statements:
        from benchmarks.statements import StatementCounter

        StatementCounter(settings.broker, settings.queue).install()
    return app


def _end_with(parent: int) -> None:
    """End this worker when the benchmark was killed, which then cannot end it."""
    while os.getppid() == parent:
        time.sleep(LOOK_FOR_PARENT_EVERY_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)  # its pool ends with it
