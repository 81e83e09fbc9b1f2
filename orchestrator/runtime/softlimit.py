"""Soft time limits belong to the body: outside of it they are kept back.

Celery raises ``SoftTimeLimitExceeded`` by a signal, wherever the pool process is at that moment; inside a claim or a
settlement that would leave half of it done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from billiard.exceptions import SoftTimeLimitExceeded

_SIGNAL = getattr(signal, "SIGUSR1", None)


class SoftLimit:
    """Raises in the body, and nowhere else."""

    def __init__(self) -> None:
        self._is_allowed = False
        self._is_pending = False

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_allowed:
            raise SoftTimeLimitExceeded
        self._is_pending = True

    @contextmanager
    def allowed(self) -> Iterator[None]:
        self._is_allowed = True
        try:
            if self._is_pending:
                raise SoftTimeLimitExceeded
            yield
        finally:
            self._is_allowed = False


@contextmanager
def deferred(*, in_pool_process: bool) -> Iterator[SoftLimit]:
    """Keep soft time limits back, but inside ``allowed()``; other pools than prefork do not know them."""
    limit = SoftLimit()
    if _SIGNAL is None or not in_pool_process or threading.current_thread() is not threading.main_thread():
        yield limit
        return
    previous = signal.signal(_SIGNAL, limit.on_signal)
    try:
        yield limit
    finally:
        signal.signal(_SIGNAL, previous)
