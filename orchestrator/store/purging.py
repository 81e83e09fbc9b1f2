"""Purging: deleting instances that have ended, with all that belongs to them, and leaving their ids behind.

They are found unlocked, then locked, and looked at again by a later statement: until the lock is held an operator may
turn to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, bindparam, delete, exc, exists, func, insert, or_, select

from orchestrator.core.records import State
from orchestrator.store.instances import Status
from orchestrator.store.prepared import Prepared
from orchestrator.store.tables import attribute, finish, history, instance, message, purged, run, subscription

#: What belongs to an instance, by its ``instance_id``.
_BELONGINGS = (history, attribute, message, subscription, finish, run)

#: Since when ``SKIP LOCKED`` is understood; older servers wait for the lock.
_MARIADB_SKIPS, _MYSQL_SKIPS = (10, 6), (8, 0, 1)

_parent = instance.alias("parent")
_own = history.c.instance_id == instance.c.id
_of_parent = (_parent.c.id == instance.c.parent_id, _parent.c.generation == instance.c.parent_generation)


@dataclass(frozen=True, slots=True)
class Criteria:
    """Which of the ended instances may go."""

    ended_before: datetime
    statuses: tuple[Status, ...]
    #: Whether those stay of which something is left that could not be undone.
    keeps_not_undone: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """An instance that has ended; a place in their order."""

    ended_at: datetime
    instance_id: str


def list_ended(connection: Connection, criteria: Criteria, after: Ended | None, limit: int) -> list[Ended]:
    """Return the next instances that are old enough, the oldest first; whether they may go yet is another question."""
    ended_at, own_id = instance.c.ended_at, instance.c.id
    statement = select(ended_at, own_id).where(*_meets(criteria)).order_by(ended_at, own_id).limit(limit)
    if after is not None:
        is_later = or_(ended_at > after.ended_at, own_id > after.instance_id)
        statement = statement.where(ended_at >= after.ended_at, is_later)
    return [Ended(*row) for row in connection.execute(statement)]


def list_purgeable(connection: Connection, criteria: Criteria, instance_ids: Sequence[str]) -> dict[str, int]:
    """Return those of ``instance_ids`` that nobody has to do with any more, and how many records each has."""
    size = select(func.count()).where(_own).scalar_subquery()
    statement = select(instance.c.id, size).where(
        instance.c.id.in_(instance_ids),
        *_is_done_with(criteria),
        # the parent may still have to undo it; and the parent waits for its own
        ~exists().where(*_of_parent),
    )
    return {row[0]: row[1] for row in connection.execute(statement)}


def list_done_with(
    connection: Connection, criteria: Criteria, instance_ids: Sequence[str]
) -> list[tuple[str, str | None]]:
    """Return those of ``instance_ids`` that may go as soon as their parent has gone, and which that is."""
    statement = select(instance.c.id, select(_parent.c.id).where(*_of_parent).scalar_subquery())
    statement = statement.where(instance.c.id.in_(instance_ids), *_is_done_with(criteria))
    return [(row[0], row[1]) for row in connection.execute(statement)]


def purge_instances(connection: Connection, criteria: Criteria, instance_ids: Sequence[str], now: datetime) -> int:
    """Delete those of ``instance_ids`` that may go, unless somebody has locked them; return how many."""
    # the conditions are read by a later statement: this one's may be older than the lock
    locked = _lock(connection, instance_ids)
    going = sorted(list_purgeable(connection, criteria, locked)) if locked else []
    if not going:
        return 0
    for table in _BELONGINGS:
        connection.execute(delete(table).where(table.c.instance_id.in_(going)))
    connection.execute(delete(instance).where(instance.c.id.in_(going)))
    _leave_ids(connection, going, now)
    return len(going)


def _leave_ids(connection: Connection, instance_ids: Sequence[str], now: datetime) -> None:
    rows = [{"instance_id": each, "purged_at": now} for each in instance_ids]
    try:
        with connection.begin_nested():
            connection.execute(insert(purged), rows)
    except exc.IntegrityError:  # one of them had been purged before, and was used again by other means than a start
        connection.execute(delete(purged).where(purged.c.instance_id.in_(instance_ids)))
        connection.execute(insert(purged), rows)


_find_purged = Prepared(select(purged.c.instance_id).where(purged.c.instance_id == bindparam("own_id")))


def is_purged(connection: Connection, instance_id: str) -> bool:
    """Tell whether an instance of that id was purged, and none was started since."""
    return _find_purged.first(connection, {"own_id": instance_id}) is not None


_forget_purged = Prepared(delete(purged).where(purged.c.instance_id == bindparam("own_id")))


def forget_purged(connection: Connection, instance_id: str) -> None:
    """Let an id be used again."""
    _forget_purged.run(connection, {"own_id": instance_id})


def _is_done_with(criteria: Criteria) -> tuple[ColumnElement[bool], ...]:
    is_open = or_(history.c.claim_incarnation.is_not(None), history.c.due_at.is_not(None))
    return (
        *_meets(criteria),
        # its callbacks have not been told yet
        ~exists().where(finish.c.instance_id == instance.c.id),
        # what an operator asked for, or an attempt that is still alive
        ~exists().where(_own, history.c.state != State.SETTLED, is_open),
    )


def _meets(criteria: Criteria) -> tuple[ColumnElement[bool], ...]:
    conditions = (instance.c.ended_at < criteria.ended_before, instance.c.status.in_(criteria.statuses))
    return (*conditions, instance.c.not_undone.is_(None)) if criteria.keeps_not_undone else conditions


def _lock(connection: Connection, instance_ids: Sequence[str]) -> list[str]:
    statement = select(instance.c.id).where(instance.c.id.in_(instance_ids)).order_by(instance.c.id)
    statement = statement.with_for_update(skip_locked=_can_skip_locked(connection))
    return [row[0] for row in connection.execute(statement)]


def _can_skip_locked(connection: Connection) -> bool:
    dialect = connection.dialect
    if dialect.name not in ("mysql", "mariadb"):
        return True
    version = dialect.server_version_info or ()
    return bool(version >= (_MARIADB_SKIPS if getattr(dialect, "is_mariadb", False) else _MYSQL_SKIPS))
