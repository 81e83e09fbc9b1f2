"""When runs end, told by the processes in which they do.

Clients differ in how they learn that something has ended: a result backend publishes it, a store is polled.  Neither is
what is measured.  A worker notes the instant at which a marked task is over (its result kept, what follows it
published: Celery's ``task_postrun``), by a clock that all processes of a machine share, and tells it through the
broker's server.  It is the same for all that run on Celery.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
from celery import signals

#: Tasks that are told of: the first and the last of a run.
FIRST = "benchmarks.first"
LAST = frozenset(
    {
        "benchmarks.finish",
        "benchmarks.echo_last",
        "benchmarks.join",
        "benchmarks.undo_last",
        "benchmarks.local",
        "celery_saga.compensation_complete",
        "celery_saga.complete",
    }
)
_LOOK_EVERY_SECONDS = 0.004


def now() -> float:
    """The instant, by a clock that is the same in all processes of the machine."""
    return time.monotonic()


@dataclass(frozen=True, slots=True)
class Mark:
    """A marked task was over."""

    task: str
    at: float


class Marks:
    """The list in which the workers of one contender tell of marked tasks."""

    def __init__(self, url: str, queue: str) -> None:
        self._url, self._key = url, f"benchmarks:marks:{queue}"
        self._client: Any = None
        self._pid = 0

    @property
    def client(self) -> Any:
        if self._pid != os.getpid():  # a connection does not outlive a fork
            self._client, self._pid = redis.Redis.from_url(self._url), os.getpid()
        return self._client

    def install(self) -> None:
        """Tell of marked tasks, in this process and those that it forks."""
        signals.task_postrun.connect(self._tell, weak=False)

    def _tell(self, sender: Any = None, **_kwargs: Any) -> None:
        at, name = now(), sender.name
        if name == FIRST or name in LAST:
            self.client.rpush(self._key, f"{name} {at!r}")

    def clear(self) -> None:
        self.client.delete(self._key)

    def wait(self, count: int, seconds: float, check: Callable[[], None]) -> list[Mark]:
        """Return the marks when there are ``count``.  Raises ``TimeoutError``, and what ``check`` does."""
        deadline, looked_at = now() + seconds, now()
        while self.client.llen(self._key) < count:
            if now() > deadline:
                raise TimeoutError(f"{self.client.llen(self._key)} of {count} ends within {seconds:.0f} s")
            if now() - looked_at > 1.0:
                check()
                looked_at = now()
            time.sleep(_LOOK_EVERY_SECONDS)
        told = [entry.decode().rsplit(" ", 1) for entry in self.client.lrange(self._key, 0, -1)]
        self.clear()
        return [Mark(name, float(at)) for name, at in told]
