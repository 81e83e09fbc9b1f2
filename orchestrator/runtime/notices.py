"""What a change of an instance is to observers, told by what it writes: no place that makes one can forget it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from orchestrator import codec
from orchestrator.core.records import Failure, Kind, Outcome, State
from orchestrator.runtime.change import Change
from orchestrator.runtime.dispatch import task_id_of
from orchestrator.store.history import FRESH, HistoryRow
from orchestrator.store.instances import Instance, Status

UNDOING = (Kind.COMPENSATION, Kind.UNDO)
_DISPATCHED = (Kind.STEP, Kind.CHILD, *UNDOING)


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened to an instance; ``signal`` names one of ``orchestrator.signals``.

    ``instance`` is what the instance has become, where it is at hand.  ``id`` is set where receivers have to be told.
    """

    signal: str
    sender: str
    instance_id: str
    generation: str
    workflow: str
    run: int
    at: datetime
    arguments: dict[str, Any] = field(default_factory=dict)
    instance: Instance | None = None
    id: str | None = None

    def numbered(self, notice_id: str) -> Notice:
        return replace(self, id=notice_id)


def list_notices(instance: Instance, change: Change, now: datetime, *, scheduled: bool = True) -> list[Notice]:
    """Return what ``change`` means to observers, steps before the instance as a whole.

    Steps that are to be run are left out unless they are wanted (``scheduled``).
    """
    became = instance.changed(change.instance)
    at = max(now, became.last_at)
    steps = [
        Notice(signal, row.name, instance.id, instance.generation, instance.workflow, row.run, at, arguments)
        for signal, row, arguments in list_steps(change, now, scheduled=scheduled)
    ]
    return [*steps, *_of_instance(instance, became, at)]


def notice_started(row: HistoryRow, workflow: str, at: datetime) -> Notice:
    """Return the notice of an attempt that has begun."""
    return Notice("step_started", row.name, row.instance_id, row.generation, workflow, row.run, at, _started(row))


def notice_of(signal: str, instance: Instance, at: datetime, arguments: dict[str, Any]) -> Notice:
    """Return a notice that is about an instance as a whole."""
    return Notice(
        signal, instance.workflow, instance.id, instance.generation, instance.workflow, instance.run, at, arguments
    )


def _of_instance(before: Instance, after: Instance, at: datetime) -> Iterator[Notice]:
    def notice(signal: str, **arguments: Any) -> Notice:
        return replace(notice_of(signal, after, at, arguments), run=before.run, instance=after)

    if before.started_at is None and after.started_at is not None:
        yield notice("instance_started", parent_id=after.parent_id)
    if before.status is after.status:
        return
    match after.status:
        case Status.BLOCKED:
            yield notice("instance_blocked", reason=after.blocked or "")
        case Status.COMPENSATING:
            yield notice("instance_compensating")
        case Status.RUNNING if before.status is Status.BLOCKED:
            yield notice("instance_resumed")
        case _ if after.status.is_final:
            seconds = (at - after.created_at).total_seconds()
            again = before.status.is_final or after.undo_order is not None
            told = {"status": str(after.status), "seconds": seconds, "again": again}
            yield notice("instance_ended", **told, **_failure(after.failure))


def list_steps(change: Change, now: datetime, *, scheduled: bool) -> Iterator[tuple[str, HistoryRow, dict[str, Any]]]:
    """Return signals about steps, the record that each is about, and its arguments."""
    for before, values in change.rows.values():
        if before.kind in _DISPATCHED:
            yield from _of_row(before, before.changed(values), now)
    for new in change.new_rows if scheduled else ():
        if new["kind"] in _DISPATCHED and new.get("state") is State.SCHEDULED:
            row = HistoryRow(**{**FRESH, **new})
            yield "step_scheduled", row, _step(row, row.attempt + 1)


def _of_row(before: HistoryRow, after: HistoryRow, now: datetime) -> Iterator[tuple[str, HistoryRow, dict[str, Any]]]:
    if before.kind is Kind.CHILD and (before.state, after.state) == (State.SCHEDULED, State.RUNNING):
        yield "step_started", after, _started(after)
    if after.lost > before.lost:
        yield "step_lost", after, _ended_attempt(before, after, now)
    is_again = after.dispatch != before.dispatch or before.state is State.HELD
    if after.state is State.SCHEDULED and is_again:
        if before.state is State.RUNNING and after.lost == before.lost:
            yield "step_retried", after, _ended_attempt(before, after, now)
        yield "step_scheduled", after, _step(after, after.attempt + 1)
    if before.outcome is not None or after.outcome is None:
        return
    has_failed = after.outcome is not Outcome.SUCCEEDED
    told = {
        **_step(after, after.attempt),
        "outcome": str(after.outcome),
        "seconds": _seconds_since_start(after, now),
        "lost": after.lost,
        **_failure(after.failure if has_failed else None),
    }
    if after.kind not in UNDOING:
        yield "step_settled", after, told
        return
    yield "compensation_settled", after, told
    if has_failed and after.resolution is None:  # else an operator has dealt with it
        yield "compensation_failed", after, told


def _ended_attempt(before: HistoryRow, after: HistoryRow, now: datetime) -> dict[str, Any]:
    """Tell of an attempt that has ended and is not the last; by its own dispatch, for that is the task it was."""
    return {
        **_step(before, before.attempt),
        "seconds": _seconds_since_start(before, now),
        **_failure(after.failure),
    }


def _seconds_since_start(row: HistoryRow, now: datetime) -> float | None:
    # when a foreign worker began nobody knows
    begun_at = row.dispatched_at if row.is_foreign else row.started_at
    return None if begun_at is None else max(0.0, (now - begun_at).total_seconds())


def seconds_waited(row: HistoryRow) -> float:
    """Return how long the message of an attempt that has begun was on its way."""
    since = row.dispatched_at or row.scheduled_at
    return max(0.0, (row.started_at - since).total_seconds()) if row.started_at is not None else 0.0


def _started(row: HistoryRow) -> dict[str, Any]:
    return {**_step(row, row.attempt), "waited_seconds": seconds_waited(row)}


def _step(row: HistoryRow, attempt: int) -> dict[str, Any]:
    task_id = row.child_id if row.kind in (Kind.CHILD, Kind.UNDO) else task_id_of(row.key, row.dispatch)
    return {"seq": row.seq, "kind": str(row.kind), "task_id": task_id, "attempt": attempt, "undoes": row.undoes}


def _failure(text: str | None) -> dict[str, Any]:
    if text is None:
        return {"error_type": None, "message": None}
    failure = codec.load(Failure, text)
    return {"error_type": failure.type, "message": failure.message}
