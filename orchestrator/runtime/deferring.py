"""Notices that one thread leaves to be told by another."""

from __future__ import annotations

import threading
from collections import deque
from contextvars import ContextVar

from orchestrator.runtime.notices import Notice

#: Where nobody takes them, receivers are told of older ones by another worker, for they are in the store.
MOST = 10_000

_defers: ContextVar[bool] = ContextVar("orchestrator_defers_notices", default=False)


class Deferred:
    """Between a thread that must not wait for receivers and one that may."""

    def __init__(self) -> None:
        self._notices: deque[Notice] = deque(maxlen=MOST)
        self._woken = threading.Event()

    @staticmethod
    def begin() -> None:
        """From now on this thread tells nothing itself."""
        _defers.set(True)

    def take_over(self, told: list[Notice]) -> bool:
        """Keep what a thread that has begun to defer would tell; ``False`` in all other threads."""
        if _defers.get():
            self._notices.extend(told)
            if told:
                self.wake()
        return _defers.get()

    def wake(self) -> None:
        self._woken.set()

    def wait(self, seconds: float) -> None:
        """Wait until there is something to tell, or for so long."""
        self._woken.wait(seconds)
        self._woken.clear()

    def pop_all(self) -> list[Notice]:
        """Return what was left to be told, and forget it."""
        return [self._notices.popleft() for _ in range(len(self._notices))]
