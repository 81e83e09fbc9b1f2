"""Writing a change of one instance, inside a transaction that holds its lock."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from enum import Enum

from sqlalchemy import Connection

from orchestrator.runtime.change import Change, StartedChild
from orchestrator.store import history, instances, mailbox
from orchestrator.store.engine import Conflict
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Instance, Parent
from orchestrator.store.prepared import Batch

#: So many receivers of one publication are told at once; the poller tells the others.
WOKEN_AT_ONCE = 20


class Locking(Enum):
    """How the instance that is written is locked."""

    FIRST = "before it was read"
    LATE = "by the first write, if it is as it was read; the others follow only then"
    ALONE = "the same, and all writes are one statement, which is a transaction of its own: the change is a plain one"


class ChildExists(Exception):
    """The id of a child is used by another instance."""


def write(
    connection: Connection,
    instance: Instance,
    change: Change,
    now: datetime,
    publish_grace_seconds: float,
    locking: Locking,
) -> None:
    """Write ``change`` to an instance, or raise ``Conflict`` where that or a record is not as it was read."""
    later = now + timedelta(seconds=publish_grace_seconds)
    batch = Batch(connection)
    # first: from here on the instance is locked, if it was not before, and as it was read
    instances.change_instance(batch, instance, change.instance)
    for row, values in change.rows.values():
        # a claim is taken without the instance's lock: whatever is written to a record names its state as read
        history.change_row(batch, row, values)
    if len(change.new_rows) == 1:
        history.insert_row(batch, change.new_rows[0])
    run = {Locking.FIRST: batch.run, Locking.LATE: batch.run_guarded, Locking.ALONE: batch.run_alone}[locking]
    if not run():
        raise Conflict
    if locking is Locking.ALONE:
        return
    if len(change.new_rows) != 1:
        history.insert_rows(connection, change.new_rows)
    for row, values in change.notes:
        history.note_on_row(connection, row, values)
    history.await_rows(connection, instance, change.instance.get("wait_number", instance.wait_number), change.wakes)
    if change.started_child is not None:
        _insert_child(connection, instance, change.started_child, now, later)
    _write_mail(connection, instance, change, now)
    if change.ends_run:
        instances.insert_run(connection, instance, now)
    instances.set_attributes(connection, instance.id, change.attributes)
    if change.ends and change.outbox.ended is not None:
        instances.insert_finish(connection, instance.id, instance.generation, later)
    if change.ends and change.may_have_subscribed:
        mailbox.delete_subscriptions(connection, instance.id)
        change.outbox.shared += mailbox.give_back_shared(connection, instance.id)


def _write_mail(connection: Connection, instance: Instance, change: Change, now: datetime) -> None:
    for order, seq in change.receipts:
        mailbox.mark_received(connection, instance.id, instance.run, order, seq)
    mailbox.mark_taken(connection, change.taken)
    mailbox.let_lie(connection, change.unread)
    for new in change.mail:
        mailbox.insert_mail(connection, new, now)
        change.outbox.wakes.append(new.instance_id)
    for command in change.subscriptions:
        mode = getattr(command, "mode", None)
        if mode is None:
            mailbox.unsubscribe(connection, instance.id, command.name)
        else:
            mailbox.subscribe(connection, instance, command.name, mode, now)
    for each in change.published:
        told = mailbox.publish(connection, each.name, each.payload, each.message_id, now, WOKEN_AT_ONCE)
        change.outbox.wakes += told
        change.outbox.shared.append(each.name)


# --- children -----------------------------------------------------------------------------------------------------


def generation_of_child(row: HistoryRow) -> str:
    """Return the generation of the child that a record starts: the same whoever starts it, however often."""
    name = f"{row.key.idempotency_key}:{row.dispatch}"
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _insert_child(
    connection: Connection, parent: Instance, started: StartedChild, now: datetime, later: datetime
) -> None:
    row = started.row
    assert row.child_id is not None
    generation = generation_of_child(row)
    is_new = instances.insert_instance(
        connection,
        instance_id=row.child_id,
        generation=generation,
        workflow=row.name,
        queue=started.queue,
        arguments=row.arguments or "",
        request=None,
        now=now,
        pass_due_at=later,
        parent=Parent(parent.id, parent.generation, row.run, row.seq, parent.root_id or parent.id),
    )
    if is_new:
        mailbox.hasten_mail(connection, row.child_id, now)
        return
    existing = instances.find_instance(connection, row.child_id)
    if existing is None or existing.generation != generation:
        raise ChildExists


def key_of_parent(child: Instance, seq: int | None) -> StepKey | None:
    """Return the record ``seq`` of an instance's parent, ``None`` where it has none."""
    if child.parent_id is None or child.parent_generation is None or child.parent_run is None or seq is None:
        return None
    return StepKey(child.parent_id, child.parent_generation, child.parent_run, seq)
