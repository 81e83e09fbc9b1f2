"""``decide``: run a workflow function over its history, and say what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.ending import end_scope, undo_scope
from orchestrator.core.failing import is_programming_error
from orchestrator.core.host import Host
from orchestrator.core.passes import Pass
from orchestrator.core.records import (
    Broken,
    Completed,
    Decision,
    Diverged,
    Ending,
    Failed,
    History,
    Undone,
)
from orchestrator.core.saga import Scope
from orchestrator.core.wanted import Wanted

__all__ = ["conclude", "decide", "run_function"]


def decide(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], history: History, host: Host
) -> Decision:
    """Run ``function(ctx, *args, **kwargs)`` over ``history`` and return what this pass asks for.

    It is a function of its arguments alone: on any prefix of a history it asks for exactly what the rest of that
    history records.  ``host.perform`` runs what ``ctx.local`` is given, only where no result of it is recorded.

    Exceptions that are not ``Exception`` (an interrupted process) go through: such a pass has decided nothing.
    """
    current = Pass(history, host)
    context = Context(current, function)
    try:
        return conclude(current, context, run_function(current, context, function, args, kwargs))
    finally:
        current.forget()


def run_function(
    current: Pass, context: Context, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Ending:
    """Run a workflow function and return how the pass ended."""
    try:
        return _run(current, context, function, args, kwargs)
    except BaseException as error:
        # whatever a suspended function raises, the pass is suspended; but an interrupted process has decided nothing
        if current.ending is None or isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return current.ending


def conclude(current: Pass, context: Context, ending: Ending) -> Decision:
    """Return what a pass that came to ``ending`` has decided."""
    asked = len(current.nodes)
    if asked < len(current.recorded) and not isinstance(ending, Diverged | Broken):
        rest = current.recorded[asked]
        ending = Diverged(asked, f"{rest.kind} {rest.name}", "nothing more")
    if isinstance(ending, Diverged | Broken):
        # nothing of such a pass is written: what it asked for before it went wrong, mended code may never ask for
        return Decision(ending, not_undone=tuple(current.not_undone))
    return Decision(
        ending,
        tuple(current.records),
        tuple(current.withdrawals),
        tuple(current.not_undone),
        dict(context._attributes),
        context._progress,
        tuple(current.receipts),
        tuple(current.cancels),
    )


def _run(
    current: Pass, context: Context, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Ending:
    root = current.scope
    try:
        value = function(context, *args, **kwargs)
        current.check_live()
        end_scope(current, root)
    except (Exception, errors.WorkflowCancelled) as error:
        current.check_live()  # whatever a suspended function raises, the pass is suspended
        if is_programming_error(error):
            current.break_off(error)
        _undo_root(current, root)
        # of any scope: the failure of a nested one may have been caught on its way here
        return Failed(current.host.describe(error), current.has_compensated, _is_cancelled(error))
    try:
        result = current.host.encode(value, "the result of the workflow")
    except errors.InvalidInput as error:
        # the work is done and its result cannot be kept: a deploy mends that, undoing it all would not
        current.break_off(error)
    if not current.has_completed:
        return Completed(result)
    nothing = Wanted({}, 0)
    while not current.is_undo_requested:
        current.deliver_next(nothing)
    _undo_root(current, root)
    return Undone(current.host.describe(errors.WorkflowUndone()))


def _undo_root(current: Pass, root: Scope) -> None:
    current.scope = root
    current.is_compensating = True
    undo_scope(current, root)


def _is_cancelled(error: BaseException) -> bool:
    """Tell whether it was a cancellation that the exception came of: of the two, the first decides."""
    seen: set[int] = set()  # ``raise error from error`` makes a circle
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if isinstance(each, errors.WorkflowCancelled):
            return True
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            left += [each.__cause__, each.__context__]
    return False
