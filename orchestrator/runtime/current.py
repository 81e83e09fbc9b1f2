"""What a running task can ask of the step that it is an attempt of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

#: A body may ask in a tight loop; the store is asked this often.
ASKED_EVERY_SECONDS = 0.5


class CancelProbe:
    """Asks whether the result of a step is still wanted."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._answer = False
        self._asked_at = -ASKED_EVERY_SECONDS

    def __call__(self) -> bool:
        if not self._answer and time.monotonic() - self._asked_at >= ASKED_EVERY_SECONDS:
            self._asked_at = time.monotonic()
            self._answer = self._ask()
        return self._answer


@dataclass(frozen=True, slots=True)
class CurrentStep:
    """The step that the running task is an attempt of."""

    instance_id: str
    run: int
    seq: int
    attempt: int
    idempotency_key: str
    _is_draining: Callable[[], bool] = field(default=bool, repr=False, compare=False)

    @property
    def cancel_requested(self) -> bool:
        """Whether its scope is being undone, or its task was revoked, so that the sooner the task ends the better.

        Asked of the store.  The task goes on until it ends by itself; of a scope that is being undone it is undone
        then, if it took or may have taken effect.
        """
        return self._is_draining()


_current: ContextVar[CurrentStep | None] = ContextVar("orchestrator_current_step", default=None)


def current_step() -> CurrentStep | None:
    """Return the step that the calling task runs as, ``None`` outside of one.

    ``idempotency_key`` is the same for every attempt and redelivery of the step: give it to the payment provider.
    """
    return _current.get()


@contextmanager
def as_current(step: CurrentStep) -> Iterator[None]:
    """Let ``current_step()`` tell of ``step`` inside the block."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)
