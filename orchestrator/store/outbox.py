"""Plain Celery tasks that a caller's transaction enqueued, and that are to be published once it has committed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from orchestrator.core.records import Payload
from orchestrator.store.tables import outbox


@dataclass(frozen=True, slots=True)
class Enqueued:
    """A task that is owed to the broker."""

    id: int
    task_id: str
    attempts: int
    due_at: datetime


def insert_enqueued(
    connection: Connection, task_id: str, signature: Payload, now: datetime, due_at: datetime
) -> Enqueued:
    values = {"task_id": task_id, "signature": signature, "attempts": 0, "created_at": now, "due_at": due_at}
    inserted = connection.execute(insert(outbox).values(**values)).inserted_primary_key
    assert inserted is not None
    return Enqueued(inserted[0], task_id, 0, due_at)


def list_due_enqueued(connection: Connection, now: datetime, limit: int) -> list[Enqueued]:
    # without the signatures: a long list of large ones need not be in memory together
    columns = (outbox.c.id, outbox.c.task_id, outbox.c.attempts, outbox.c.due_at)
    statement = select(*columns).where(outbox.c.due_at <= now).order_by(outbox.c.due_at, outbox.c.id).limit(limit)
    return [Enqueued(*row) for row in connection.execute(statement)]


def take_enqueued(connection: Connection, seen: Enqueued, until: datetime) -> Payload | None:
    """Take the publication of a task on and return its signature; ``None`` if another process did, or it is done."""
    own = (outbox.c.id == seen.id, outbox.c.due_at == seen.due_at, outbox.c.attempts == seen.attempts)
    statement = update(outbox).where(*own).values(due_at=until, attempts=seen.attempts + 1)
    if connection.execute(statement).rowcount != 1:
        return None
    signature: Payload = connection.execute(select(outbox.c.signature).where(outbox.c.id == seen.id)).scalar_one()
    return signature


def take_back_enqueued(connection: Connection, seen: Enqueued, until: datetime, due_at: datetime) -> None:
    """Undo ``take_enqueued`` of ``seen``: the broker was away."""
    statement = update(outbox).where(outbox.c.id == seen.id, outbox.c.due_at == until)
    connection.execute(statement.values(due_at=due_at, attempts=seen.attempts))


def delete_enqueued(connection: Connection, enqueued_id: int) -> None:
    connection.execute(delete(outbox).where(outbox.c.id == enqueued_id))
