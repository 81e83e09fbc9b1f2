"""Counting off: a step that was not the last one that its instance waits for is settled, and nothing is read for it.

The counter stays above zero, so no pass follows; the rules are those of the model in ``tests/protocol/counted.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, Update, bindparam, case, exists, false, func, literal_column, select, update
from sqlalchemy import exc as sqlalchemy_exc

from orchestrator.core.records import Kind, State, Wake
from orchestrator.store.compiled import DIVISION_BY_ZERO
from orchestrator.store.engine import Conflict
from orchestrator.store.history import OWN_ROW, HistoryRow, own
from orchestrator.store.instances import INSTANCE_COLUMNS, Instance, find_instance, read_instance
from orchestrator.store.prepared import Prepared, PreparedWrites
from orchestrator.store.tables import history, instance


def may_count_off(row: HistoryRow) -> bool:
    """Tell whether the success of a claimed step, as far as its record says, is nothing but one less to wait for."""
    is_plain = row.kind in (Kind.STEP, Kind.COMPENSATION) and row.seq >= 0 and row.role is None and row.lane is None
    return is_plain and not row.is_timed_out and row.awaited is not None and row.wake is not Wake.ALONE


_now = bindparam("now", type_=instance.c.last_at.type)


def _counting() -> Update:
    # a new one each time: SQLAlchemy remembers of a statement, and of its copies, what it returns
    return (
        update(instance)
        .where(
            instance.c.id == bindparam("own_instance"),
            instance.c.generation == bindparam("own_generation"),
            instance.c.run == bindparam("own_run"),
            instance.c.wait_number == bindparam("was_awaited"),
            instance.c.waiting > literal_column("1"),
        )
        .values(
            waiting=instance.c.waiting - literal_column("1"),
            next_order=instance.c.next_order + literal_column("1"),
            version=instance.c.version + literal_column("1"),
            last_at=case((instance.c.last_at > _now, instance.c.last_at), else_=_now),
        )
    )


_is_held = (
    *OWN_ROW,
    history.c.state == State.RUNNING,
    history.c.attempt == bindparam("was_attempt"),
    history.c.dispatch == bindparam("was_dispatch"),
    history.c.awaited == bindparam("was_awaited"),
    history.c.is_timed_out == false(),
)
_count_only = Prepared(_counting())
_count_and_read = Prepared(_counting().returning(*INSTANCE_COLUMNS))


def _settling(columns: tuple[str, ...], **values: Any) -> Update:
    return update(history).where(*_is_held).values({**{name: bindparam(f"new_{name}") for name in columns}, **values})


_settle = PreparedWrites(
    lambda columns: _settling(columns, settled_order=bindparam("order"), settled_at=bindparam("at"))
)


def _at_once(columns: tuple[str, ...]) -> Select[Any]:
    """Return the statement that does both, or neither: nothing but an error takes back what a statement has written."""
    counted = _counting().returning(*INSTANCE_COLUMNS).cte("counted")
    order = select(counted.c.next_order - literal_column("1")).scalar_subquery()
    at = select(counted.c.last_at).scalar_subquery()
    settling = _settling(columns, settled_order=order, settled_at=at).where(exists(select(counted.c.id)))
    settled = settling.returning(history.c.seq).cte("settled")
    is_settled = literal_column("1").op("/")(select(func.count()).select_from(settled).scalar_subquery())
    return select(*(counted.c[column.name] for column in INSTANCE_COLUMNS), is_settled)


_settle_at_once = PreparedWrites(_at_once)


def count_off(
    connection: Connection, row: HistoryRow, values: Mapping[str, Any], now: datetime, *, is_alone: bool
) -> Instance:
    """Write ``values`` to a claimed record, give it the next place in its inbox, and take one off what is waited for.

    Returns the instance as it has become.  Raises ``Conflict`` where the attempt holds its claim no longer, or the
    instance waits for something else, or for this alone: then roll back.  ``is_alone``: the connection is one of
    ``may_run_alone`` that is in no transaction.
    """
    columns = tuple(sorted(values))
    given = {
        **own(row.key),
        "was_attempt": row.attempt,
        "was_dispatch": row.dispatch,
        "was_awaited": row.awaited,
        "now": now,
        **{f"new_{name}": value for name, value in values.items()},
    }
    if is_alone:
        try:
            found = _settle_at_once.of(columns).first(connection, given)
        except sqlalchemy_exc.DataError as error:
            if getattr(error.orig, "sqlstate", None) == DIVISION_BY_ZERO:
                raise Conflict from error
            raise
        if found is None:
            raise Conflict
        return read_instance(found[: len(INSTANCE_COLUMNS)])
    became = _count_one(connection, given)
    placed = {**given, "order": became.next_order - 1, "at": became.last_at}
    if _settle.of(columns).run(connection, placed) != 1:
        raise Conflict
    return became


def _count_one(connection: Connection, given: Mapping[str, Any]) -> Instance:
    if connection.dialect.update_returning:
        found = _count_and_read.first(connection, given)
        became = None if found is None else read_instance(found)
    else:
        is_counted = _count_only.run(connection, given) == 1
        became = find_instance(connection, given["own_instance"]) if is_counted else None
    if became is None:
        raise Conflict
    return became
