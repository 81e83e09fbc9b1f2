"""What runs in a Celery worker beside its pool: the heartbeat, the poller, and what tells receivers of signals."""

from __future__ import annotations

import atexit
import os
from typing import Any

from celery import bootsteps, signals

from orchestrator.runtime import prefetched
from orchestrator.runtime.heartbeat import Heartbeat
from orchestrator.runtime.owner import orchestrator_of
from orchestrator.runtime.poller import Poller
from orchestrator.runtime.telling import Teller


class OrchestratorStep(bootsteps.StartStopStep):
    """Starts when the pool has been started; its threads end only after the pool has."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        orchestrator = orchestrator_of(worker.app)
        orchestrator.install()
        self.heartbeat, self.poller, self.teller = orchestrator.make_threads(worker)
        self._unbegun: list[Any] = []
        self._process = os.getpid()
        # the last steps are settled under a heartbeat: this signal is sent when the pool has ended
        signals.worker_shutdown.connect(self._on_shutdown, sender=worker, weak=False)
        # but not after a cold shutdown; and bodies in threads end only after the worker has
        atexit.register(self._on_exit)

    def start(self, _worker: Any) -> None:
        self.heartbeat.start()
        self.poller.start()
        self.teller.start()

    def close(self, worker: Any) -> None:
        """Note what has not begun: Celery forgets it when it ends to take messages, before ``stop``."""
        self._unbegun = prefetched.list_unbegun(worker)
        self.heartbeat.executing.note_ending()

    def stop(self, worker: Any) -> None:
        """Give back what has not begun, and go on: the pool is still working off what it has."""
        if worker.consumer.connection is not None:
            prefetched.end_polling(worker.consumer.connection)
            prefetched.give_back(self._unbegun)

    def terminate(self, _worker: Any) -> None:
        """Go on until the process ends, which gives back what has not begun."""

    def _on_shutdown(self, **_kwargs: Any) -> None:
        if self.heartbeat.executing.wait_unoccupied(0):
            stop_threads(self.heartbeat, self.poller, self.teller)

    def _on_exit(self) -> None:
        if os.getpid() == self._process:  # a forked child runs its parent's exit functions as well
            stop_threads(self.heartbeat, self.poller, self.teller)


def stop_threads(heartbeat: Heartbeat, poller: Poller, teller: Teller) -> None:
    """Give back what is left, and sign off."""
    poller.stop()
    teller.stop()
    heartbeat.stop()
