"""What a page about one instance needs besides its records: read narrowly, and never more than a page can show.

Payloads are not read: of a compensation, whose plan holds arguments, only the name goes on from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, or_, select

from orchestrator import codec
from orchestrator.core.records import Compensation, Kind, Outcome, State
from orchestrator.store.instances import Status
from orchestrator.store.mailbox import MailKind
from orchestrator.store.tables import history, instance, message, run

_UNDOES = (Kind.COMPENSATION, Kind.UNDO)


@dataclass(frozen=True, slots=True)
class Brief:
    """A record without its payloads; ``compensation`` names what undoes it."""

    seq: int
    kind: Kind
    name: str
    undoes: int | None
    state: State
    outcome: Outcome | None
    attempts: int
    lost: int
    is_timed_out: bool
    resolution: str | None
    scheduled_at: datetime
    started_at: datetime | None
    settled_at: datetime | None
    publish_at: datetime | None
    due_at: datetime | None
    child_id: str | None
    compensation: str | None = None
    is_always_undone: bool = False

    @property
    def is_blocked(self) -> bool:
        """Whether an operator has to decide on it."""
        return self.state is State.BLOCKED or (self.state is State.RUNNING and self.is_timed_out)


@dataclass(frozen=True, slots=True)
class Relative:
    """Another instance that an instance has to do with."""

    id: str
    workflow: str
    status: Status


@dataclass(frozen=True, slots=True)
class EndedRun:
    """A run that has ended in ``recur``."""

    run: int
    started_at: datetime
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that was sent to an instance, without what it says."""

    channel: str
    sent_at: datetime
    run: int | None
    received_seq: int | None
    taken_at: datetime | None


_BRIEF = (
    history.c.seq,
    history.c.kind,
    history.c.name,
    history.c.undoes,
    history.c.state,
    history.c.outcome,
    history.c.attempt,
    history.c.lost,
    history.c.is_timed_out,
    history.c.resolution,
    history.c.scheduled_at,
    history.c.started_at,
    history.c.settled_at,
    history.c.publish_at,
    history.c.due_at,
    history.c.child_id,
)


def list_undoing(connection: Connection, instance_id: str, number: int, limit: int) -> list[Brief]:
    """Return the newest records of a run that undo others, or that something would undo, last one first."""
    wanted = or_(history.c.compensation.is_not(None), history.c.kind.in_(_UNDOES))
    return _list_briefs(connection, instance_id, number, (wanted,), history.c.seq.desc(), limit)


def list_undone(connection: Connection, instance_id: str, number: int, seqs: Sequence[int]) -> list[Brief]:
    """Return the records of a run that have these numbers."""
    return _list_briefs(connection, instance_id, number, (history.c.seq.in_(seqs),), history.c.seq, len(seqs))


def list_open(connection: Connection, instance_id: str, number: int, limit: int) -> list[Brief]:
    """Return the first records of a run that have not been settled; those that an operator decides on come first."""
    open_ones = (history.c.state != State.SETTLED,)
    blocked = history.c.state == State.BLOCKED
    return _list_briefs(connection, instance_id, number, open_ones, (blocked.desc(), history.c.seq), limit)


def _list_briefs(
    connection: Connection, instance_id: str, number: int, conditions: tuple[Any, ...], order: Any, limit: int
) -> list[Brief]:
    own = (history.c.instance_id == instance_id, history.c.run == number)
    order = order if isinstance(order, tuple) else (order,)
    statement = select(*_BRIEF, history.c.compensation).where(*own, *conditions).order_by(*order).limit(limit)
    return [_brief(row) for row in connection.execute(statement)]


def _brief(row: Any) -> Brief:
    *own, text = row
    plan = codec.load(Compensation, text) if text else None
    brief = Brief(*own)
    return replace(
        brief,
        kind=Kind(brief.kind),
        state=State(brief.state),
        outcome=Outcome(brief.outcome) if brief.outcome else None,
        compensation=None if plan is None else plan.name,
        is_always_undone=plan is not None and plan.always,
    )


def list_children(connection: Connection, instance_id: str, limit: int) -> list[Relative]:
    return _list_relatives(connection, instance.c.parent_id == instance_id, limit)


def list_forks(connection: Connection, instance_id: str, limit: int) -> list[Relative]:
    return _list_relatives(connection, instance.c.forked_from == instance_id, limit)


def _list_relatives(connection: Connection, condition: ColumnElement[bool], limit: int) -> list[Relative]:
    columns = (instance.c.id, instance.c.workflow, instance.c.status)
    statement = select(*columns).where(condition).order_by(instance.c.created_at).limit(limit)
    return [Relative(row[0], row[1], Status(row[2])) for row in connection.execute(statement)]


def list_latest_runs(connection: Connection, instance_id: str, limit: int) -> list[EndedRun]:
    """Return the last runs that have ended in ``recur``, the newest first."""
    columns = (run.c.run, run.c.started_at, run.c.ended_at)
    statement = select(*columns).where(run.c.instance_id == instance_id).order_by(run.c.run.desc()).limit(limit)
    return [EndedRun(*row) for row in connection.execute(statement)]


def list_letters(connection: Connection, instance_id: str, limit: int) -> list[Letter]:
    """Return the last messages that were sent to an instance, the newest first."""
    columns = (message.c.channel, message.c.sent_at, message.c.run, message.c.received_seq, message.c.taken_at)
    own = (message.c.instance_id == instance_id, message.c.kind == MailKind.MESSAGE)
    statement = select(*columns).where(*own).order_by(message.c.id.desc()).limit(limit)
    return [Letter(*row) for row in connection.execute(statement)]
