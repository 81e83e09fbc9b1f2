"""A thread of each worker that tells observers of what its poller did, and of what dead processes did not tell.

It is not the poller's own: receivers are other people's code, and one that hangs must not stop the clock of the worker.
"""

from __future__ import annotations

import logging
import threading
import time

from orchestrator.runtime.observing import Observers
from orchestrator.store.engine import is_transient

logger = logging.getLogger("orchestrator")


class Teller:
    """Tells what is handed to it, and looks in the store once a poll interval."""

    def __init__(self, observers: Observers, interval_seconds: float) -> None:
        self.observers = observers
        self._interval_seconds = interval_seconds
        self._looked_at = -interval_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="orchestrator-teller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Tell what has been handed over, and end.  A receiver that hangs is not waited for: others tell it later."""
        self._stopping.set()
        self.observers.deferred.wake()
        if self._thread.is_alive():
            self._thread.join(timeout=self._interval_seconds)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.observers.deferred.wait(self._interval_seconds)
            self.observers.tell_deferred()
            if self._stopping.is_set() or time.monotonic() - self._looked_at < self._interval_seconds:
                continue
            self._looked_at = time.monotonic()
            try:
                while self.observers.tell_due() and not self._stopping.is_set():
                    self.observers.tell_deferred()
            except Exception as error:  # whatever it is, what is due is still there
                expected = is_transient(error) or isinstance(error, OSError)
                level = logging.WARNING if expected else logging.ERROR
                logger.log(level, "receivers of signals will be told later: %r", error, exc_info=not expected)
