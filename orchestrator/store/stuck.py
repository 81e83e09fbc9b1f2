"""What may wait for ever, found by what is open: through indexes, and never by going through all that has ended.

``due_at`` and claims are columns of what is open alone, so their indexes lead to it; what is waited for is found from
the instances that have not ended.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Select, and_, exists, func, or_, select

from orchestrator.core.records import Kind, State
from orchestrator.store.instances import Status
from orchestrator.store.tables import finish, history, instance, notice, outbox

#: Before anything was recorded: ``due_at > LONG_AGO`` is a range, where ``IS NOT NULL`` is none to every database.
LONG_AGO = datetime(1970, 1, 2, tzinfo=UTC)

_CALLED = (Kind.STEP, Kind.COMPENSATION)


@dataclass(frozen=True, slots=True)
class WaitingInstance:
    """An instance as far as it tells why it does not go on; without its payloads."""

    id: str
    workflow: str
    queue: str | None
    status: Status
    parks: bool
    blocked: str | None
    refused: str | None
    blocked_steps: int
    not_undone: str | None
    pass_publications: int
    created_at: datetime
    last_at: datetime


@dataclass(frozen=True, slots=True)
class WaitingRecord:
    """A record that is open, and whose instance it is."""

    instance_id: str
    run: int
    seq: int
    kind: Kind
    name: str
    state: State
    options: str | None
    failures: int
    is_in_doubt: bool
    dispatch: int
    failure: str | None
    scheduled_at: datetime
    started_at: datetime | None
    due_at: datetime | None
    workflow: str
    status: Status


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many wait for the same: records for a task, instances for a pass of their workflow."""

    name: str
    options: str | None  # of records; of instances it is the queue
    count: int
    since: datetime


@dataclass(frozen=True, slots=True)
class Undelivered:
    """A row that has been tried in vain: what an ending owes, an enqueued task, a signal."""

    what: str  # the table
    name: str  # the instance, or the task's id
    attempts: int
    since: datetime | None


_INSTANCE = [instance.c[name] for name in WaitingInstance.__slots__]
_RECORD = [history.c[name] for name in WaitingRecord.__slots__[:-2]] + [instance.c.workflow, instance.c.status]


def _instances(connection: Connection, statement: Select[Any], workflow: str | None) -> list[WaitingInstance]:
    if workflow is not None:
        statement = statement.where(instance.c.workflow == workflow)
    found = []
    for row in connection.execute(statement):
        values = row._asdict()
        found.append(WaitingInstance(**{**values, "status": Status(values["status"])}))
    return found


def _records(connection: Connection, statement: Select[Any], workflow: str | None) -> list[WaitingRecord]:
    if workflow is not None:
        statement = statement.where(instance.c.workflow == workflow)
    found = []
    for row in connection.execute(statement):
        values = row._asdict()
        kinds = {"kind": Kind(values["kind"]), "state": State(values["state"]), "status": Status(values["status"])}
        found.append(WaitingRecord(**{**values, **kinds}))
    return found


def _of_instance() -> Any:
    return and_(history.c.instance_id == instance.c.id, history.c.generation == instance.c.generation)


# --- instances ------------------------------------------------------------------------------------------------------


def list_blocked_instances(connection: Connection, workflow: str | None, limit: int) -> list[WaitingInstance]:
    """Return what is ``BLOCKED``, the oldest first."""
    statement = select(*_INSTANCE).where(instance.c.status == Status.BLOCKED)
    return _instances(connection, statement.order_by(instance.c.created_at, instance.c.id).limit(limit), workflow)


def list_instances_not_undone(connection: Connection, workflow: str | None, limit: int) -> list[WaitingInstance]:
    """Return those of which something could not be undone, whatever they are now."""
    statement = select(*_INSTANCE).where(instance.c.not_undone.is_not(None)).order_by(instance.c.ended_at)
    return _instances(connection, statement.limit(limit), workflow)


def count_owed_passes(connection: Connection, workflow: str | None, now: datetime) -> list[Crowd]:
    """Return for which workflows and queues passes are owed; what is to begin later owes none yet."""
    columns = (instance.c.workflow, instance.c.queue)
    statement = select(*columns, func.count(), func.min(instance.c.last_at)).group_by(*columns)
    statement = statement.where(instance.c.pass_due_at > LONG_AGO, _has_begun(now))
    if workflow is not None:
        statement = statement.where(instance.c.workflow == workflow)
    return [Crowd(*row) for row in connection.execute(statement)]


def list_owing_passes(
    connection: Connection, workflow: str, queue: str | None, most_publications: int, now: datetime, limit: int
) -> list[WaitingInstance]:
    """Return instances of a workflow whose pass was published at least so often, and never made."""
    statement = select(*_INSTANCE).where(
        instance.c.pass_due_at > LONG_AGO,
        _has_begun(now),
        instance.c.pass_publications >= most_publications,
        instance.c.queue.is_(None) if queue is None else instance.c.queue == queue,
    )
    return _instances(connection, statement.order_by(instance.c.pass_due_at).limit(limit), workflow)


def _has_begun(now: datetime) -> Any:
    return or_(instance.c.run_started_at.is_(None), instance.c.run_started_at <= now)


def list_workflows_under_way(connection: Connection) -> list[str]:
    """Return the workflows of what has not ended."""
    unended = [status for status in Status if not status.is_final]
    statement = select(instance.c.workflow).where(instance.c.status.in_(unended)).distinct()
    return sorted(connection.execute(statement).scalars())


# --- records --------------------------------------------------------------------------------------------------------


def list_blocked_records(connection: Connection, instance_ids: Collection[str]) -> list[WaitingRecord]:
    """Return the steps of instances that an operator has to decide on, by instance and ``seq``."""
    is_blocked = or_(history.c.state == State.BLOCKED, and_(history.c.state == State.RUNNING, history.c.is_timed_out))
    own = (_of_instance(), history.c.run == instance.c.run)
    statement = select(*_RECORD).where(*own, instance.c.id.in_(instance_ids), is_blocked)
    return _records(connection, statement.order_by(history.c.instance_id, history.c.seq), None)


def count_scheduled(connection: Connection, workflow: str | None, now: datetime | None) -> list[Crowd]:
    """Return which tasks are to be claimed by somebody, with which options; with ``now`` those that may be by then."""
    columns = (history.c.name, history.c.options)
    statement = select(*columns, func.count(), func.min(history.c.scheduled_at)).group_by(*columns)
    statement = statement.where(*_is_scheduled(now))
    if workflow is not None:
        statement = statement.where(_of_instance(), instance.c.workflow == workflow)
    return [Crowd(*row) for row in connection.execute(statement)]


def list_scheduled(
    connection: Connection, task: str, options: str | None, workflow: str | None, now: datetime, limit: int
) -> list[WaitingRecord]:
    """Return records that wait for a task to be claimed, with these options, and not for their time."""
    same = history.c.options.is_(None) if options is None else history.c.options == options
    statement = select(*_RECORD).where(_of_instance(), *_is_scheduled(now), history.c.name == task, same)
    return _records(connection, statement.order_by(history.c.due_at).limit(limit), workflow)


def _is_scheduled(now: datetime | None) -> Sequence[Any]:
    # what was never published waits for its countdown, or for its next attempt
    is_out = or_(history.c.publications > 0, history.c.publish_at.is_(None), history.c.publish_at <= (now or LONG_AGO))
    # of what a worker without this package does, no worker row tells
    return (
        *(() if now is None else (is_out,)),
        history.c.due_at > LONG_AGO,
        history.c.state == State.SCHEDULED,
        history.c.kind.in_(_CALLED),
        history.c.is_foreign.is_(False),
    )


def list_retried_compensations(
    connection: Connection, most_failures: int, due_after: datetime, workflow: str | None, limit: int
) -> list[WaitingRecord]:
    """Return compensations that failed so often, or whose next attempt is that far away."""
    statement = select(*_RECORD).where(
        _of_instance(),
        history.c.due_at > LONG_AGO,
        history.c.state == State.SCHEDULED,
        history.c.kind == Kind.COMPENSATION,
        history.c.failures > 0,
        or_(history.c.failures >= most_failures, history.c.due_at > due_after),
    )
    return _records(connection, statement.order_by(history.c.scheduled_at).limit(limit), workflow)


def list_long_attempts(
    connection: Connection, started_before: datetime, workflow: str | None, limit: int
) -> list[WaitingRecord]:
    """Return attempts that began before then, and that no timeout will end: there is none, or it has passed."""
    is_endless = and_(
        history.c.state == State.RUNNING, history.c.timeout_seconds.is_(None), history.c.is_timed_out.is_(False)
    )
    statement = select(*_RECORD).where(
        _of_instance(),
        history.c.claim_incarnation > "",
        history.c.started_at < started_before,
        or_(is_endless, history.c.state == State.TIMED_OUT),
    )
    return _records(connection, statement.order_by(history.c.started_at).limit(limit), workflow)


def list_unanswered_receives(
    connection: Connection, asked_before: datetime, workflow: str | None, limit: int
) -> list[WaitingRecord]:
    """Return receives that instances wait for since before then, with nothing beside them that would end the wait."""
    other = history.alias("other")
    beside = (
        other.c.instance_id == instance.c.id,
        other.c.run == instance.c.run,
        other.c.awaited == instance.c.wait_number,
        other.c.kind != Kind.RECEIVE,
        other.c.state != State.SETTLED,
    )
    statement = select(*_RECORD).where(
        instance.c.status.in_((Status.RUNNING, Status.COMPENSATING)),
        instance.c.waiting > 0,
        instance.c.pass_due_at.is_(None),
        instance.c.deadline_at.is_(None),
        _of_instance(),
        history.c.run == instance.c.run,
        history.c.awaited == instance.c.wait_number,
        history.c.kind == Kind.RECEIVE,
        history.c.state == State.SCHEDULED,
        history.c.scheduled_at < asked_before,
        ~exists().where(*beside),
    )
    return _records(connection, statement.order_by(instance.c.created_at).limit(limit), workflow)


def list_planned_compensations(connection: Connection, instances_at_most: int, records_at_most: int) -> list[str]:
    """Return the compensations recorded with steps of the newest instances that have not ended, as they are encoded."""
    unended = [status for status in Status if not status.is_final]
    newest = select(instance.c.id).where(instance.c.status.in_(unended)).order_by(instance.c.created_at.desc())
    ids = list(connection.execute(newest.limit(instances_at_most)).scalars())
    statement = select(history.c.compensation).where(
        history.c.instance_id.in_(ids), history.c.compensation.is_not(None)
    )
    return [str(text) for text in connection.execute(statement.limit(records_at_most)).scalars()] if ids else []


# --- what could not be delivered ------------------------------------------------------------------------------------


def list_undelivered(connection: Connection, least_attempts: int, limit: int) -> list[Undelivered]:
    """Return what was tried at least so often, of each table; they hold nothing but what is still to be delivered."""
    ended_at = select(instance.c.ended_at).where(instance.c.id == finish.c.instance_id).scalar_subquery()
    columns = {
        finish: (finish.c.instance_id, finish.c.attempts, ended_at),
        outbox: (outbox.c.task_id, outbox.c.attempts, outbox.c.created_at),
        notice: (notice.c.instance_id, notice.c.attempts, notice.c.created_at),
    }
    found = []
    for table, chosen in columns.items():
        statement = select(*chosen).where(table.c.attempts >= least_attempts).order_by(table.c.due_at).limit(limit)
        found += [Undelivered(table.name, *row) for row in connection.execute(statement)]
    return found
