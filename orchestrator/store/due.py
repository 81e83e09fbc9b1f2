"""What the clock drives: publications, timeouts, and claims whose holder is gone.  ``timers.py`` has the timers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, func, literal_column, select, update

from orchestrator.core.records import Kind, State
from orchestrator.store.claiming import Claimant
from orchestrator.store.history import OWN_ROW, HistoryRow, StepKey, list_rows, own, own_row, read_options
from orchestrator.store.tables import finish, history, instance, message, outbox, worker

_OPEN = (State.RUNNING, State.TIMED_OUT)


_DUE = (
    history.c.instance_id,
    history.c.generation,
    history.c.run,
    history.c.seq,
    history.c.kind,
    history.c.name,
    history.c.options,
    history.c.state,
    history.c.publications,
    history.c.dispatched_at,
    history.c.publish_at,
    history.c.expires_at,
    history.c.timeout_at,
    history.c.due_at,
)


@dataclass(frozen=True, slots=True)
class DueRecord:
    """A record at which the clock has something to do."""

    key: StepKey
    kind: Kind
    name: str
    options: str | None
    state: State
    publications: int
    dispatched_at: datetime | None
    publish_at: datetime | None
    expires_at: datetime | None
    timeout_at: datetime | None
    due_at: datetime

    @property
    def message_options(self) -> dict[str, Any]:
        return read_options(self.options)


def list_due_records(connection: Connection, now: datetime, limit: int, *which: ColumnElement[bool]) -> list[DueRecord]:
    """Return what is due one by one: all but timers."""
    due = (history.c.due_at <= now, history.c.kind != Kind.TIMER, *which)
    statement = select(*_DUE).where(*due).order_by(history.c.due_at).limit(limit)
    return [
        DueRecord(StepKey(*r[:4]), Kind(r[4]), r[5], r[6], State(r[7]), r[8], r[9], r[10], r[11], r[12], r[13])
        for r in connection.execute(statement)
    ]


def list_published_once(connection: Connection, due_before: datetime, limit: int) -> list[HistoryRow]:
    """Return scheduled records whose only publication so far is due to be repeated before ``due_before``."""
    return list_rows(
        connection,
        (
            history.c.due_at <= due_before,
            history.c.state == State.SCHEDULED,
            history.c.publications == 1,
            history.c.publish_at.is_not(None),
            history.c.is_foreign.is_(False),
        ),
        limit,
    )


def postpone_publication(
    connection: Connection, row: HistoryRow, publish_at: datetime, due_at: datetime, dispatched_at: datetime
) -> bool:
    """Take the publication of a scheduled record on; ``False`` if another poller did, or it was claimed."""
    if row.is_foreign:
        # nobody claims it, so it is published once; a record that stayed due would keep others from their turn
        # its expiry goes with the message
        values: dict[str, Any] = {"publish_at": None, "expires_at": None, "due_at": row.timeout_at}
    else:
        values = {"publish_at": publish_at, "due_at": due_at}
    values |= {"publications": row.publications + 1, "dispatched_at": dispatched_at}
    return _change_publication(connection, row, row.publications, values)


_put_off = (
    update(history)
    .where(
        *OWN_ROW,
        history.c.state == State.SCHEDULED,
        history.c.publications == bindparam("was_publications"),
        history.c.due_at == bindparam("was_due_at"),
    )
    .values(publish_at=bindparam("new_publish_at"), due_at=bindparam("new_due_at"))
)


def put_off_publications(connection: Connection, records: Sequence[tuple[DueRecord, datetime]]) -> None:
    """Let each record be published at its instant and not now; those that have changed meanwhile stay as they are."""
    given = [
        {
            **own(record.key),
            "was_publications": record.publications,
            "was_due_at": record.due_at,
            "new_publish_at": publish_at,
            "new_due_at": min(at for at in (publish_at, record.timeout_at, record.expires_at) if at is not None),
        }
        for record, publish_at in records
    ]
    connection.execute(_put_off, given)


def take_back_publication(
    connection: Connection, row: HistoryRow, publish_at: datetime, due_at: datetime | None
) -> None:
    """Undo ``postpone_publication`` of ``row``: its message could not be sent."""
    values = {"publications": row.publications, "publish_at": publish_at, "due_at": due_at}
    _change_publication(connection, row, row.publications + 1, values)


def _change_publication(connection: Connection, row: HistoryRow, publications: int, values: dict[str, Any]) -> bool:
    """Change a record that is still to be claimed and was published so often; tell whether it was."""
    statement = update(history).where(
        *own_row(row.key),
        history.c.state == State.SCHEDULED,
        history.c.dispatch == row.dispatch,
        history.c.publications == publications,
    )
    return connection.execute(statement.values(**values)).rowcount == 1


def find_next_due(connection: Connection) -> datetime | None:
    """Return the next instant at which there is something to do."""
    moments = [
        connection.execute(select(func.min(column))).scalar()
        for column in (
            history.c.due_at,
            instance.c.pass_due_at,
            instance.c.deadline_at,
            message.c.due_at,
            finish.c.due_at,
            outbox.c.due_at,
        )
    ]
    return min((moment for moment in moments if moment is not None), default=None)


# --- claims -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldClaim:
    """A claim as it stands in the store."""

    key: StepKey
    attempt: int
    dispatch: int
    claimant: Claimant


def list_claims(connection: Connection, incarnation: str) -> list[HeldClaim]:
    """Return what is claimed under an incarnation."""
    return _claims(connection, history.c.claim_incarnation == incarnation, None)


def list_orphaned_claims(connection: Connection, limit: int) -> list[HeldClaim]:
    """Return claims whose incarnation was given up, or is not known at all."""
    alive = select(worker.c.incarnation).where(worker.c.dead_at.is_(None))
    # a range that an index is entered by: "is not null" is none for SQLite, which would look at every record; and no
    # parameter: PostgreSQL's plan for any parameter takes such a range for a third of all records
    orphaned = (history.c.claim_incarnation > literal_column("''")) & history.c.claim_incarnation.not_in(alive)
    return _claims(connection, orphaned, limit)


def _claims(connection: Connection, condition: object, limit: int | None) -> list[HeldClaim]:
    statement = select(
        history.c.instance_id,
        history.c.generation,
        history.c.run,
        history.c.seq,
        history.c.attempt,
        history.c.dispatch,
        history.c.claim_incarnation,
        history.c.claim_process,
    ).where(condition, history.c.state.in_(_OPEN))  # type: ignore[arg-type]
    if limit is not None:
        statement = statement.limit(limit)
    return [
        HeldClaim(StepKey(r[0], r[1], r[2], r[3]), r[4], r[5], Claimant(r[6], r[7]))
        for r in connection.execute(statement)
    ]
