"""What runs in a Celery worker beside its pool: the heartbeat and the poller."""

from __future__ import annotations

from typing import Any

from celery import bootsteps, signals

from orchestrator.runtime.heartbeat import Heartbeat
from orchestrator.runtime.owner import orchestrator_of
from orchestrator.runtime.poller import Poller


class OrchestratorStep(bootsteps.StartStopStep):
    """Starts when the pool has been started; its threads end only after the pool has."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        orchestrator = orchestrator_of(worker.app)
        orchestrator.install()
        self.heartbeat, self.poller = orchestrator.make_threads(worker)
        # the last steps are settled under a heartbeat: this signal is sent when the pool has ended
        signals.worker_shutdown.connect(self._on_shutdown, sender=worker, weak=False)

    def start(self, _worker: Any) -> None:
        self.heartbeat.start()
        self.poller.start()

    def stop(self, _worker: Any) -> None:
        """Go on: the pool is still working off what it has."""

    terminate = stop

    def _on_shutdown(self, **_kwargs: Any) -> None:
        stop_threads(self.heartbeat, self.poller)


def stop_threads(heartbeat: Heartbeat, poller: Poller) -> None:
    """Give back what is left, and sign off."""
    poller.stop()
    heartbeat.stop()
