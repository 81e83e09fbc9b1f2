"""What handles and lists tell of instances, runs and records; payloads are plain JSON, without what is masked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestrator import codec, errors
from orchestrator.core.records import Compensation, Failure, Kind, NotUndone, Outcome, State
from orchestrator.runtime import settling
from orchestrator.runtime.dispatch import task_id_of
from orchestrator.runtime.masking import Masks
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status

_STRAYS = {"AttemptFailed": str(Outcome.FAILED), "AttemptDoubtful": str(Outcome.UNKNOWN)}


@dataclass(frozen=True, slots=True)
class Description:
    """What an instance is and has come to."""

    instance_id: str
    workflow: str
    status: Status
    run: int
    args: list[Any]
    kwargs: dict[str, Any]
    result: Any
    error: Failure | None
    blocked: str | None
    not_undone: list[NotUndone]
    progress: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    attributes: dict[str, Any] = field(default_factory=dict)
    parent_id: str | None = None
    deadline_at: datetime | None = None
    cancel_reason: str | None = None
    forked_from: str | None = None
    is_past_pivot: bool = False


@dataclass(frozen=True, slots=True)
class InstancePage:
    """Instances, newest first, and the ``cursor`` of the next page (``None``: there is none)."""

    instances: list[Description]
    cursor: str | None

    def __iter__(self) -> Iterator[Description]:
        return iter(self.instances)

    def __len__(self) -> int:
        return len(self.instances)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One record of an instance, as ``handle.history()`` tells it; payloads are plain JSON values."""

    seq: int
    kind: str
    name: str
    scope: str
    undoes: int | None
    state: str
    outcome: str | None
    args: list[Any]
    kwargs: dict[str, Any]
    result: Any
    error: Failure | None
    late_outcome: str | None
    attempts: int
    lost: int
    compensation: str | None
    resolution: str | None
    strays: list[dict[str, Any]]  # each: the attempt, what it ended as (succeeded, failed, unknown), and at when
    scheduled_at: datetime
    started_at: datetime | None
    settled_at: datetime | None
    child_id: str | None = None
    task_id: str | None = None  # of the Celery task that is its last dispatch
    dispatched_at: datetime | None = None
    due_at: datetime | None = None  # when the clock does something with it: its next attempt, its timeout
    timeout_at: datetime | None = None
    next_attempt_at: datetime | None = None
    late_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunEntry:
    """A run that has ended in ``recur``; its records are ``handle.history(run)``."""

    run: int
    args: list[Any]
    kwargs: dict[str, Any]
    started_at: datetime
    ended_at: datetime


def run_entry(masks: Masks, workflow: str, run: int, text: str, started_at: datetime, ended_at: datetime) -> RunEntry:
    args, kwargs = masks.arguments(workflow, *codec.plain_arguments(text))
    return RunEntry(run, args, kwargs, started_at, ended_at)


def read_statuses(status: str | Iterable[str] | None) -> list[Status] | None:
    if status is None:
        return None
    try:
        return [Status(each) for each in ([status] if isinstance(status, str) else status)]
    except ValueError as error:
        raise errors.InvalidOperation(f"{error}; statuses are {', '.join(Status)}") from error


def describe(masks: Masks, instance: Instance, attributes: dict[str, Any]) -> Description:
    args, kwargs = masks.arguments(instance.workflow, *codec.plain_arguments(instance.input))
    return Description(
        instance.id,
        instance.workflow,
        instance.status,
        instance.run,
        args,
        kwargs,
        masks.result(instance.workflow, codec.decode(instance.result)) if instance.result is not None else None,
        codec.load(Failure, instance.failure) if instance.failure else None,
        instance.blocked if instance.status is Status.BLOCKED else None,
        settling.list_not_undone(instance),
        instance.progress,
        instance.created_at,
        instance.started_at,
        instance.ended_at,
        attributes,
        instance.parent_id,
        instance.deadline_at,
        instance.cancel_reason,
        instance.forked_from,
        instance.is_past_pivot,
    )


def history_entry(masks: Masks, row: HistoryRow) -> HistoryEntry:
    args, kwargs = masks.arguments(row.name, *codec.plain_arguments(row.arguments)) if row.arguments else ([], {})
    plan = codec.load(Compensation, row.compensation).name if row.compensation else None
    return HistoryEntry(
        row.seq,
        str(row.kind),
        row.name,
        row.scope,
        row.undoes,
        str(row.state),
        str(row.outcome) if row.outcome else None,
        args,
        kwargs,
        masks.result(row.name, codec.decode(row.result)) if row.result is not None else None,
        codec.load(Failure, row.failure) if row.failure else None,
        str(row.late_outcome) if row.late_outcome else None,
        row.attempt,
        row.lost,
        plan,
        row.resolution,
        _list_strays(row),
        row.scheduled_at,
        row.started_at,
        row.settled_at,
        row.child_id,
        _task_id(row),
        row.dispatched_at,
        row.due_at,
        row.timeout_at,
        row.publish_at if row.state is State.SCHEDULED and not row.publications else None,
        row.late_at,
    )


def _list_strays(row: HistoryRow) -> list[dict[str, Any]]:
    """Return what attempts of a step that had been given up came to after all."""
    told = json.loads(row.strays) if row.strays else []
    return [
        {
            "attempt": stray["attempt"],
            "ended": _STRAYS.get(stray["ended"], stray["ended"]),
            "at": datetime.fromisoformat(stray["at"]),
        }
        for stray in told
    ]


def _task_id(row: HistoryRow) -> str | None:
    match row.kind:
        case Kind.STEP | Kind.COMPENSATION:
            return task_id_of(row.key, row.dispatch)
        case Kind.CHILD:
            return row.child_id
    return None


def status_in_words(instance: Instance) -> str:
    """Return the status, and why it is ``BLOCKED``, without the traceback."""
    if instance.status is not Status.BLOCKED or not instance.blocked:
        return str(instance.status)
    return f"{instance.status} ({instance.blocked.partition(chr(10))[0]})"
