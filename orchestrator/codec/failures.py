"""What of an exception is recorded: names and text only."""

from __future__ import annotations

import traceback

from orchestrator import errors
from orchestrator.core.records import Failure

__all__ = ["describe_error"]

_MESSAGE_CHARACTERS = 10_000
_TRACEBACK_CHARACTERS = 20_000


def describe_error(error: BaseException) -> Failure:
    """Return what is recorded of ``error``.

    A ``StepFailed`` (or ``WorkflowFailed``) that left a workflow is recorded as the activity's own exception, so that
    whoever waits for the workflow can catch that too.
    """
    kinds: tuple[type, ...] = (BaseException, object)
    error_type = _name(type(error))
    if isinstance(error, errors.StepFailed | errors.WorkflowFailed):
        error_type = error.error_type
        kinds += (errors.StepFailed, errors.WorkflowFailed, errors.OrchestratorError)
        kinds += (errors.StepUnknown, errors.StepTimedOut, errors.StepWithdrawn)
    names = (_name(base) for base in type(error).__mro__[1:] if base not in kinds)
    return Failure(
        type=error_type,
        bases=tuple(name for name in names if name != error_type),
        message=_printable(_message(error)[:_MESSAGE_CHARACTERS]),
        traceback=_traceback(error),
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"<{type(error).__qualname__} whose __str__ raised {type(broken).__qualname__}>"


def _traceback(error: BaseException) -> str | None:
    if error.__traceback__ is None:
        return None
    return _printable("".join(traceback.format_exception(error)))[-_TRACEBACK_CHARACTERS:]


def _printable(text: str) -> str:
    """Escape what is no Unicode text (half of a surrogate pair, from a file name): not every store takes it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
