"""From a decision to what is written."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_never

from sqlalchemy import Connection

from orchestrator import codec
from orchestrator.core.records import (
    Broken,
    Completed,
    Decision,
    Diverged,
    Failed,
    Kind,
    NewRecord,
    NotUndone,
    Outcome,
    RegisterCompensation,
    RunCompensation,
    ScheduleStep,
    StartTimer,
    State,
    Waiting,
    Withdrawal,
)
from orchestrator.runtime.change import Change, with_values
from orchestrator.runtime.settling import dump_not_undone, explain, list_not_undone
from orchestrator.store import history
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status

if TYPE_CHECKING:
    from orchestrator.runtime.passes import Passes


def apply_decision(
    passes: Passes,
    connection: Connection,
    instance: Instance,
    rows: dict[int, HistoryRow],
    decision: Decision,
    change: Change,
) -> None:
    """Add to ``change`` what a pass decided."""
    match decision.ending:
        case Diverged() | Broken():
            # nothing of such a pass is written: the code that matches will ask for it again; but it has come back
            change.instance["pass_attempts"] = 0
            passes.refuse(connection, instance, explain(decision.ending), change)
            return
        case _:
            pass
    events = [
        *(withdrawal.event for withdrawal in decision.withdrawals if withdrawal.event is not None),
        *(new.event for new in decision.records if new.event is not None),
    ]
    for withdrawal in decision.withdrawals:
        _withdraw(change, rows[withdrawal.seq], withdrawal)
    _insert(passes, instance, decision.records, change)
    change.attributes = decision.attributes
    change.instance.update(
        next_seq=instance.next_seq + len(decision.records),
        next_order=max([instance.next_order, *(event.order + 1 for event in events)]),
        pass_due_at=None,
        pass_attempts=0,
        pass_publications=0,
        refused=None,
        blocked=None,
        started_at=instance.started_at or instance.created_at,
    )
    change.instance["passed_order"] = change.instance["next_order"] - 1
    if decision.progress is not None:
        change.instance["progress"] = decision.progress
    not_undone = _merge_not_undone(instance, rows, decision.not_undone)
    change.instance["not_undone"] = dump_not_undone(not_undone)
    match decision.ending:
        case Waiting():
            _wait(change, instance, rows, decision.ending)
        case Completed():
            _end(passes, change, instance, rows, Status.COMPLETED, result=decision.ending.result)
        case Failed():
            status = _failed_status(decision.ending, not_undone)
            _end(passes, change, instance, rows, status, failure=codec.dump(decision.ending.failure))
        case _:
            assert_never(decision.ending)


def _failed_status(ending: Failed, not_undone: list[NotUndone]) -> Status:
    if not_undone:  # what an operator has dealt with is not among them, though the workflow was told that it failed
        return Status.COMPENSATION_FAILED
    return Status.COMPENSATED if ending.undone else Status.FAILED


def _merge_not_undone(
    instance: Instance, rows: dict[int, HistoryRow], decided: tuple[NotUndone, ...]
) -> list[NotUndone]:
    """Return what is not undone: every replay tells of each failed compensation, late effects are known besides."""
    told = {entry.seq for entry in decided}
    late = [entry for entry in list_not_undone(instance) if entry.seq not in told]
    return late + [entry for entry in decided if entry.seq not in rows or rows[entry.seq].resolution is None]


def _withdraw(change: Change, row: HistoryRow, withdrawal: Withdrawal) -> None:
    values: dict[str, Any] = {
        "state": State.SETTLED,
        "outcome": withdrawal.outcome,
        "publish_at": None,
        "expires_at": None,
        "due_at": None,
        "awaited": None,
    }
    if withdrawal.event is not None:
        values["settled_order"], values["settled_at"] = withdrawal.event.order, withdrawal.event.at
    change.change_row(row, values)
    change.outbox.steps = [step for step in change.outbox.steps if step.seq != row.seq]


def _wait(change: Change, instance: Instance, rows: dict[int, HistoryRow], waiting: Waiting) -> None:
    number = instance.wait_number + 1
    change.instance.update(
        status=Status.COMPENSATING if waiting.is_compensating else Status.RUNNING,
        waiting=waiting.count,
        wait_number=number,
    )
    fresh = {row["seq"]: row for row in change.new_rows}
    change.wakes = {seq: wake for seq, wake in waiting.wakes.items() if seq not in fresh}
    for seq, wake in waiting.wakes.items():
        if seq in fresh:
            fresh[seq].update(awaited=number, wake=wake)
    for seq in waiting.draining:
        if not rows[seq].is_draining:
            change.change_row(rows[seq], {"is_draining": True})


def _end(
    passes: Passes,
    change: Change,
    instance: Instance,
    rows: dict[int, HistoryRow],
    status: Status,
    result: str | None = None,
    failure: str | None = None,
) -> None:
    _stop_timers(change, rows)
    ended_at = max(passes.clock(), change.instance.get("last_at", instance.last_at))
    change.instance.update(
        status=status, result=result, failure=failure, waiting=0, ended_at=ended_at, last_at=ended_at
    )
    change.ends = True
    change.outbox.ended = with_values(instance, change.instance)


def _stop_timers(change: Change, rows: dict[int, HistoryRow]) -> None:
    """Withdraw the timers that nobody has waited for: left as they are, they would be due for ever."""
    stopped = {"state": State.SETTLED, "outcome": Outcome.WITHDRAWN, "due_at": None}
    for row in rows.values():
        if row.kind is Kind.TIMER and row.state is State.SCHEDULED:
            change.change_row(row, stopped)
    for new in change.new_rows:
        if new["kind"] is Kind.TIMER and new["state"] is State.SCHEDULED:
            new.update(stopped)


# --- new records --------------------------------------------------------------------------------------------------


def _insert(passes: Passes, instance: Instance, records: tuple[NewRecord, ...], change: Change) -> None:
    for new in records:
        row = _new_row(passes, instance, new)
        change.new_rows.append(row)
        is_published = row["state"] is State.SCHEDULED and row.get("publications", 0) > 0
        if is_published and new.command.kind is not Kind.TIMER:
            change.outbox.steps.append(HistoryRow(**{**history.FRESH, **row}))


def _new_row(passes: Passes, instance: Instance, new: NewRecord) -> dict[str, Any]:
    command = new.command
    now = max(passes.clock(), instance.last_at)
    row: dict[str, Any] = {
        "instance_id": instance.id,
        "generation": instance.generation,
        "run": instance.run,
        "seq": new.seq,
        "kind": command.kind,
        "name": command.name,
        "scope": command.scope,
        "undoes": command.undoes,
        "after_order": new.after_order,
        "scheduled_at": now,
    }
    match command:
        case ScheduleStep():
            row |= {
                "arguments": command.arguments,
                "options": codec.encode(command.options, "the options") if command.options else None,
                "compensation": codec.dump(command.compensation) if command.compensation else None,
                "inherits_compensation": command.inherits_compensation,
                "retry": codec.dump(command.retry) if command.retry else None,
                "timeout_seconds": command.timeout_seconds,
                "is_foreign": command.foreign,
                "lane": command.lane,
            }
        case RunCompensation():
            row |= {
                "arguments": command.arguments,
                "options": codec.encode(command.options, "the options") if command.options else None,
                "passes": command.passes,
                "retry": codec.dump(command.retry) if command.retry else None,
                "lane": command.lane,
            }
        case RegisterCompensation():
            row["compensation"] = codec.dump(command.compensation)
        case _:
            pass
    return row | _standing_of(passes, new, now)


def _standing_of(passes: Passes, new: NewRecord, now: datetime) -> dict[str, Any]:
    command = new.command
    if new.outcome is not None:
        return {
            "state": State.SETTLED,
            "outcome": new.outcome,
            "result": new.result,
            "failure": codec.dump(new.failure) if new.failure else None,
            "settled_order": new.event.order if new.event else None,
            "settled_at": new.event.at if new.event else now,
        }
    match command:
        case StartTimer():
            return {"state": State.SCHEDULED, "due_at": _fires_at(command, now)}
        case ScheduleStep() | RunCompensation():
            if command.held:
                return {"state": State.HELD}
            if isinstance(command, RunCompensation):
                return passes.first_dispatch(None, command.options)
            return passes.first_dispatch(command.timeout_seconds, command.options, is_foreign=command.foreign)
        case _:
            raise AssertionError(f"{command.kind} is settled when it is recorded")


def _fires_at(timer: StartTimer, now: datetime) -> datetime:
    if timer.at is not None:
        return timer.at
    return now + timedelta(seconds=timer.seconds or 0)
