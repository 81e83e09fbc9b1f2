"""Timers that are due, found without a lock and written many at a time.

What is alike is written by one statement: 10,000 instances that sleep until the same instant differ in nothing but
their ids, and 10,000 timers of one instance in nothing but their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Update, bindparam, select, update

from orchestrator.core.records import Kind, Outcome, State
from orchestrator.store.engine import Conflict
from orchestrator.store.history import HistoryRow, list_rows
from orchestrator.store.instances import Instance
from orchestrator.store.tables import history, instance

#: So many rows that are alike are written by a statement of their own, the others one after the other.
FEWEST_ALIKE = 10


@dataclass(frozen=True, slots=True)
class FiredInstance:
    """An instance as it was locked and as its timers leave it.

    A timer without an order is withdrawn: the run that asked for it is over.
    """

    locked: Instance
    left: Instance
    timers: tuple[tuple[HistoryRow, int | None], ...]
    owes_pass: bool


# --- reading ------------------------------------------------------------------------------------------------------


def list_due_instances(connection: Connection, now: datetime, limit: int, passed_over: Collection[str]) -> list[str]:
    """Return whose timers are due, earliest first, once for each of up to ``limit`` timers."""
    statement = select(history.c.instance_id).where(*_due(now)).order_by(history.c.due_at).limit(limit)
    if passed_over:
        statement = statement.where(history.c.instance_id.not_in(passed_over))
    return list(connection.execute(statement).scalars())


def list_due_timers(
    connection: Connection, instance_ids: Collection[str], now: datetime, limit: int
) -> list[HistoryRow]:
    """Return the due timers of instances that are locked, in the order in which they fire."""
    # the columns of the primary key make the order complete: a limit must not take a later one before an earlier one
    order = (history.c.due_at, history.c.instance_id, history.c.run, history.c.seq)
    return list_rows(connection, (*_due(now), history.c.instance_id.in_(instance_ids)), limit, order)


def _due(now: datetime) -> tuple[Any, ...]:
    return (history.c.due_at <= now, history.c.kind == Kind.TIMER, history.c.state == State.SCHEDULED)


# --- writing, under the locks of the instances --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Alike:
    """What timers have in common that one statement writes."""

    own_run: int
    own_attempt: int
    own_dispatch: int
    new_outcome: Outcome
    ahead: int | None  # of its ``seq`` is the order of each
    new_settled_at: datetime | None


def _settling(*which: ColumnElement[bool]) -> Update:
    return (
        update(history)
        .where(
            *which,
            history.c.run == bindparam("own_run"),
            history.c.kind == Kind.TIMER,
            history.c.state == State.SCHEDULED,
            history.c.attempt == bindparam("own_attempt"),
            history.c.dispatch == bindparam("own_dispatch"),
        )
        .values(
            state=State.SETTLED,
            outcome=bindparam("new_outcome"),
            settled_order=history.c.seq + bindparam("ahead"),
            settled_at=bindparam("new_settled_at"),
            awaited=None,
            due_at=None,
        )
    )


_settle_each = _settling(history.c.instance_id == bindparam("own_id"), history.c.seq == bindparam("own_seq"))
_settle_all = _settling(
    history.c.instance_id.in_(bindparam("own_ids", expanding=True)),
    history.c.seq.in_(bindparam("own_seqs", expanding=True)),
)


def settle_timers(connection: Connection, fired: Iterable[FiredInstance]) -> None:
    """Write what timers came to; raise ``Conflict`` if any of them is not as it was read."""
    together: dict[tuple[_Alike, tuple[int, ...]], list[str]] = defaultdict(list)
    for each in fired:
        for alike, numbers in _sort(each).items():
            together[alike, tuple(numbers)].append(each.locked.id)
    others: list[dict[str, Any]] = []
    for (alike, seqs), names in together.items():
        values, count = asdict(alike), len(names) * len(seqs)
        if count < FEWEST_ALIKE:
            others += [{**values, "own_id": name, "own_seq": seq} for name in names for seq in seqs]
        else:
            _execute(connection, _settle_all, {**values, "own_ids": names, "own_seqs": seqs}, count)
    if others:
        _execute(connection, _settle_each, others, len(others))


def _sort(fired: FiredInstance) -> dict[_Alike, list[int]]:
    numbers: dict[_Alike, list[int]] = defaultdict(list)
    for row, order in fired.timers:
        own = (row.run, row.attempt, row.dispatch)
        if order is None:
            alike = _Alike(*own, Outcome.WITHDRAWN, None, None)
        else:
            alike = _Alike(*own, Outcome.SUCCEEDED, order - row.seq, fired.left.last_at)
        numbers[alike].append(row.seq)
    return numbers


def _execute(connection: Connection, statement: Update, parameters: Any, count: int) -> None:
    if connection.execute(statement, parameters).rowcount != count:
        raise Conflict


@dataclass(frozen=True, slots=True)
class _Left:
    """What instances have in common that one statement writes."""

    orders: int
    new_last_at: datetime
    new_waiting: int
    new_pass_due_at: datetime | None
    new_pass_publications: int


def _updating(which: ColumnElement[bool]) -> Update:
    return (
        update(instance)
        .where(which)
        .values(
            next_order=instance.c.next_order + bindparam("orders"),
            version=instance.c.version + 1,
            last_at=bindparam("new_last_at"),
            waiting=bindparam("new_waiting"),
            pass_due_at=bindparam("new_pass_due_at"),
            pass_publications=bindparam("new_pass_publications"),
        )
    )


_update_each = _updating(instance.c.id == bindparam("own_id"))
_update_all = _updating(instance.c.id.in_(bindparam("own_ids", expanding=True)))


def update_instances(connection: Connection, fired: Iterable[FiredInstance]) -> None:
    """Write what their timers leave of locked instances; the version of each tells others that it changed."""
    together: dict[_Left, list[str]] = defaultdict(list)
    for each in fired:
        together[_left_by(each)].append(each.locked.id)
    others: list[dict[str, Any]] = []
    for alike, names in together.items():
        if len(names) < FEWEST_ALIKE:
            others += [{**asdict(alike), "own_id": name} for name in names]
        else:
            _execute(connection, _update_all, {**asdict(alike), "own_ids": names}, len(names))
    if others:
        _execute(connection, _update_each, others, len(others))


def _left_by(fired: FiredInstance) -> _Left:
    left = fired.left
    orders = left.next_order - fired.locked.next_order
    return _Left(orders, left.last_at, left.waiting, left.pass_due_at, left.pass_publications)
