"""Failures as workflow code sees them, and its own mistakes."""

from __future__ import annotations

from orchestrator import errors
from orchestrator.core.records import Failure, Outcome
from orchestrator.core.saga import Node

#: What is said of a step that ended without an exception: withdrawn, or lost.
_WITHOUT_FAILURE: dict[type[errors.StepFailed], str] = {
    errors.StepWithdrawn: "it never began",
    errors.StepFailed: "it was withdrawn after an attempt that failed",
    errors.StepUnknown: "nobody can say whether it took effect",
    errors.StepTimedOut: "it did not end in time",
}


def failure_of(node: Node) -> errors.StepFailed:
    """Return the exception of a node that did not succeed; it counts as seen from now on."""
    node.is_observed = True
    record = node.record
    if record.timed_out or (record.failure and record.failure.type == "orchestrator.errors.StepTimedOut"):
        kind: type[errors.StepFailed] = errors.StepTimedOut
    else:
        kinds = {Outcome.UNKNOWN: errors.StepUnknown, Outcome.WITHDRAWN: errors.StepWithdrawn}
        kind = kinds.get(node.outcome or Outcome.FAILED, errors.StepFailed)
    failure = record.failure or Failure(f"orchestrator.errors.{kind.__name__}", (), _WITHOUT_FAILURE[kind])
    error: errors.StepFailed = errors.in_class_of(
        kind,
        failure.type,
        failure.bases,
        seq=node.seq,
        name=record.name,
        outcome=str(node.outcome),
        message=failure.message,
        traceback=failure.traceback,
    )
    return error


#: What a typo or a missing import in a deploy raises: it must not undo every order in flight.
PROGRAMMING_ERRORS = (NameError, AttributeError, TypeError, ImportError, RecursionError, MemoryError)


def is_programming_error(error: BaseException) -> bool:
    """Tell whether workflow code itself raised it, not a step."""
    return isinstance(error, PROGRAMMING_ERRORS) and not isinstance(error, errors.StepFailed)
