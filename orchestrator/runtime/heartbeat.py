"""The worker's heartbeat: a thread that does nothing else, so that nothing slow can make a live worker look dead."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import exc

from orchestrator._version import __version__
from orchestrator.errors import StoreUnreachable
from orchestrator.runtime.executing import Executing
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.transactions import Clock, utc_now
from orchestrator.store import workers
from orchestrator.store.engine import Store
from orchestrator.store.workers import Worker

logger = logging.getLogger("orchestrator")

#: How long a worker that ends tries to sign off: whoever stops it kills it if it takes too long.
SIGN_OFF_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """What a worker tells the others of itself."""

    nodename: str
    workflows: tuple[str, ...]
    tasks: tuple[str, ...]
    queues: tuple[str, ...]


class Heartbeat:
    """Registers an incarnation and beats for it; begins a new one when it finds that it was given up."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        executing: Executing,
        describe: Callable[[], WorkerDescription],
        clock: Clock = utc_now,
    ) -> None:
        self.store = store
        self.settings = settings
        self.executing = executing
        self.describe = describe
        self.clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="orchestrator-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the incarnation: what is still claimed under it may be given back at once.

        Unless a body goes on that cannot be ended with this process: then it is for others to notice its silence.
        """
        is_first = not self._stopping.is_set()
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=min(SIGN_OFF_SECONDS, self.settings.heartbeat_limit))
        if self.executing.incarnation and is_first:
            self._sign_off(self.executing.incarnation)

    def _sign_off(self, incarnation: str) -> None:
        if not self.executing.wait_unoccupied(SIGN_OFF_SECONDS):
            logger.warning("a body is running still; others will notice this worker's end within the heartbeat limit")
            return

        def once() -> None:
            with self.store.begin("end-worker") as connection:
                workers.mark_dead(connection, incarnation, None, self.clock())

        try:
            self.store.retrying(once, patience_seconds=SIGN_OFF_SECONDS)
        except (exc.SQLAlchemyError, StoreUnreachable) as error:
            logger.warning("could not sign off; others will notice within the heartbeat limit: %r", error)

    def _run(self) -> None:
        interval = self.settings.heartbeat_limit / 5
        while True:
            try:
                self.beat()
            except Exception as error:  # whatever it is, the next beat must be tried
                logger.warning("no heartbeat: %r", error)
            if self._stopping.wait(interval):
                return

    def beat(self) -> None:
        """Beat once; begin an incarnation where there is none, or where it was given up."""
        incarnation = self.executing.incarnation
        with self.store.begin("beat") as connection:
            lives = bool(incarnation) and workers.beat(connection, incarnation, self.clock())
        if lives:
            self.executing.note_beat(incarnation)
            return
        if self._stopping.is_set():
            return  # it has signed off
        if incarnation:
            logger.warning("incarnation %s was given up by another worker; starting afresh", incarnation)
        self._begin_incarnation()

    def _begin_incarnation(self) -> None:
        own, now = self.describe(), self.clock()
        new = Worker(
            str(uuid.uuid4()), own.nodename, os.getpid(), __version__, 1, now, now, own.workflows, own.tasks, own.queues
        )
        with self.store.begin("begin-worker") as connection:
            workers.insert_worker(connection, new)
        self.executing.note_beat(new.incarnation)
