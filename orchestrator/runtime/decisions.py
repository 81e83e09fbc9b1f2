"""From a decision to what is written."""

from __future__ import annotations

import dataclasses
from collections import Counter
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
    NotUndone,
    Outcome,
    Receipt,
    Recurred,
    State,
    Undone,
    Waiting,
    Withdrawal,
)
from orchestrator.runtime import blocking, requests, settling
from orchestrator.runtime.change import Change
from orchestrator.runtime.recording import insert_records, mail_to_cancel
from orchestrator.runtime.settling import dump_not_undone, explain, list_not_undone
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status
from orchestrator.store.mailbox import Mail, TakenMail

if TYPE_CHECKING:
    from orchestrator.runtime.passes import Passes


def apply_decision(
    passes: Passes,
    connection: Connection,
    instance: Instance,
    rows: dict[int, HistoryRow],
    mail: list[Mail],
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
    _record(passes, instance, rows, decision, change)
    not_undone = _merge_not_undone(instance, rows, decision.not_undone)
    change.instance["not_undone"] = dump_not_undone(not_undone)
    match decision.ending:
        case Waiting():
            _wait(passes, change, instance, rows, decision.ending)
        case Completed():
            _end(passes, change, instance, rows, Status.COMPLETED, result=decision.ending.result)
        case Failed():
            status = _failed_status(decision.ending, not_undone)
            _end(passes, change, instance, rows, status, failure=codec.dump(decision.ending.failure))
        case Undone():
            _end_undone(passes, change, instance, rows, decision.ending, not_undone)
        case Recurred():
            _recur(passes, change, instance, rows, mail, decision.ending)
        case _:
            assert_never(decision.ending)


def _record(
    passes: Passes, instance: Instance, rows: dict[int, HistoryRow], decision: Decision, change: Change
) -> None:
    """Add the records that a pass asked for, and what it made of those that there were."""
    events = [
        *(withdrawal.event for withdrawal in decision.withdrawals if withdrawal.event is not None),
        *(new.event for new in decision.records if new.event is not None),
    ]
    for withdrawal in decision.withdrawals:
        _withdraw(change, rows[withdrawal.seq], withdrawal)
    for receipt in decision.receipts:
        _receive(change, rows[receipt.seq], receipt)
    insert_records(passes, instance, decision.records, change)
    change.mail += [mail_to_cancel(rows[seq]) for seq in decision.cancels if seq in rows]
    change.attributes = decision.attributes
    change.instance.update(
        next_seq=instance.next_seq + len(decision.records),
        next_order=max([instance.next_order, *(event.order + 1 for event in events)]),
        pass_due_at=None,
        pass_attempts=0,
        pass_publications=0,
        refused=None,
        blocked=None,
    )
    change.instance["passed_order"] = change.instance["next_order"] - 1
    if instance.started_at is None:
        _begin(passes, instance, change)
    if decision.progress is not None:
        change.instance["progress"] = decision.progress


def _begin(passes: Passes, instance: Instance, change: Change) -> None:
    """Note at the first pass what the workflow was declared with: whoever started it may not know its code."""
    options = passes.workflows.options(instance.workflow)
    # a fork's run began before the fork was made, that of an instance with an eta begins after it was
    began_at = max(instance.created_at, instance.run_started_at or instance.created_at)
    deadline_at = began_at + options.deadline if options.deadline is not None else None
    change.instance.update(started_at=began_at, parks=options.parks, deadline_at=deadline_at)


def _failed_status(ending: Failed, not_undone: list[NotUndone]) -> Status:
    if not_undone:  # what an operator has dealt with is not among them, though the workflow was told that it failed
        return Status.COMPENSATION_FAILED
    if ending.is_cancelled:
        return Status.CANCELLED
    return Status.COMPENSATED if ending.undone else Status.FAILED


def _merge_not_undone(
    instance: Instance, rows: dict[int, HistoryRow], decided: tuple[NotUndone, ...]
) -> list[NotUndone]:
    """Return what is not undone: every replay tells of each failed compensation, late effects are known besides."""
    told = {(instance.run, entry.seq) for entry in decided}
    late = [entry for entry in list_not_undone(instance) if (entry.run, entry.seq) not in told]
    open_ones = [entry for entry in decided if entry.seq not in rows or rows[entry.seq].resolution is None]
    return late + [dataclasses.replace(entry, run=instance.run) for entry in open_ones]


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


def _receive(change: Change, row: HistoryRow, receipt: Receipt) -> None:
    message = receipt.message
    change.receipts.append((message.order, row.seq))
    values = {"state": State.SETTLED, "outcome": Outcome.SUCCEEDED, "result": message.payload, "awaited": None}
    change.change_row(row, {**values, "settled_order": message.order, "settled_at": message.at})


def _wait(passes: Passes, change: Change, instance: Instance, rows: dict[int, HistoryRow], waiting: Waiting) -> None:
    number = instance.wait_number + 1
    change.instance.update(
        status=Status.COMPENSATING if waiting.is_compensating else Status.RUNNING,
        waiting=waiting.count,
        wait_number=number,
    )
    fresh = {row["seq"]: row for row in change.new_rows}
    for seq in waiting.wakes:
        kind, name = (fresh[seq]["kind"], fresh[seq]["name"]) if seq in fresh else (rows[seq].kind, rows[seq].name)
        if kind is Kind.RECEIVE:  # what others compete for may be there already
            change.outbox.shared.append(name)
    change.wakes = {seq: wake for seq, wake in waiting.wakes.items() if seq not in fresh}
    for seq, wake in waiting.wakes.items():
        if seq in fresh:
            fresh[seq].update(awaited=number, wake=wake)
    for seq in waiting.draining:
        if not rows[seq].is_draining:
            change.change_row(rows[seq], {"is_draining": True})
    _fill_lanes(passes, change, rows, waiting)
    blocked = [row for row in (_as_changed(row, change) for row in rows.values()) if row.is_blocked]
    change.instance["blocked_steps"] = len(blocked)
    if blocked and not waiting.is_compensating:
        change.instance.update(status=Status.BLOCKED, blocked=blocking.explain(blocked))


def _fill_lanes(passes: Passes, change: Change, rows: dict[int, HistoryRow], waiting: Waiting) -> None:
    """Let go what maps have held back and still have places for.

    While a pass was owed no item took the place of one that ended: it might have been the pass that stops the map.
    """
    now = [_as_changed(row, change) for row in rows.values() if row.lane is not None]
    held = [row for row in now if row.state is State.HELD and row.seq not in waiting.draining]
    under_way = Counter(row.lane for row in now if row.state in (State.SCHEDULED, State.RUNNING, State.BLOCKED))
    for row in sorted(held, key=lambda row: row.seq):
        if row.lane_width is not None and under_way[row.lane] < row.lane_width:
            under_way[row.lane] += 1
            passes.let_go(change, rows[row.seq])


def _as_changed(row: HistoryRow, change: Change) -> HistoryRow:
    return row.changed(change.rows[row.seq][1]) if row.seq in change.rows else row


def _end(
    passes: Passes,
    change: Change,
    instance: Instance,
    rows: dict[int, HistoryRow],
    status: Status,
    result: str | None = None,
    failure: str | None = None,
) -> None:
    _stop_waiting(change, rows)
    requests.end(passes, instance, change, status, result=result, failure=failure)


def _end_undone(
    passes: Passes,
    change: Change,
    instance: Instance,
    rows: dict[int, HistoryRow],
    ending: Undone,
    not_undone: list[NotUndone],
) -> None:
    _stop_waiting(change, rows)
    status = Status.COMPENSATION_FAILED if not_undone else Status.COMPENSATED
    requests.end_again(passes, instance, change, status, failure=codec.dump(ending.failure))


def _stop_waiting(change: Change, rows: dict[int, HistoryRow]) -> None:
    """Withdraw the timers and receives that nobody has waited for: a timer would be due for ever."""
    stopped = {"state": State.SETTLED, "outcome": Outcome.WITHDRAWN, "due_at": None}
    for row in rows.values():
        if row.kind in _WAITS and _as_changed(row, change).state is State.SCHEDULED:
            change.change_row(row, stopped)
    for new in change.new_rows:
        if new["kind"] in _WAITS and new["state"] is State.SCHEDULED:
            new.update(stopped)


_WAITS = (Kind.TIMER, Kind.RECEIVE)


def _recur(
    passes: Passes,
    change: Change,
    instance: Instance,
    rows: dict[int, HistoryRow],
    mail: list[Mail],
    ending: Recurred,
) -> None:
    """Begin the next run: what was not received, and a cancellation that was not delivered, are there for it."""
    _stop_waiting(change, rows)
    now = max(passes.clock(), change.instance.get("last_at", instance.last_at))
    received = {order for order, _seq in change.receipts}
    unread = [each for each in mail if each.received_seq is None and each.taken_order not in received]
    change.taken = [TakenMail(each.id, instance.run + 1, order, now) for order, each in enumerate(unread, 1)]
    change.ends_run = True
    change.instance.update(
        run=instance.run + 1,
        input=ending.arguments,
        next_seq=0,
        waiting=0,
        wait_number=instance.wait_number + 1,
        passed_order=None,
        blocked_steps=0,
        is_past_pivot=False,
        mail=len(unread),
        run_started_at=now,
        last_at=now,
        seeds=None,
        status=Status.RUNNING,
    )
    _carry_cancellation(change, instance, ending, len(unread) + 1)
    settling.owe_pass(instance, change, passes.later(passes.settings.publish_grace))


def _carry_cancellation(change: Change, instance: Instance, ending: Recurred, order: int) -> None:
    change.instance.update(cancel_order=None, deadline_order=None, next_order=order)
    requested = [("cancel_order", instance.cancel_order), ("deadline_order", instance.deadline_order)]
    for name, was in sorted(requested, key=lambda each: each[1] or 0):
        if was is not None and was > ending.order:
            change.instance.update({name: order, "next_order": order + 1})
            order += 1
