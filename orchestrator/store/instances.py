"""Instances: one row each, which is also the lock of all that belongs to them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, exc, insert, literal, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from orchestrator.core.records import Payload
from orchestrator.store.engine import Conflict
from orchestrator.store.prepared import Batch, Prepared, PreparedWrites
from orchestrator.store.tables import attribute, finish, instance, run


class Status(StrEnum):
    """What an instance is doing, or came to."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPENSATING = "COMPENSATING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    COMPENSATED = "COMPENSATED"
    COMPENSATION_FAILED = "COMPENSATION_FAILED"
    CANCELLED = "CANCELLED"
    TERMINATED = "TERMINATED"
    BLOCKED = "BLOCKED"

    @property
    def is_final(self) -> bool:
        return self not in (Status.PENDING, Status.RUNNING, Status.COMPENSATING, Status.BLOCKED)


@dataclass(frozen=True, slots=True)
class Instance:
    """A row of ``orchestrator_instance``."""

    id: str
    generation: str
    workflow: str
    queue: str | None
    status: Status
    run: int
    input: Payload
    result: Payload | None
    failure: Payload | None
    blocked: str | None
    not_undone: Payload | None
    progress: str | None
    request: Payload | None
    waiting: int
    wait_number: int
    next_seq: int
    next_order: int
    passed_order: int | None
    version: int
    pass_due_at: datetime | None
    pass_attempts: int
    pass_publications: int
    refused: Payload | None
    created_at: datetime
    started_at: datetime | None
    last_at: datetime
    ended_at: datetime | None
    parent_id: str | None
    parent_generation: str | None
    parent_run: int | None
    parent_seq: int | None
    root_id: str | None
    parks: bool
    is_past_pivot: bool
    blocked_steps: int
    cancel_order: int | None
    cancel_at: datetime | None
    cancel_reason: str | None
    deadline_at: datetime | None
    deadline_order: int | None
    deadline_passed_at: datetime | None
    undo_order: int | None
    undo_at: datetime | None
    undo_seq: int | None
    mail: int
    run_started_at: datetime | None
    seeds: Payload | None
    forked_from: str | None = None

    def may_begin(self, now: datetime) -> bool:
        """Whether its first pass may be made: it was made, or the eta that the instance was started with has come."""
        return self.started_at is not None or self.run_started_at is None or self.run_started_at <= now

    def changed(self, values: Mapping[str, Any]) -> Instance:
        fields = list(_fields_of(self))
        for name, value in values.items():
            fields[_places[name]] = value
        return Instance(*fields)

    @property
    def may_pass(self) -> bool:
        """Whether passes are made: an instance that is blocked for a step goes on with the others."""
        return self.status in PASSING or (self.status is Status.BLOCKED and self.blocked_steps > 0)


_fields_of = attrgetter(*Instance.__slots__)
_places = {name: index for index, name in enumerate(Instance.__slots__)}

#: The statuses in which passes are made.
PASSING = (Status.PENDING, Status.RUNNING, Status.COMPENSATING)


@dataclass(frozen=True, slots=True)
class Parent:
    """The record of another instance whose child an instance is."""

    instance_id: str
    generation: str
    run: int
    seq: int
    root_id: str


INSTANCE_COLUMNS = [instance.c[name] for name in Instance.__slots__]
_PAYLOADS = ("input", "result", "failure", "request", "seeds")


def read_instance(row: Any) -> Instance:
    values = list(row)
    values[4] = Status(values[4])
    return Instance(*values)


def _inserting(make: Callable[[Any], Any]) -> PreparedWrites:
    return PreparedWrites(lambda columns: make(instance).values({name: bindparam(name) for name in columns}))


_insert_instance = _inserting(insert)
#: For the databases that can be asked to insert nothing where the id is taken.
_insert_if_new = {
    "postgresql": _inserting(lambda table: postgresql.insert(table).on_conflict_do_nothing()),
    "sqlite": _inserting(lambda table: sqlite.insert(table).on_conflict_do_nothing()),
}


def insert_instance(
    connection: Connection,
    *,
    instance_id: str,
    generation: str,
    workflow: str,
    queue: str | None,
    arguments: Payload,
    request: Payload | None,
    now: datetime,
    pass_due_at: datetime,
    parent: Parent | None = None,
    values: Mapping[str, Any] | None = None,
    is_lent: bool = False,
) -> bool:
    """Insert a ``PENDING`` instance that owes its first pass; return ``False`` if the id is taken.

    ``is_lent``: the transaction is somebody else's, and of an isolation level of his; he can go on with it either way.
    """
    fresh = {
        "id": instance_id,
        "generation": generation,
        "workflow": workflow,
        "queue": queue,
        "status": Status.PENDING,
        "run": 0,
        "input": arguments,
        "request": request,
        "waiting": 0,
        "wait_number": 0,
        "next_seq": 0,
        "next_order": 1,
        "version": 0,
        "pass_due_at": pass_due_at,
        "pass_attempts": 0,
        "pass_publications": 0,
        "created_at": now,
        "last_at": now,
        "parent_id": parent.instance_id if parent else None,
        "parent_generation": parent.generation if parent else None,
        "parent_run": parent.run if parent else None,
        "parent_seq": parent.seq if parent else None,
        "root_id": parent.root_id if parent else None,
        "parks": False,
        "is_past_pivot": False,
        "blocked_steps": 0,
        "mail": 0,
        **(values or {}),
    }
    columns = tuple(fresh)
    if not is_lent and connection.dialect.name in _insert_if_new:
        return _insert_if_new[connection.dialect.name].of(columns).run(connection, fresh) == 1
    # MySQL takes back the one statement that was refused
    keeps_transaction = connection.begin_nested() if is_lent else nullcontext()
    try:
        with keeps_transaction:
            _insert_instance.of(columns).run(connection, fresh)
    except exc.IntegrityError:
        return False
    return True


_own_instance = instance.c.id == bindparam("own_id")
_find_instance = Prepared(select(*INSTANCE_COLUMNS).where(_own_instance))
_lock_instance = Prepared(select(*INSTANCE_COLUMNS).where(_own_instance).with_for_update())
#: For ``read_instance``.  Finds nothing where several completions are waited for: each changes the instance, and what
#: is known of it would hold for no time.
FIND_UNSHARED = Prepared(select(*INSTANCE_COLUMNS).where(_own_instance, instance.c.waiting <= 1))


def find_instance(connection: Connection, instance_id: str) -> Instance | None:
    row = _find_instance.first(connection, {"own_id": instance_id})
    return None if row is None else read_instance(row)


def list_family(connection: Connection, instance_id: str) -> list[Instance]:
    """Return the root that an instance descends from, and all that descend from it; nothing for an unknown one."""
    found = find_instance(connection, instance_id)
    if found is None:
        return []
    root = found.root_id or found.id
    rows = connection.execute(select(*INSTANCE_COLUMNS).where(or_(instance.c.id == root, instance.c.root_id == root)))
    return [read_instance(row) for row in rows]


def find_instances(connection: Connection, instance_ids: Collection[str]) -> dict[str, Instance]:
    """Return those of the instances that exist, by id."""
    rows = connection.execute(select(*INSTANCE_COLUMNS).where(instance.c.id.in_(instance_ids)))
    return {found.id: found for found in map(read_instance, rows)}


def lock_instance(connection: Connection, instance_id: str) -> Instance | None:
    """Lock the instance and all that belongs to it until the transaction ends."""
    row = _lock_instance.first(connection, {"own_id": instance_id})
    return None if row is None else read_instance(row)


def lock_free_instances(connection: Connection, instance_ids: Collection[str]) -> list[Instance]:
    """Lock those of the instances that nobody else has locked, and wait for none; their payloads are not read."""
    columns = [literal("").label(name) if name in _PAYLOADS else instance.c[name] for name in Instance.__slots__]
    statement = select(*columns).where(instance.c.id.in_(instance_ids)).order_by(instance.c.id)
    return [read_instance(row) for row in connection.execute(statement.with_for_update(skip_locked=True))]


_update_instance = PreparedWrites(
    lambda columns: (
        update(instance)
        .where(
            _own_instance,
            instance.c.generation == bindparam("own_generation"),
            instance.c.version == bindparam("was_version"),
        )
        .values({name: bindparam(f"new_{name}") for name in columns})
    )
)


def update_instance(connection: Connection, locked: Instance, values: Mapping[str, Any]) -> None:
    """Write ``values`` to a locked instance."""
    batch = Batch(connection)
    change_instance(batch, locked, values)
    if not batch.run():
        raise Conflict


def change_instance(batch: Batch, read: Instance, values: Mapping[str, Any]) -> None:
    """Add to a batch what writes ``values`` to an instance, if that is as it was read; its version tells others.

    From then on it is locked, if it was not before.
    """
    changed = {**values, "version": read.version + 1}
    new = {f"new_{name}": value for name, value in changed.items()}
    given = {"own_id": read.id, "own_generation": read.generation, "was_version": read.version, **new}
    batch.add(_update_instance.of(tuple(sorted(changed))), given, expects=1)


def set_attributes(connection: Connection, instance_id: str, attributes: Mapping[str, Any]) -> None:
    """Replace the attributes named; a value of ``None`` removes one."""
    if not attributes:
        return
    own = attribute.c.instance_id == instance_id
    created_at = select(instance.c.created_at).where(instance.c.id == instance_id).scalar_subquery()
    rows = connection.execute(select(attribute.c.name, attribute.c.value).where(own))
    known = {row[0]: row[1] for row in rows}
    for name, value in attributes.items():
        text = encode_attribute(value)
        if known.get(name) == text or (value is None and name not in known):
            continue
        connection.execute(delete(attribute).where(own, attribute.c.name == name))
        if value is not None:
            values = {"instance_id": instance_id, "name": name, "value": text, "created_at": created_at}
            connection.execute(insert(attribute).values(**values))


def load_attributes(connection: Connection, instance_id: str) -> dict[str, Any]:
    rows = connection.execute(select(attribute.c.name, attribute.c.value).where(attribute.c.instance_id == instance_id))
    return {row[0]: json.loads(row[1]) for row in rows}


def encode_attribute(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Page:
    """Instances, newest first, and the cursor of the next page."""

    instances: list[Instance]
    cursor: str | None


def list_instances(
    connection: Connection,
    *,
    workflow: str | None = None,
    statuses: list[Status] | None = None,
    attributes: Mapping[str, Any] | None = None,
    started_after: datetime | None = None,
    started_before: datetime | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Page:
    """Return up to ``limit`` instances, newest first; pages hold while new ones are started."""
    statement = select(*INSTANCE_COLUMNS).order_by(instance.c.created_at.desc(), instance.c.id.desc()).limit(limit + 1)
    if workflow is not None:
        statement = statement.where(instance.c.workflow == workflow)
    if statuses:
        statement = statement.where(instance.c.status.in_(statuses))
    if started_after is not None:
        statement = statement.where(instance.c.created_at > started_after)
    if started_before is not None:
        statement = statement.where(instance.c.created_at < started_before)
    for name, value in (attributes or {}).items():
        matching = select(attribute.c.instance_id).where(
            and_(attribute.c.name == name, attribute.c.value == encode_attribute(value))
        )
        statement = statement.where(instance.c.id.in_(matching))
    if cursor is not None:
        at, last_id = _read_cursor(cursor)
        # the first part alone is what an index is entered by, however far down the page is
        older = and_(instance.c.created_at <= at, or_(instance.c.created_at < at, instance.c.id < last_id))
        statement = statement.where(older)
    rows = [read_instance(row) for row in connection.execute(statement)]
    more = len(rows) > limit
    rows = rows[:limit]
    return Page(rows, _make_cursor(rows[-1]) if more else None)


def _make_cursor(last: Instance) -> str:
    return base64.urlsafe_b64encode(json.dumps([last.created_at.isoformat(), last.id]).encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        at, last_id = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return datetime.fromisoformat(at), str(last_id)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{cursor!r} is not a cursor that list() returned") from error


# --- passes that are owed -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwedPass:
    """An instance whose pass has not been made yet."""

    instance_id: str
    generation: str
    workflow: str
    queue: str | None
    pass_due_at: datetime
    pass_publications: int


def list_owed_passes(
    connection: Connection, due_before: datetime, limit: int, *, begun_by: datetime | None = None
) -> list[OwedPass]:
    """Return passes that are due before an instant; with ``begun_by`` none of instances whose eta comes after that."""
    columns = [instance.c.id, *(instance.c[name] for name in OwedPass.__slots__[1:])]
    statement = select(*columns).where(instance.c.pass_due_at <= due_before)
    if begun_by is not None:
        eta = instance.c.run_started_at
        statement = statement.where(or_(instance.c.started_at.is_not(None), eta.is_(None), eta <= begun_by))
    statement = statement.order_by(instance.c.pass_due_at).limit(limit)
    return [OwedPass(*row) for row in connection.execute(statement)]


def postpone_pass(connection: Connection, owed: OwedPass, until: datetime) -> bool:
    """Take the publication of an owed pass on; ``False`` if another poller did, or the pass was made."""
    statement = (
        update(instance)
        .where(
            instance.c.id == owed.instance_id,
            instance.c.generation == owed.generation,
            instance.c.pass_due_at == owed.pass_due_at,
        )
        .values(pass_due_at=until, pass_publications=owed.pass_publications + 1)
    )
    return connection.execute(statement).rowcount == 1


def take_back_pass(connection: Connection, owed: OwedPass, until: datetime, due_at: datetime) -> None:
    """Undo ``postpone_pass`` of ``owed``: its message could not be sent."""
    own = (instance.c.id == owed.instance_id, instance.c.generation == owed.generation)
    statement = update(instance).where(*own, instance.c.pass_due_at == until)
    connection.execute(statement.values(pass_due_at=due_at, pass_publications=owed.pass_publications))


def owe_blocked_passes(connection: Connection, workflows: Sequence[str], incarnation: str, now: datetime) -> None:
    """Owe a pass to the instances that are blocked for their code, and whose pass ``incarnation`` has not refused."""
    statement = update(instance).where(
        instance.c.status == Status.BLOCKED,
        instance.c.refused.is_not(None),
        instance.c.refused.not_like(f"%{incarnation}%"),
        instance.c.workflow.in_(workflows),
    )
    values = {"status": Status.RUNNING, "pass_due_at": now, "pass_attempts": 0, "pass_publications": 0}
    connection.execute(statement.values(**values, version=instance.c.version + 1))


# --- deadlines and runs ---------------------------------------------------------------------------------------------


def list_past_deadline(connection: Connection, now: datetime, limit: int) -> list[tuple[str, str]]:
    """Return id and generation of instances whose deadline has passed."""
    statement = select(instance.c.id, instance.c.generation).where(instance.c.deadline_at <= now)
    statement = statement.order_by(instance.c.deadline_at).limit(limit)
    return [(row[0], row[1]) for row in connection.execute(statement)]


def insert_run(connection: Connection, ended: Instance, ended_at: datetime) -> None:
    """Keep what a run began with, now that the next one begins."""
    values = {
        "instance_id": ended.id,
        "run": ended.run,
        "generation": ended.generation,
        "input": ended.input,
        "started_at": ended.run_started_at or ended.started_at or ended.created_at,
        "ended_at": ended_at,
    }
    connection.execute(insert(run), values)


def list_runs(connection: Connection, instance_id: str) -> list[tuple[int, Payload, datetime, datetime]]:
    """Return number, input, begin and end of the runs before the present one."""
    columns = (run.c.run, run.c.input, run.c.started_at, run.c.ended_at)
    statement = select(*columns).where(run.c.instance_id == instance_id).order_by(run.c.run)
    return [(row[0], row[1], row[2], row[3]) for row in connection.execute(statement)]


# --- what an ending still owes ------------------------------------------------------------------------------------


_forget_finish = Prepared(delete(finish).where(finish.c.instance_id == bindparam("own_id")))
_insert_finish = Prepared(insert(finish).values({column.name: bindparam(column.name) for column in finish.c}))
_own = (finish.c.instance_id == bindparam("own_id"), finish.c.generation == bindparam("own_generation"))
_find_told = Prepared(select(finish.c.told).where(*_own))
_delete_finish = Prepared(delete(finish).where(*_own))


def insert_finish(connection: Connection, instance_id: str, generation: str, due_at: datetime) -> None:
    values = {"instance_id": instance_id, "generation": generation, "attempts": 0, "told": 0, "due_at": due_at}
    batch = Batch(connection)
    batch.add(_forget_finish, {"own_id": instance_id})
    batch.add(_insert_finish, values)
    batch.run()


def list_due_finishes(connection: Connection, now: datetime, limit: int) -> list[tuple[str, str, int, datetime]]:
    columns = (finish.c.instance_id, finish.c.generation, finish.c.attempts, finish.c.due_at)
    statement = select(*columns).where(finish.c.due_at <= now).order_by(finish.c.due_at).limit(limit)
    return [(row[0], row[1], row[2], row[3]) for row in connection.execute(statement)]


def find_told(connection: Connection, instance_id: str, generation: str) -> int | None:
    """Return how much of an ending has been told, ``None`` when nothing is owed any more."""
    found = _find_told.first(connection, {"own_id": instance_id, "own_generation": generation})
    return None if found is None else int(found[0])


def note_told(connection: Connection, instance_id: str, generation: str, told: int) -> None:
    """Keep how much of an ending has been told: when the rest is, that is not told again."""
    statement = update(finish).where(*_own_finish(instance_id, generation), finish.c.told < told)
    connection.execute(statement.values(told=told))


def postpone_finish(connection: Connection, instance_id: str, generation: str, seen: datetime, until: datetime) -> bool:
    """Take what an ending owes on; ``False`` if another process did, or it was paid."""
    statement = update(finish).where(*_own_finish(instance_id, generation), finish.c.due_at == seen)
    return connection.execute(statement.values(due_at=until, attempts=finish.c.attempts + 1)).rowcount == 1


def delete_finish(connection: Connection, instance_id: str, generation: str) -> None:
    _delete_finish.run(connection, {"own_id": instance_id, "own_generation": generation})


def _own_finish(instance_id: str, generation: str) -> tuple[Any, ...]:
    return (finish.c.instance_id == instance_id, finish.c.generation == generation)
