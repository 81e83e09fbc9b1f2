"""From commands to rows of the history, and to what they put into the mailboxes of others."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_never

from orchestrator import codec
from orchestrator.core.records import (
    Command,
    Delivery,
    Dispatched,
    NewRecord,
    OpenReceive,
    PublishMessage,
    RegisterCompensation,
    RunCompensation,
    ScheduleStep,
    SendMessage,
    StartChild,
    StartTimer,
    State,
    Subscribe,
    UndoChild,
    Unsubscribe,
)
from orchestrator.runtime.change import Change
from orchestrator.store import history
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance
from orchestrator.store.mailbox import MailKind, NewMail

if TYPE_CHECKING:
    from orchestrator.runtime.passes import Passes


def insert_records(passes: Passes, instance: Instance, records: tuple[NewRecord, ...], change: Change) -> None:
    """Add what a pass asked for first, and what of it goes out to others."""
    widths = Counter(lane for lane in map(_lane_of_free, records) if lane is not None)
    for new in records:
        row = _new_row(passes, instance, new)
        if row.get("lane") is not None:
            row["lane_width"] = widths[row["lane"]]
        change.new_rows.append(row)
        if row["state"] is State.SCHEDULED and row.get("publications", 0) > 0:
            change.outbox.steps.append(HistoryRow(**{**history.FRESH, **row}))
        if new.message_order is not None:
            change.receipts.append((new.message_order, new.seq))
        _go_out(new.command, row, change)


def _lane_of_free(new: NewRecord) -> int | None:
    """Return the lane of a record that is not held back: as many of it may be under way at a time."""
    command = new.command
    return command.lane if isinstance(command, Dispatched) and not command.held else None


def _go_out(command: Command, row: dict[str, Any], change: Change) -> None:
    """Add what a record puts into the mailboxes of others; it commits with the record, so it goes out once."""
    match command:
        case SendMessage():
            if row["result"] == json.dumps(Delivery.DELIVERED):
                change.mail.append(NewMail(command.instance_id, command.name, command.payload, command.message_id))
        case PublishMessage():
            change.published.append(command)
        case Subscribe() | Unsubscribe():
            change.subscriptions.append(command)
        case UndoChild():
            if row["state"] is State.SCHEDULED:
                change.mail.append(mail_to_undo(HistoryRow(**{**history.FRESH, **row})))
        case _:
            pass


def mail_to_cancel(row: HistoryRow) -> NewMail:
    """Return what cancels the child of a record whose scope drains; it is delivered once, however often it is sent."""
    assert row.child_id is not None
    reason = f"step {row.seq} of its parent {row.instance_id} is being undone"
    return NewMail(row.child_id, payload=reason, message_id=f"cancel:{row.run}:{row.seq}", kind=MailKind.CANCEL)


def mail_to_undo(row: HistoryRow) -> NewMail:
    """Return what has the child that ``row`` undoes run its own compensations."""
    assert row.child_id is not None
    told = dataclasses.asdict(row.key)
    message_id = f"undo:{row.run}:{row.seq}:{row.dispatch}"
    return NewMail(row.child_id, payload=json.dumps(told), message_id=message_id, kind=MailKind.UNDO)


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
                "role": command.role,
                "lane": command.lane,
            }
        case StartChild():
            row |= {
                "arguments": command.arguments,
                "options": codec.encode(command.options, "the options") if command.options else None,
                "compensation": codec.dump(command.compensation) if command.compensation else None,
                "timeout_seconds": command.timeout_seconds,
                "child_id": command.child_id,
                "is_detached": command.is_detached,
                "role": command.role,
                "lane": command.lane,
            }
        case UndoChild():
            row |= {"child_id": command.child_id, "lane": command.lane}
        case Subscribe():
            row["options"] = json.dumps({"mode": command.mode})
        case SendMessage() | PublishMessage():
            row["arguments"] = f'{{"args":[{command.payload}],"kwargs":{{}}}}'
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
        order = new.event.order if new.event else new.message_order
        return {
            "state": State.SETTLED,
            "outcome": new.outcome,
            "result": new.result,
            "failure": codec.dump(new.failure) if new.failure else None,
            "settled_order": order,
            "settled_at": new.event.at if new.event else now,
            **({"timeout_at": _fires_at(command, now)} if isinstance(command, StartTimer) else {}),
        }
    match command:
        case StartTimer():
            fires_at = _fires_at(command, now)
            return {"state": State.SCHEDULED, "due_at": fires_at, "timeout_at": fires_at}
        case OpenReceive():
            return {"state": State.SCHEDULED}
        case ScheduleStep() | StartChild() | RunCompensation() | UndoChild():
            return {"state": State.HELD} if command.held else _dispatched(passes, command)
        case _:
            raise AssertionError(f"{command.kind} is settled when it is recorded")


def _dispatched(passes: Passes, command: Dispatched) -> dict[str, Any]:
    match command:
        case ScheduleStep():
            return passes.first_dispatch(command.timeout_seconds, command.options, is_foreign=command.foreign)
        case StartChild():
            return passes.first_dispatch(command.timeout_seconds, command.options)
        case RunCompensation():
            return passes.first_dispatch(None, command.options)
        case UndoChild():
            return {"state": State.SCHEDULED}  # the child tells when it is done
        case _:
            assert_never(command)


def _fires_at(timer: StartTimer, now: datetime) -> datetime:
    if timer.at is not None:
        return timer.at
    return now + timedelta(seconds=timer.seconds or 0)
