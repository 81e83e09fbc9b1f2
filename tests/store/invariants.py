"""What holds of every database, whatever a test has done to it."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, or_, select

from orchestrator.core.records import Kind, State
from orchestrator.store import history, instances
from orchestrator.store.engine import Store
from orchestrator.store.instances import Instance, Status
from orchestrator.store.tables import history as history_table
from orchestrator.store.tables import instance as instance_table
from orchestrator.store.tables import message, subscription


def check(store: Store) -> None:
    """Check every instance of a database."""
    with store.read("check") as connection:
        for (instance_id,) in connection.execute(select(instance_table.c.id)).all():
            found = instances.find_instance(connection, instance_id)
            assert found is not None
            _check_blocked(connection, found)
            _check_orders(connection, found)
            _check_liveness(found)
            if found.status.is_final:
                _check_ended(connection, found)


def _check_blocked(connection: Connection, found: Instance) -> None:
    blocked = [] if found.status.is_final else history.list_blocked(connection, found)
    assert found.blocked_steps == len(blocked), f"{found.id} counts {found.blocked_steps} blocked steps of {blocked}"
    if found.status is Status.BLOCKED:
        assert found.blocked, f"{found.id} does not say what it is blocked for"
        assert all(f"step {row.seq} " in found.blocked for row in blocked) or found.refused


def _check_orders(connection: Connection, found: Instance) -> None:
    """No two events of a run have the same number, and the next one is free."""
    own = (history_table.c.instance_id == found.id, history_table.c.run == found.run)
    columns = (history_table.c.kind, history_table.c.settled_order, history_table.c.late_order)
    rows = connection.execute(select(*columns).where(*own)).all()
    orders = [row[1] for row in rows if row[0] != Kind.RECEIVE] + [row[2] for row in rows]
    taken = select(message.c.taken_order).where(message.c.instance_id == found.id, message.c.run == found.run)
    orders += [row[0] for row in connection.execute(taken)]
    orders += [found.cancel_order, found.deadline_order, found.undo_order]
    counted = Counter(order for order in orders if order is not None)
    assert all(count == 1 for count in counted.values()), f"{found.id} has numbered two events alike: {counted}"
    assert max(counted, default=0) < found.next_order


def _check_liveness(found: Instance) -> None:
    """What has not ended waits for something, owes a pass, or is blocked."""
    if found.status in (Status.PENDING, Status.RUNNING, Status.COMPENSATING):
        assert found.waiting > 0 or found.pass_due_at is not None, f"{found.id} will never go on"


def _check_ended(connection: Connection, found: Instance) -> None:
    assert (found.waiting, found.pass_due_at, found.deadline_at) == (0, None, None), found.id
    assert found.ended_at is not None
    own = (history_table.c.instance_id == found.id, history_table.c.seq >= 0)
    waits = history_table.c.kind.in_((Kind.TIMER, Kind.RECEIVE)) & (history_table.c.state != State.SETTLED)
    unbegun = history_table.c.state.in_((State.HELD, State.BLOCKED))
    left = connection.execute(select(history_table.c.seq).where(*own, or_(waits, unbegun))).all()
    assert left == [], f"{found.id} has ended, and still has {left}"
    subscribed = select(subscription.c.channel).where(subscription.c.instance_id == found.id)
    assert connection.execute(subscribed).all() == []
