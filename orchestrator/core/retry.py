"""When a failed attempt is followed by another, and how much later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

__all__ = ["COMPENSATION_RETRY", "RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retry a step durably, on top of whatever retries its Celery task makes by itself.

    The wait before attempt ``n + 1`` is ``initial_interval * backoff ** (n - 1)``, at most ``max_interval``, of which
    the share ``jitter`` is random (0: none, 1: anything from nothing to the whole).  It stops after ``max_attempts``
    attempts, when the next attempt would begin later than ``max_duration`` after the step was first scheduled, or at
    once for an exception whose class, or one of its bases, is named in ``stop_on``.  ``None`` means no limit.

    ``stop_on`` takes exception classes or their names (``"CardDeclined"`` or ``"shop.payments.CardDeclined"``).
    """

    max_attempts: int | None = None
    initial_interval: timedelta = timedelta(seconds=1)
    backoff: float = 2.0
    max_interval: timedelta = timedelta(hours=1)
    max_duration: timedelta | None = None
    jitter: float = 0.1
    stop_on: tuple[str | type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; a step has at least one attempt")
        if self.initial_interval < timedelta(0) or self.max_interval < timedelta(0):
            raise ValueError("the intervals of a RetryPolicy cannot be negative")
        if not 1 <= self.backoff < math.inf:
            raise ValueError(f"backoff is {self.backoff}; below 1 the waits would shrink, and endless it cannot be")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter is {self.jitter}; it is a share, from 0 to 1")
        names = tuple(entry if isinstance(entry, str) else _class_name(entry) for entry in self.stop_on)
        object.__setattr__(self, "stop_on", names)

    def interval_seconds(self, attempts: int, chance: float) -> float:
        """Return how long to wait after the attempt numbered ``attempts``; ``chance`` in [0, 1) spreads it."""
        most = self.max_interval.total_seconds()
        first = self.initial_interval.total_seconds()
        if first <= 0:
            return 0.0
        # in logarithms: backoff ** 5000 overflows long before an operator notices a step that never gives up
        grown = math.log(first) + (attempts - 1) * math.log(self.backoff)
        interval = most if most <= 0 or grown >= math.log(most) else math.exp(grown)
        return interval * (1 - self.jitter * chance)

    def delay_after(
        self, attempts: int, elapsed_seconds: float, error_types: tuple[str, ...], chance: float
    ) -> float | None:
        """Return the seconds until the next attempt, or ``None`` when there is to be none.

        ``attempts`` have been made, ``elapsed_seconds`` after the step was first scheduled; ``error_types`` are the
        full names of the failure's class and its bases.
        """
        if self.max_attempts is not None and attempts >= self.max_attempts:
            return None
        if any(_names(entry, error_type) for entry in self.stop_on for error_type in error_types):
            return None
        delay = self.interval_seconds(attempts, chance)
        if self.max_duration is not None and elapsed_seconds + delay > self.max_duration.total_seconds():
            return None
        return delay


def _class_name(cls: type[BaseException]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _names(entry: str | type[BaseException], error_type: str) -> bool:
    return error_type == entry or error_type.rpartition(".")[2] == entry


#: A compensation goes on for three days, at most an hour apart, before a person has to look.
COMPENSATION_RETRY = RetryPolicy(max_duration=timedelta(days=3))
