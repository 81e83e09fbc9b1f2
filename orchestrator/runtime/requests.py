"""What is asked of an instance as a whole: cancel, deadline, undo, terminate; each numbered like an outcome.

Each function adds to a change of an instance whose lock is held.  The pass that follows is left owed: whoever asks may
be a web server, or the poller.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from orchestrator import codec, errors
from orchestrator.core.records import Failure, Kind, Outcome, State
from orchestrator.runtime import settling
from orchestrator.runtime.change import Change, Report
from orchestrator.runtime.writing import key_of_parent
from orchestrator.store import history
from orchestrator.store.history import StepKey
from orchestrator.store.instances import Instance, Status
from orchestrator.store.mailbox import MailKind, NewMail

if TYPE_CHECKING:
    from orchestrator.runtime.passes import Passes


def check_cancellable(instance: Instance) -> None:
    """Refuse to cancel what has ended, and what is past the point of no return."""
    if instance.status.is_final and instance.status is not Status.CANCELLED:
        raise errors.InvalidOperation(f"{instance.id} is {instance.status}; it cannot be cancelled any more")
    if instance.is_past_pivot:
        raise errors.InvalidOperation(
            f"{instance.id} is past its pivot, the point of no return; it cannot be cancelled"
        )


def check_terminable(instance: Instance) -> None:
    """Refuse to terminate what has ended otherwise."""
    if instance.status.is_final and instance.status is not Status.TERMINATED:
        raise errors.InvalidOperation(f"{instance.id} is {instance.status}; there is nothing left to terminate")


def check_undoable(instance: Instance) -> None:
    """Refuse to undo what has not completed; what is being undone, or was, has."""
    if instance.undo_order is None and instance.status is not Status.COMPLETED:
        raise errors.InvalidOperation(f"{instance.id} is {instance.status}; only what has completed can be undone")


def check_blocked(instance: Instance) -> None:
    """Refuse to resume what is not blocked."""
    if instance.status is not Status.BLOCKED:
        raise errors.InvalidOperation(f"{instance.id} is {instance.status}; only what is BLOCKED can be resumed")


def request_cancel(passes: Passes, instance: Instance, change: Change, reason: str | None) -> None:
    """Note a cancellation, unless one is noted already or there is nothing left to cancel."""
    if instance.status.is_final or instance.is_past_pivot or instance.cancel_order is not None:
        return
    begins_at = instance.run_started_at if instance.started_at is None else None
    if begins_at is not None and begins_at > passes.clock():
        _cancel_unbegun(passes, instance, change, reason or "it was cancelled before it began")
        return
    order, at = _number(passes, instance, change)
    change.instance.update(cancel_order=order, cancel_at=at, cancel_reason=reason)
    _owe_pass(passes, instance, change)


def pass_deadline(passes: Passes, instance: Instance, change: Change) -> None:
    """Note that the deadline has passed: the same path as a cancellation."""
    change.instance["deadline_at"] = None
    if has_expired(instance, passes.clock()):
        expire(passes, instance, change)
        return
    if instance.status.is_final or instance.is_past_pivot or instance.deadline_order is not None:
        return
    order, at = _number(passes, instance, change)
    change.instance.update(deadline_order=order, deadline_passed_at=at)
    _owe_pass(passes, instance, change)


def has_expired(instance: Instance, now: datetime) -> bool:
    """Tell whether an instance was to have begun by now: until it begins, its deadline is its expiry."""
    is_over = instance.deadline_at is not None and instance.deadline_at <= now
    return is_over and instance.started_at is None and not instance.status.is_final


def expire(passes: Passes, instance: Instance, change: Change) -> None:
    """End an instance that has expired before it began, as Celery revokes such a task."""
    _cancel_unbegun(passes, instance, change, "it expired before it began")


def _cancel_unbegun(passes: Passes, instance: Instance, change: Change, reason: str) -> None:
    failure = Failure("orchestrator.errors.WorkflowCancelled", (), reason)
    end(passes, instance, change, Status.CANCELLED, failure=codec.dump(failure))


def request_undo(passes: Passes, instance: Instance, change: Change, waiting: StepKey | None) -> None:
    """Have a completed instance run its compensations; ``waiting`` is the record of its parent that waits for it."""
    if waiting is not None:
        # the fork that its compensations were given to takes the place of the parent that started it
        change.instance.update(
            undo_seq=waiting.seq,
            parent_id=waiting.instance_id,
            parent_generation=waiting.generation,
            parent_run=waiting.run,
        )
    if instance.status is Status.COMPLETED:
        order, at = _number(passes, instance, change)
        change.instance.update(undo_order=order, undo_at=at, status=Status.COMPENSATING, ended_at=None)
        _owe_pass(passes, instance, change)
    elif instance.status.is_final and waiting is not None:
        change.report = report_undone(instance.changed(change.instance), waiting.seq)


def report_undone(instance: Instance, undo_seq: int) -> Report | None:
    """Return what the state of an ended child is for the record of its parent that undoes it."""
    key = key_of_parent(instance, undo_seq)
    if key is None:
        return None
    if instance.status in (Status.COMPENSATED, Status.FAILED, Status.CANCELLED):
        return Report(key, Outcome.SUCCEEDED, "null")
    return not_undone(key, f"the child {instance.id} is {instance.status}")


def not_undone(key: StepKey, message: str) -> Report:
    failure = Failure("orchestrator.errors.ChildNotUndone", ("builtins.Exception",), message)
    return Report(key, Outcome.FAILED, None, codec.dump(failure))


def terminate(passes: Passes, connection: Connection, instance: Instance, change: Change, reason: str | None) -> None:
    """End an instance where it stands: what has not begun never will, what has is left to end, nothing is undone."""
    if instance.status.is_final:
        return
    rows = history.load_rows(connection, instance.id, instance.run)
    for row in rows:
        if row.state in (State.HELD, State.SCHEDULED, State.BLOCKED):
            is_out = row.is_foreign and row.publications > 0  # nobody can say whether it has begun
            outcome = Outcome.UNKNOWN if is_out else settling.outcome_unbegun(row)
            settled = {"state": State.SETTLED, "outcome": outcome, "awaited": None}
            change.change_row(row, {**settled, "publish_at": None, "expires_at": None, "due_at": None})
        is_open = row.state in (State.RUNNING, State.TIMED_OUT)
        if is_open:  # left to end, and not tried again
            change.change_row(row, {"is_draining": True, "due_at": None})
        if row.kind is Kind.CHILD and is_open and not row.is_detached and row.child_id is not None:
            change.mail.append(
                NewMail(row.child_id, kind=MailKind.TERMINATE, payload=reason, message_id=f"stop:{row.run}:{row.seq}")
            )
    failure = Failure("orchestrator.errors.WorkflowTerminated", ("builtins.Exception",), reason or "terminated")
    ends = end if instance.undo_order is None else end_again
    ends(passes, instance, change, Status.TERMINATED, failure=codec.dump(failure))


def end(
    passes: Passes,
    instance: Instance,
    change: Change,
    status: Status,
    *,
    result: str | None = None,
    failure: str | None = None,
) -> None:
    """Give an instance its final status; what this means to Celery and to its parent follows from it."""
    ended_at = max(passes.clock(), change.instance.get("last_at", instance.last_at))
    change.instance.update(
        status=status,
        result=result,
        failure=failure,
        waiting=0,
        ended_at=ended_at,
        last_at=ended_at,
        deadline_at=None,
        pass_due_at=None,
        blocked_steps=0,
        blocked=None,
    )
    change.ends = True
    ended = instance.changed(change.instance)
    change.outbox.ended = ended
    change.report = _report_end(ended)


def end_again(
    passes: Passes, instance: Instance, change: Change, status: Status, *, failure: str | None = None
) -> None:
    """End an instance that had completed and was being undone.

    Celery was told its result, and is told nothing more; its parent may wait for the undo.
    """
    end(passes, instance, change, status, result=instance.result, failure=failure)
    change.ends, change.outbox.ended, change.report = False, None, None
    if instance.undo_seq is not None:
        change.report = report_undone(instance.changed(change.instance), instance.undo_seq)


#: What the end of a child is to its parent: what was undone has left nothing behind.
_OUTCOMES = {
    Status.COMPLETED: Outcome.SUCCEEDED,
    Status.FAILED: Outcome.FAILED,
    Status.COMPENSATED: Outcome.FAILED,
    Status.CANCELLED: Outcome.FAILED,
    Status.COMPENSATION_FAILED: Outcome.UNKNOWN,
    Status.TERMINATED: Outcome.UNKNOWN,
}


def _report_end(ended: Instance) -> Report | None:
    key = key_of_parent(ended, ended.parent_seq)
    if key is None:
        return None
    return Report(key, _OUTCOMES[ended.status], ended.result, ended.failure)


def _number(passes: Passes, instance: Instance, change: Change) -> tuple[int, datetime]:
    """Take the next order, as an outcome does."""
    order: int = change.instance.get("next_order", instance.next_order)
    at: datetime = max(passes.clock(), change.instance.get("last_at", instance.last_at))
    change.instance.update(next_order=order + 1, last_at=at)
    return order, at


def _owe_pass(passes: Passes, instance: Instance, change: Change) -> None:
    seen = instance.changed(change.instance)
    if seen.may_pass:
        settling.owe_pass(instance, change, passes.later(passes.settings.publish_grace))
