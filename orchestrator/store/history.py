"""History: one row per command, with how far it has come and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, and_, bindparam, insert, literal_column, or_, select, update

from orchestrator import codec
from orchestrator.core.records import (
    Kind,
    Outcome,
    Payload,
    Role,
    State,
    Wake,
)
from orchestrator.core.retry import RetryPolicy
from orchestrator.store.instances import Instance
from orchestrator.store.prepared import Batch, Prepared, PreparedWrites
from orchestrator.store.tables import history


@dataclass(frozen=True, slots=True)
class StepKey:
    """One record of one life of one instance."""

    instance_id: str
    generation: str
    run: int
    seq: int

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt and redelivery of the step, another for a purged id that is used again."""
        return f"{self.instance_id}:{self.generation}:{self.run}:{self.seq}"


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """A row of ``orchestrator_history``; payloads, retries and compensations are still text."""

    instance_id: str
    run: int
    seq: int
    generation: str
    kind: Kind
    name: str
    scope: str
    undoes: int | None
    after_order: int
    arguments: Payload | None
    options: str | None
    passes: str | None
    compensation: str | None
    inherits_compensation: bool
    retry: str | None
    timeout_seconds: float | None
    is_foreign: bool
    lane: int | None
    state: State
    attempt: int
    failures: int
    lost: int
    is_in_doubt: bool
    is_draining: bool
    dispatch: int
    celery_retries: int
    publications: int
    claim_incarnation: str | None
    claim_process: int | None
    awaited: int | None
    wake: Wake | None
    outcome: Outcome | None
    settled_order: int | None
    result: Payload | None
    failure: str | None
    is_timed_out: bool
    late_outcome: Outcome | None
    late_order: int | None
    late_result: Payload | None
    late_at: datetime | None
    strays: str | None
    resolution: str | None
    scheduled_at: datetime
    dispatched_at: datetime | None
    started_at: datetime | None
    settled_at: datetime | None
    publish_at: datetime | None
    expires_at: datetime | None
    timeout_at: datetime | None
    due_at: datetime | None
    lane_width: int | None
    role: Role | None
    child_id: str | None
    is_detached: bool
    is_revoked: bool

    @property
    def key(self) -> StepKey:
        return StepKey(self.instance_id, self.generation, self.run, self.seq)

    @property
    def message_options(self) -> dict[str, Any]:
        return read_options(self.options)

    @property
    def retry_policy(self) -> RetryPolicy | None:
        return codec.load(RetryPolicy, self.retry) if self.retry else None

    @property
    def is_blocked(self) -> bool:
        """Whether an operator has to decide on it: it failed, or its timeout has passed and an attempt goes on."""
        return self.state is State.BLOCKED or (self.state is State.RUNNING and self.is_timed_out)

    def is_held_by(self, incarnation: str, process: int, claimed_at: datetime) -> bool:
        """Tell whether it is claimed as this process of a worker claimed it then."""
        held = (self.state, self.claim_incarnation, self.claim_process, self.started_at)
        return held == (State.RUNNING, incarnation, process, claimed_at)

    def changed(self, values: Mapping[str, Any]) -> HistoryRow:
        fields = list(_fields_of(self))  # the time of ``dataclasses.replace`` grows with the fields, and they are many
        for name, value in values.items():
            fields[_places[name]] = value
        return HistoryRow(*fields)


def read_options(text: str | None) -> dict[str, Any]:
    """Return what Celery is told of a message, as it is recorded."""
    return dict(codec.decode(text)) if text else {}


_fields_of = attrgetter(*HistoryRow.__slots__)
_places = {name: index for index, name in enumerate(HistoryRow.__slots__)}

#: What a ``HistoryRow`` is read from.
COLUMNS = [history.c[name] for name in HistoryRow.__slots__]
_ENUMS = [
    (HistoryRow.__slots__.index(name), kind)
    for name, kind in (
        ("kind", Kind),
        ("state", State),
        ("wake", Wake),
        ("outcome", Outcome),
        ("late_outcome", Outcome),
        ("role", Role),
    )
]

#: The columns of a claim that is held no longer.
RELEASED: dict[str, Any] = {
    "claim_incarnation": None,
    "claim_process": None,
    "publish_at": None,
    "expires_at": None,
    "due_at": None,
}

#: A record as it is inserted, but for what its command says.
FRESH: dict[str, Any] = {
    "undoes": None,
    "arguments": None,
    "options": None,
    "passes": None,
    "compensation": None,
    "inherits_compensation": False,
    "retry": None,
    "timeout_seconds": None,
    "is_foreign": False,
    "lane": None,
    "attempt": 0,
    "failures": 0,
    "lost": 0,
    "is_in_doubt": False,
    "is_draining": False,
    "dispatch": 1,
    "celery_retries": 0,
    "publications": 0,
    "claim_incarnation": None,
    "claim_process": None,
    "awaited": None,
    "wake": None,
    "outcome": None,
    "settled_order": None,
    "result": None,
    "failure": None,
    "is_timed_out": False,
    "late_outcome": None,
    "late_order": None,
    "late_result": None,
    "late_at": None,
    "strays": None,
    "resolution": None,
    "dispatched_at": None,
    "started_at": None,
    "settled_at": None,
    "publish_at": None,
    "expires_at": None,
    "timeout_at": None,
    "due_at": None,
    "lane_width": None,
    "role": None,
    "child_id": None,
    "is_detached": False,
    "is_revoked": False,
}


def read_row(values: Any) -> HistoryRow:
    fields = list(values)
    for index, kind in _ENUMS:
        if fields[index] is not None:
            fields[index] = kind(fields[index])
    return HistoryRow(*fields)


def own_row(key: StepKey) -> tuple[Any, ...]:
    """Return the conditions that one record meets."""
    return (
        history.c.instance_id == key.instance_id,
        history.c.run == key.run,
        history.c.seq == key.seq,
        history.c.generation == key.generation,
    )


# --- reading ------------------------------------------------------------------------------------------------------


#: The conditions that one record meets, for prepared statements; ``own`` gives their parameters.
OWN_ROW = (
    history.c.instance_id == bindparam("own_instance"),
    history.c.run == bindparam("own_run"),
    history.c.seq == bindparam("own_seq"),
    history.c.generation == bindparam("own_generation"),
)


def own(key: StepKey) -> dict[str, Any]:
    """Return the parameters of a prepared statement about one record."""
    return {
        "own_instance": key.instance_id,
        "own_run": key.run,
        "own_seq": key.seq,
        "own_generation": key.generation,
    }


_find_row = Prepared(select(*COLUMNS).where(*OWN_ROW))


def find_row(connection: Connection, key: StepKey) -> HistoryRow | None:
    row = _find_row.first(connection, own(key))
    return None if row is None else read_row(row)


_own_run = (history.c.instance_id == bindparam("own_instance"), history.c.run == bindparam("own_run"))
_load_rows = Prepared(select(*COLUMNS).where(*_own_run).order_by(history.c.seq))
_load_rows_from = Prepared(
    select(*COLUMNS).where(*_own_run, history.c.seq >= bindparam("from_seq")).order_by(history.c.seq)
)


def load_rows(
    connection: Connection, instance_id: str, run: int, *, from_seq: int | None = None, limit: int | None = None
) -> list[HistoryRow]:
    """Return all that a run has recorded, by ``seq``; an operator's own records (below zero) first."""
    given = {"own_instance": instance_id, "own_run": run}
    if limit is not None:
        statement = select(*COLUMNS).where(history.c.instance_id == instance_id, history.c.run == run)
        if from_seq is not None:
            statement = statement.where(history.c.seq >= from_seq)
        return [read_row(row) for row in connection.execute(statement.order_by(history.c.seq).limit(limit))]
    if from_seq is None:
        return [read_row(row) for row in _load_rows.rows(connection, given)]
    return [read_row(row) for row in _load_rows_from.rows(connection, {**given, "from_seq": from_seq})]


@dataclass(frozen=True, slots=True)
class Part:
    """A record whose work is a task, or an instance, of its own."""

    key: StepKey
    kind: Kind
    dispatch: int
    child_id: str | None


_list_parts = Prepared(
    select(history.c.generation, history.c.seq, history.c.kind, history.c.dispatch, history.c.child_id)
    .where(*_own_run, history.c.dispatched_at.is_not(None))
    .order_by(history.c.seq)
)


def list_parts(connection: Connection, instance_id: str, run: int) -> list[Part]:
    """Return the steps, compensations and children of a run that have been dispatched, by ``seq``."""
    rows = _list_parts.rows(connection, {"own_instance": instance_id, "own_run": run})
    kinds = (Kind.STEP, Kind.COMPENSATION, Kind.CHILD)
    return [Part(StepKey(instance_id, r[0], run, r[1]), Kind(r[2]), r[3], r[4]) for r in rows if r[2] in kinds]


def list_rows(
    connection: Connection, conditions: Sequence[Any], limit: int, order: Sequence[Any] = (history.c.due_at,)
) -> list[HistoryRow]:
    statement = select(*COLUMNS).where(*conditions).order_by(*order).limit(limit)
    return [read_row(row) for row in connection.execute(statement)]


_find_held = Prepared(
    select(*COLUMNS)
    .where(*_own_run, history.c.lane == bindparam("own_lane"), history.c.state == State.HELD)
    .order_by(history.c.seq)
    .limit(literal_column("1"))
)


def find_held(connection: Connection, row: HistoryRow) -> HistoryRow | None:
    """Return the record of the same map that is next to be dispatched."""
    found = _find_held.first(connection, {"own_instance": row.instance_id, "own_run": row.run, "own_lane": row.lane})
    return None if found is None else read_row(found)


def list_subscribing(connection: Connection, instance_id: str, before_run: int) -> list[HistoryRow]:
    """Return what the runs before ``before_run`` have subscribed to and unsubscribed from, in that order."""
    kinds = (Kind.SUBSCRIBE, Kind.UNSUBSCRIBE)
    own = (history.c.instance_id == instance_id, history.c.run < before_run, history.c.kind.in_(kinds))
    statement = select(*COLUMNS).where(*own).order_by(history.c.run, history.c.seq)
    return [read_row(row) for row in connection.execute(statement)]


def list_awaited_receives(connection: Connection, waiting: Instance) -> list[HistoryRow]:
    """Return the receives that an instance waits for and that no message was counted for, by ``seq``."""
    statement = select(*COLUMNS).where(
        history.c.instance_id == waiting.id,
        history.c.run == waiting.run,
        history.c.awaited == waiting.wait_number,
        history.c.kind == Kind.RECEIVE,
        history.c.state == State.SCHEDULED,
    )
    return [read_row(row) for row in connection.execute(statement.order_by(history.c.seq))]


def list_blocked(connection: Connection, blocked: Instance) -> list[HistoryRow]:
    """Return the steps that an operator has to decide on, by ``seq``."""
    timed_out = and_(history.c.state == State.RUNNING, history.c.is_timed_out)
    statement = select(*COLUMNS).where(
        history.c.instance_id == blocked.id,
        history.c.run == blocked.run,
        or_(history.c.state == State.BLOCKED, timed_out),
    )
    return [read_row(row) for row in connection.execute(statement.order_by(history.c.seq))]


def find_undoing(connection: Connection, key: StepKey) -> HistoryRow | None:
    """Return the compensation that was scheduled for a step."""
    statement = select(*COLUMNS).where(
        history.c.instance_id == key.instance_id,
        history.c.run == key.run,
        history.c.undoes == key.seq,
        history.c.seq >= 0,
    )
    found = connection.execute(statement.order_by(history.c.seq.desc()).limit(1)).first()
    return None if found is None else read_row(found)


# --- writing, under the instance's lock ---------------------------------------------------------------------------


_insert_row = PreparedWrites(lambda columns: insert(history).values({name: bindparam(name) for name in columns}))


def insert_row(batch: Batch, row: Mapping[str, Any]) -> None:
    """Add to a batch what inserts a record; what of ``FRESH`` it does not say holds for it."""
    new = {**FRESH, **row}
    # what is null is left out: the columns are many, and most of them are
    batch.add(_insert_row.of(tuple(name for name, value in new.items() if value is not None)), new)


def insert_rows(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert records as ``insert_row`` does, all at once."""
    if not rows:
        return
    every = [{**FRESH, **row} for row in rows]
    used = tuple(name for name in every[0] if any(row[name] is not None for row in every))
    connection.execute(insert(history), [{name: row[name] for name in used} for row in every])


_change_row = PreparedWrites(
    lambda columns: (
        update(history)
        .where(
            *OWN_ROW,
            history.c.state == bindparam("was_state"),
            history.c.attempt == bindparam("was_attempt"),
            history.c.dispatch == bindparam("was_dispatch"),
        )
        .values({name: bindparam(f"new_{name}") for name in columns})
    )
)


def change_row(batch: Batch, row: HistoryRow, values: Mapping[str, Any]) -> None:
    """Write ``values``; the record has to be in the state, attempt and dispatch in which ``row`` was read."""
    was = {"was_state": row.state, "was_attempt": row.attempt, "was_dispatch": row.dispatch}
    new = {f"new_{name}": value for name, value in values.items()}
    batch.add(_change_row.of(tuple(sorted(values))), {**own(row.key), **was, **new}, expects=1)


def note_on_row(connection: Connection, row: HistoryRow, values: Mapping[str, Any]) -> None:
    """Write what is told beside the outcome and changes no state."""
    connection.execute(update(history).where(*own_row(row.key)).values(**values))


_await_rows = (
    update(history)
    .where(
        history.c.instance_id == bindparam("own_instance"),
        history.c.run == bindparam("own_run"),
        history.c.seq == bindparam("own_seq"),
    )
    .values(awaited=bindparam("new_awaited"), wake=bindparam("new_wake"))
)


def await_rows(connection: Connection, instance: Instance, wait_number: int, wakes: Mapping[int, Wake]) -> None:
    """Mark the records whose completion counts for the wait numbered ``wait_number``."""
    if wakes:
        own = {"own_instance": instance.id, "own_run": instance.run, "new_awaited": wait_number}
        connection.execute(_await_rows, [{**own, "own_seq": seq, "new_wake": wake} for seq, wake in wakes.items()])
