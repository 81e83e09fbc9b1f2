"""What receivers of signals are still to be told: written with the change it tells of, deleted once it was told."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select, update

from orchestrator.core.records import Payload
from orchestrator.store.tables import notice


@dataclass(frozen=True, slots=True)
class OwedNotice:
    """A notice that is to be told; ids are in the order of their making, as far as the clocks tell."""

    id: str
    instance_id: str
    signal: str
    payload: Payload
    attempts: int
    due_at: datetime


def insert_notices(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(notice), [{"attempts": 0, **row} for row in rows])


def list_due_notices(
    connection: Connection, signals: Collection[str], now: datetime, limit: int, after: OwedNotice | None = None
) -> list[OwedNotice]:
    """Return what is due of some signals, those that have been due longest first, from ``after`` on."""
    columns = [notice.c[name] for name in OwedNotice.__slots__]
    statement = select(*columns).where(notice.c.due_at <= now, notice.c.signal.in_(list(signals)))
    if after is not None:
        is_later = or_(notice.c.due_at > after.due_at, notice.c.id > after.id)
        statement = statement.where(notice.c.due_at >= after.due_at, is_later)
    statement = statement.order_by(notice.c.due_at, notice.c.id).limit(limit)
    return [OwedNotice(*row) for row in connection.execute(statement)]


def take_notice(connection: Connection, seen: OwedNotice, until: datetime) -> bool:
    """Take the telling of a notice on until an instant; ``False`` if another process did, or it was told."""
    own = (notice.c.id == seen.id, notice.c.due_at == seen.due_at, notice.c.attempts == seen.attempts)
    statement = update(notice).where(*own).values(due_at=until, attempts=seen.attempts + 1)
    return connection.execute(statement).rowcount == 1


def delete_notices(connection: Connection, ids: Sequence[str]) -> None:
    if ids:
        connection.execute(delete(notice).where(notice.c.id.in_(list(ids))))


def list_old_notices(connection: Connection, before: datetime, limit: int) -> list[str]:
    """Return ids of what was written before an instant."""
    statement = select(notice.c.id).where(notice.c.created_at < before).limit(limit)
    return list(connection.execute(statement).scalars())
