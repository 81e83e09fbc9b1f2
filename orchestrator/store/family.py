"""What the clock has to do for some instances, instead of for all that there are."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, func, select

from orchestrator.core.records import Kind, State
from orchestrator.store.due import DueRecord, list_due_records
from orchestrator.store.instances import Instance
from orchestrator.store.tables import history

BATCH = 500


def find_next_record_of(connection: Connection, instance_id: str) -> datetime | None:
    """Return when a record of an instance is due next, ``None`` for never."""
    statement = select(func.min(history.c.due_at)).where(history.c.instance_id == instance_id)
    moment: datetime | None = connection.execute(statement).scalar()
    return moment


def awaits_message(connection: Connection, waiting: Instance) -> bool:
    """Tell whether what an instance waits for now may be a message."""
    statement = select(history.c.seq).where(
        history.c.instance_id == waiting.id,
        history.c.run == waiting.run,
        history.c.kind == Kind.RECEIVE,
        history.c.state == State.SCHEDULED,
        history.c.awaited == waiting.wait_number,
    )
    return connection.execute(statement.limit(1)).first() is not None


def list_due_records_of(connection: Connection, instance_ids: Collection[str], now: datetime) -> list[DueRecord]:
    """Return what is due one by one in these instances: all but timers."""
    return list_due_records(connection, now, BATCH, history.c.instance_id.in_(list(instance_ids)))
