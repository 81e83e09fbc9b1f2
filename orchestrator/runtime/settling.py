"""What an outcome means for the instance: what it counts for, and what is told beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from orchestrator import codec
from orchestrator.core.attempts import AttemptDoubtful, AttemptLost, AttemptSucceeded, Ended
from orchestrator.core.records import Broken, Diverged, Failure, Kind, NotUndone, Outcome, Role, State, Wake
from orchestrator.runtime.change import Change
from orchestrator.store import history
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Instance, Status

TIMED_OUT = "orchestrator.errors.StepTimedOut"
_OF_CANCELLATION = ("orchestrator.errors.WorkflowCancelled", "orchestrator.errors.CompensationFailed")


# --- counting -----------------------------------------------------------------------------------------------------


def count_down(instance: Instance, row: HistoryRow, values: Mapping[str, Any], *, is_closed: bool) -> int:
    """Return what the instance still waits for once ``row`` has changed to ``values``.

    Only a record that the current wait names counts; each once, because its mark is cleared when it was counted.
    """
    if row.awaited is None or row.awaited != instance.wait_number or instance.waiting == 0:
        return instance.waiting
    if row.wake is Wake.CLOSED and not is_closed:
        return instance.waiting
    is_failure = values.get("outcome", row.outcome) is not Outcome.SUCCEEDED
    if row.wake is Wake.ALONE or (row.wake is Wake.FAILURE and is_failure):
        return 0
    return instance.waiting - 1


def frees_place(instance: Instance, row: HistoryRow, outcome: Outcome | None) -> bool:
    """Tell whether the next item of the map that ``row`` belongs to may go."""
    if row.lane is None or row.outcome is not None:  # what timed out has left the lane, whenever its attempt ends
        return False
    if row.state is State.HELD:  # it is skipped, and had no place
        return False
    if row.wake is not Wake.FAILURE or row.awaited != instance.wait_number:
        return True
    # after the failure that stops the map the pass may be owed; what it is going to withdraw must not begin until then
    return outcome is Outcome.SUCCEEDED and instance.waiting > 0


def frees_cancellation(instance: Instance, settled: HistoryRow) -> bool:
    """Tell whether a cancellation may be raised now that has waited for the pivot, whatever else is waited for."""
    has_failed = settled.role is Role.PIVOT and settled.outcome is not Outcome.SUCCEEDED
    return has_failed and (instance.cancel_order is not None or instance.deadline_order is not None)


def count_attempt(instance: Instance, cap: int, due_at: datetime) -> dict[str, Any]:
    """Return the columns of an instance of which a pass is about to begin, or which has had too many."""
    if instance.pass_attempts < cap:
        return {"pass_attempts": instance.pass_attempts + 1, "pass_due_at": due_at, "pass_publications": 0}
    return {
        "status": Status.BLOCKED,
        "pass_due_at": None,
        "blocked": f"{instance.pass_attempts} passes were begun and never came back: running the workflow function "
        f"{instance.workflow} seems to end its process; deploy code that does not, then resume the instance",
    }


def may_be_passing(instance: Instance, now: datetime) -> bool:
    """Tell whether the last pass that was counted began within the grace, and no message was published since.

    Messages come doubled: one that meets the passes of others must not take them for passes that never came back.
    """
    return instance.pass_publications == 0 and instance.pass_due_at is not None and instance.pass_due_at > now


def explain(ending: Diverged | Broken) -> str:
    """Say in words why no code could go on."""
    if isinstance(ending, Broken):
        failure = ending.failure
        return (
            f"the workflow function raised {failure.type}: {failure.message}; nothing was undone: deploy code that "
            f"does not raise that, and it goes on\n{failure.traceback or ''}"
        )
    return (
        f"step {ending.seq}: history has {ending.recorded!r}, the workflow asked for {ending.requested!r}; deploy code "
        "that matches, or guard the change with ctx.patched()"
    )


def owe_pass(instance: Instance, change: Change, due_at: datetime) -> None:
    """Leave the pass to whoever takes the message about it, or to the poller's."""
    change.instance.update(pass_due_at=due_at, pass_publications=1)
    change.outbox.owes_pass = [instance.changed(change.instance)]


# --- answers that were lost ---------------------------------------------------------------------------------------


def is_written(connection: Connection, instance: Instance, change: Change) -> bool:
    """Tell by its records whether a change took effect to whose COMMIT no answer came."""
    for row, values in change.rows.values():
        if values.keys() & {"settled_order", "late_order", "dispatch"}:
            expected, found = row.changed(values), history.find_row(connection, row.key)
            return found is not None and _told_by(found) == _told_by(expected)
    for new in change.new_rows:
        found = history.find_row(connection, StepKey(instance.id, instance.generation, instance.run, new["seq"]))
        if found is None:
            return False
        # another change may have put a record of its own there: a second operator's, or that of other code
        return (found.name, found.undoes, found.scheduled_at) == (new["name"], new["undoes"], new["scheduled_at"])
    return False


def _told_by(row: HistoryRow) -> tuple[object, ...]:
    return (row.attempt, row.failures, row.lost, row.dispatch, row.outcome, row.settled_order, row.late_order)


# --- what the clock brings ----------------------------------------------------------------------------------------


def settle_by_clock(row: HistoryRow, now: datetime) -> tuple[dict[str, Any], Outcome, str | None] | None:
    """Return what a step's timeout or its expiry makes of its record; ``None``: not due."""
    settled = {"state": State.SETTLED, "publish_at": None, "expires_at": None, "due_at": None}
    if row.kind is Kind.TIMER or row.state not in (State.SCHEDULED, State.RUNNING):
        return None
    if row.timeout_at is not None and row.timeout_at <= now:
        message = f"no outcome within {row.timeout_seconds} s of its first dispatch"
        failure = codec.dump(Failure(TIMED_OUT, ("builtins.TimeoutError", "builtins.Exception"), message))
        if row.is_foreign:
            return settled, Outcome.UNKNOWN, failure  # nobody will tell whether an attempt of it is alive
        if row.state is State.RUNNING:
            # the attempt may be alive: it keeps its claim, and nothing is retried or undone before it has ended
            return {"state": State.TIMED_OUT, "is_timed_out": True, "due_at": None}, Outcome.UNKNOWN, failure
        return settled, outcome_unbegun(row), failure
    is_elsewhere = row.is_foreign and row.publications > 0  # whether it has begun there, nobody can say
    if row.state is State.SCHEDULED and not is_elsewhere and row.expires_at is not None and row.expires_at <= now:
        failure = codec.dump(Failure("orchestrator.errors.StepWithdrawn", (), "it expired before it began"))
        return settled, outcome_unbegun(row), failure
    return None


def outcome_unbegun(row: HistoryRow) -> Outcome:
    """Return what becomes of a scheduled step that is not tried again."""
    if row.is_in_doubt:
        return Outcome.UNKNOWN
    return Outcome.WITHDRAWN if row.attempt == 0 else Outcome.FAILED


# --- attempts that were given up ----------------------------------------------------------------------------------


def note_stray(
    connection: Connection, instance: Instance, row: HistoryRow, attempt: int, ended: Ended, now: datetime
) -> Change | None:
    """Keep what an attempt that was given up came to after all, once, and name an effect that came after its undo."""
    if isinstance(ended, AttemptLost):
        return None
    took_effect = isinstance(ended, AttemptSucceeded | AttemptDoubtful)
    outcome = "succeeded" if isinstance(ended, AttemptSucceeded) else type(ended).__name__
    strays = json.loads(row.strays) if row.strays else []
    if any((stray["attempt"], stray["ended"]) == (attempt, outcome) for stray in strays):
        return None
    strays.append({"attempt": attempt, "ended": outcome, "at": now.isoformat()})
    change = Change(notes=[(row, {"strays": json.dumps(strays)})])
    undoing = history.find_undoing(connection, row.key) if took_effect else None
    if undoing is not None and (undoing.attempt > 0 or undoing.state is State.SETTLED):
        message = f"attempt {attempt} of step {row.seq} was given up, and took effect after its compensation had begun"
        not_undone = [*list_not_undone(instance), NotUndone(undoing.seq, row.seq, undoing.name, message, row.run)]
        change.instance["not_undone"] = dump_not_undone(not_undone)
        if instance.status in (Status.COMPENSATED, Status.CANCELLED):
            change.instance["status"] = Status.COMPENSATION_FAILED
    return change


def list_not_undone(instance: Instance) -> list[NotUndone]:
    """Return the compensations that failed and that no operator has dealt with."""
    return [NotUndone(**entry) for entry in json.loads(instance.not_undone)] if instance.not_undone else []


def dump_not_undone(entries: list[NotUndone]) -> str | None:
    return json.dumps([dataclasses.asdict(entry) for entry in entries]) if entries else None


def conclude_repair(connection: Connection, instance: Instance, change: Change, repair: HistoryRow) -> None:
    """Take what an operator's repeated compensation undid from the list; with the last one the saga is undone."""
    assert repair.undoes is not None
    failed = history.find_undoing(connection, dataclasses.replace(repair.key, seq=repair.undoes))
    if repair.outcome is not Outcome.SUCCEEDED or failed is None:
        return
    change.notes.append((failed, {"resolution": f"undone by the repeated compensation {repair.seq}"}))
    repaired = (repair.run, repair.undoes)
    remaining = [entry for entry in list_not_undone(instance) if (entry.run, entry.undoes) != repaired]
    settle_not_undone(instance, change, remaining)


def settle_not_undone(instance: Instance, change: Change, remaining: list[NotUndone]) -> None:
    change.instance["not_undone"] = dump_not_undone(remaining)
    if not remaining and instance.status is Status.COMPENSATION_FAILED:
        change.instance["status"] = Status.CANCELLED if _was_cancelled(instance) else Status.COMPENSATED


def _was_cancelled(instance: Instance) -> bool:
    """Tell whether an instance that ended would be ``CANCELLED``, had all of it been undone.

    A nested scope that could not be undone has put its own error in place of the cancellation.
    """
    is_requested = instance.cancel_order is not None or instance.deadline_order is not None
    if not is_requested or instance.failure is None:
        return False
    return codec.load(Failure, instance.failure).type in _OF_CANCELLATION
