"""Claiming: a step is taken for one attempt, by one statement that needs no lock of its instance."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, exists, select, update

from orchestrator.core.records import State
from orchestrator.store.history import COLUMNS, OWN_ROW, HistoryRow, StepKey, find_row, own, read_row
from orchestrator.store.instances import FIND_UNSHARED, INSTANCE_COLUMNS, Instance, read_instance
from orchestrator.store.prepared import Prepared
from orchestrator.store.tables import history, instance, worker


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who takes a step: a worker's incarnation, and which of its processes."""

    incarnation: str
    process: int


@dataclass(frozen=True, slots=True)
class Held:
    """A step as it was when it was taken, and its instance as it was then, or right after: where anybody looked."""

    row: HistoryRow
    instance: Instance | None = None


_values: dict[str, Any] = {
    "state": State.RUNNING,
    "attempt": history.c.attempt + 1,
    "claim_incarnation": bindparam("claim_incarnation_"),
    "claim_process": bindparam("claim_process_"),
    "started_at": bindparam("now"),
    "publications": 0,
    "publish_at": None,
    "expires_at": None,
    "due_at": history.c.timeout_at,
    # of ``None`` nothing comes either
    "compensation": case(
        (and_(history.c.inherits_compensation, history.c.compensation.is_(None)), bindparam("plan")),
        else_=history.c.compensation,
    ),
}
_claim = (
    update(history)
    .where(
        *OWN_ROW,
        history.c.name == bindparam("own_name"),
        history.c.state == State.SCHEDULED,
        history.c.dispatch == bindparam("own_dispatch"),
        exists().where(worker.c.incarnation == bindparam("claim_incarnation_"), worker.c.dead_at.is_(None)),
    )
    .values(**_values)
)
_claim_only = Prepared(_claim)
_claim_and_read = Prepared(_claim.returning(*COLUMNS))
_claimed = _claim.returning(*COLUMNS).cte("claimed")
_claim_and_look = Prepared(
    select(*(_claimed.c[column.name] for column in COLUMNS), *INSTANCE_COLUMNS).select_from(
        _claimed.outerjoin(instance, and_(instance.c.id == bindparam("own_instance"), instance.c.waiting <= 1))
    )
)


def claim(
    connection: Connection,
    key: StepKey,
    name: str,
    dispatch: int,
    claimant: Claimant,
    now: datetime,
    compensation: str | None,
) -> Held | None:
    """Take a scheduled step for one attempt: the only one until it is settled, given back or given up.

    The instance is read first, or together with the record: what is read after it is not older than its version says.

    Returns ``None`` where the message is not the newest or names another task, the step is not to be had, or the
    incarnation was given up.
    ``compensation`` is the one that only this worker knows; it is recorded unless the step has one, or opted out.
    """
    given = {
        **own(key),
        "own_name": name,
        "own_dispatch": dispatch,
        "claim_incarnation_": claimant.incarnation,
        "claim_process_": claimant.process,
        "now": now,
        "plan": compensation,
    }
    if connection.dialect.name == "postgresql":
        both = _claim_and_look.first(connection, given)
        if both is None:
            return None
        of_row, of_instance = both[: len(COLUMNS)], both[len(COLUMNS) :]
        return Held(read_row(of_row), None if of_instance[0] is None else read_instance(of_instance))
    found = FIND_UNSHARED.first(connection, {"own_id": key.instance_id})
    if connection.dialect.update_returning:
        taken = _claim_and_read.first(connection, given)
        row = None if taken is None else read_row(taken)
    else:
        row = find_row(connection, key) if _claim_only.run(connection, given) == 1 else None
        # between two statements that are a transaction each it may have been given up, and taken by another
        if row is not None and not row.is_held_by(claimant.incarnation, claimant.process, now):
            return None
    return None if row is None else Held(row, None if found is None else read_instance(found))
