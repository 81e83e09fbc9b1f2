"""Claiming: a step is taken for one attempt, by one statement that needs no lock of its instance."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, exists, update

from orchestrator.core.records import State
from orchestrator.store.history import COLUMNS, OWN_ROW, HistoryRow, StepKey, find_row, own, read_row
from orchestrator.store.prepared import Prepared
from orchestrator.store.tables import history, worker


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who takes a step: a worker's incarnation, and which of its processes."""

    incarnation: str
    process: int


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


def claim(
    connection: Connection,
    key: StepKey,
    name: str,
    dispatch: int,
    claimant: Claimant,
    now: datetime,
    compensation: str | None,
) -> HistoryRow | None:
    """Take a scheduled step for one attempt: the only one until it is settled, given back or given up.

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
    if connection.dialect.update_returning:
        taken = _claim_and_read.first(connection, given)
        return None if taken is None else read_row(taken)
    return find_row(connection, key) if _claim_only.run(connection, given) == 1 else None
