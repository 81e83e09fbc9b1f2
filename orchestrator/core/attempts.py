"""What the end of an attempt means for its step: another attempt, or an outcome.

A step is ``failed`` only if an attempt failed and of every attempt it is known what it did.  An attempt that was lost
taints the step: if none succeeds, it is ``unknown``, and undone like one that took effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from orchestrator.core.records import Failure, Outcome, Payload
from orchestrator.core.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class AttemptSucceeded:
    """The body returned."""

    result: Payload


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The body raised."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class AttemptDoubtful:
    """The body ended in a way that does not tell whether it took effect; another attempt may be asked for."""

    failure: Failure
    is_final: bool = False  # a result that cannot be recorded: another attempt would only repeat that


@dataclass(frozen=True, slots=True)
class AttemptLost:
    """The process that held the claim is gone."""

    failure: Failure


Ended = AttemptSucceeded | AttemptFailed | AttemptDoubtful | AttemptLost


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a step when an attempt of it ends."""

    failures: int
    lost: int
    is_in_doubt: bool
    is_draining: bool
    retry: RetryPolicy | None
    elapsed_seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """``outcome`` is ``None`` where another attempt follows after ``delay_seconds``."""

    failures: int
    lost: int
    is_in_doubt: bool
    outcome: Outcome | None = None
    result: Payload | None = None
    failure: Failure | None = None
    delay_seconds: float = 0.0


def judge(standing: Standing, ended: Ended, *, max_lost: int, chance: float) -> Verdict:
    """Decide what follows the end of an attempt; ``chance`` in [0, 1) spreads the delay of a retry."""
    failures, lost, in_doubt = standing.failures, standing.lost, standing.is_in_doubt
    match ended:
        case AttemptSucceeded():
            return Verdict(failures, lost, in_doubt, Outcome.SUCCEEDED, ended.result)
        case AttemptLost():
            lost, in_doubt = lost + 1, True
            again = 0.0 if lost <= max_lost and not standing.is_draining else None
        case AttemptFailed():
            failures += 1
            again = _retry_delay(standing, ended.failure, failures, chance)
        case AttemptDoubtful():
            failures, in_doubt = failures + 1, True
            again = None if ended.is_final else _retry_delay(standing, ended.failure, failures, chance)
        case _:
            assert_never(ended)
    if again is not None:
        return Verdict(failures, lost, in_doubt, failure=ended.failure, delay_seconds=again)
    return Verdict(failures, lost, in_doubt, Outcome.UNKNOWN if in_doubt else Outcome.FAILED, None, ended.failure)


def late_outcome(standing: Standing, ended: Ended) -> Outcome:
    """Return what an attempt that outlived its step's timeout came to."""
    match ended:
        case AttemptSucceeded():
            return Outcome.SUCCEEDED
        case AttemptFailed():
            return Outcome.UNKNOWN if standing.is_in_doubt else Outcome.FAILED
        case AttemptDoubtful() | AttemptLost():
            return Outcome.UNKNOWN
        case _:
            assert_never(ended)


def _retry_delay(standing: Standing, failure: Failure, failures: int, chance: float) -> float | None:
    # while its scope drains a step is not tried again: what is to be undone must stop growing
    if standing.retry is None or standing.is_draining:
        return None
    return standing.retry.delay_after(failures, standing.elapsed_seconds, (failure.type, *failure.bases), chance)
