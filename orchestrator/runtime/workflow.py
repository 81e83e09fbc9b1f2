"""A workflow as a Celery task, and the handle of an instance."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from celery.app.task import Task
from celery.exceptions import Ignore, TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, assert_will_not_block

from orchestrator import codec, errors
from orchestrator.core.records import Compensation, Failure, NotUndone
from orchestrator.runtime import finishing, running, settling, softlimit
from orchestrator.runtime.inputs import check_instance_id, encode_input
from orchestrator.runtime.owner import orchestrator_of
from orchestrator.store import history, instances
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status

if TYPE_CHECKING:
    from orchestrator.runtime.app import Orchestrator
    from orchestrator.runtime.callers import CallersSession

CELERY_STATES = {
    Status.PENDING: "PENDING",
    Status.RUNNING: "STARTED",
    Status.COMPENSATING: "COMPENSATING",
    Status.COMPLETED: "SUCCESS",
    Status.FAILED: "FAILURE",
    Status.COMPENSATED: "FAILURE",
    Status.COMPENSATION_FAILED: "FAILURE",
    Status.CANCELLED: "REVOKED",
    Status.TERMINATED: "REVOKED",
    Status.BLOCKED: "BLOCKED",
}


class WorkflowTask(Task):
    """What ``@orchestrator.workflow`` makes of a function.

    ``delay`` and ``apply_async`` send a plain message, whose task records the instance; the instance id is the task id.
    ``orchestrator.start`` is durable from the call on.
    """

    abstract = True
    is_workflow = True
    acks_late = True
    # the instance may not be recorded yet when the process that took the message dies; and once it is recorded,
    # passes that end their process are counted
    reject_on_worker_lost = True
    max_retries = None  # while the store is away
    typing = False
    function: Callable[..., Any]
    parks = False
    deadline: timedelta | None = None

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> WorkflowHandle:
        """Send the workflow's start task; arguments of any kind that the codec knows are refused or taken here."""
        self.check_not_eager()
        if options.get("task_id") is not None:
            check_instance_id(options["task_id"])
        text = self.encode_input(tuple(args or ()), dict(kwargs or {}))
        plain_args, plain_kwargs = codec.plain_arguments(text)
        handle: WorkflowHandle = super().apply_async(plain_args, plain_kwargs, **options)
        return handle

    def apply(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse to run here and now."""
        raise errors.EagerModeUnsupported(self.name)

    def check_not_eager(self) -> None:
        if self._get_app().conf.task_always_eager:
            raise errors.EagerModeUnsupported(self.name)

    def encode_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the input as it is recorded: bound to the function's parameters, checked against its annotations."""
        limit = orchestrator_of(self._get_app()).settings.max_payload_bytes
        return encode_input(self.function, self.name, args, kwargs, limit)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> WorkflowHandle:  # noqa: N802 - the name is Celery's
        """Return the handle of an instance."""
        return WorkflowHandle(task_id, app=self._get_app(), task_name=self.name, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as Celery does; called like a function it says how a workflow is started."""
        if self.request.called_directly:
            raise errors.ContextMisused(f"{self.name} is a workflow: start it with .delay() or orchestrator.start()")
        return super().__call__(*args, **kwargs)


def make_run(function: Callable[..., Any]) -> Callable[..., None]:
    """Return the body of a workflow's Celery task: record the instance, and make its first pass."""

    @functools.wraps(function)
    def run(self: WorkflowTask, *args: Any, **kwargs: Any) -> None:
        orchestrator = orchestrator_of(self._get_app())
        # a time limit of the app's is not the workflow's: raised inside its function it would be a failure of its own
        with softlimit.deferred(in_pool_process=orchestrator.executing.is_child):
            orchestrator.starter.begin(self, args, kwargs)
        raise Ignore  # its result is told when the instance has ended

    return run


def workflow_options(
    function: Callable[..., Any], park: bool, deadline: object, options: dict[str, Any]
) -> dict[str, Any]:
    """Return what ``app.task`` is given to make a workflow of ``function``, or refuse it."""
    if not inspect.isfunction(function):
        raise errors.ContextMisused(f"a workflow is a function, not {function!r}")
    name = function.__qualname__
    if function.__name__ == "<lambda>":
        raise errors.ContextMisused(f"{name} has no name that its instances could be found by; define a function")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise errors.ContextMisused(f"{name} is async; a workflow is a plain function, its waits are calls of ctx")
    if inspect.isgeneratorfunction(function):
        raise errors.ContextMisused(
            f"{name} is a generator; a workflow is a plain function, its waits are calls of ctx"
        )
    if not inspect.signature(function).parameters:
        raise errors.ContextMisused(f"{name} takes no arguments; the first one of a workflow is its context")
    if deadline is not None and not (isinstance(deadline, timedelta) and deadline > timedelta()):
        raise errors.ConfigurationError(f"the deadline of {name} is {deadline!r}; give a positive timedelta")
    own = {"bind": True, "base": WorkflowTask, "function": staticmethod(function)}
    return {**options, **own, "parks": park, "deadline": deadline}


# --- what a handle tells ------------------------------------------------------------------------------------------


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
    strays: str | None
    scheduled_at: datetime
    started_at: datetime | None
    settled_at: datetime | None
    child_id: str | None = None


@dataclass(frozen=True, slots=True)
class RunEntry:
    """A run that has ended in ``recur``; its records are ``handle.history(run)``."""

    run: int
    args: list[Any]
    kwargs: dict[str, Any]
    started_at: datetime
    ended_at: datetime


def run_entry(run: int, text: str, started_at: datetime, ended_at: datetime) -> RunEntry:
    args, kwargs = codec.plain_arguments(text)
    return RunEntry(run, list(args), kwargs, started_at, ended_at)


def read_statuses(status: str | Iterable[str] | None) -> list[Status] | None:
    if status is None:
        return None
    try:
        return [Status(each) for each in ([status] if isinstance(status, str) else status)]
    except ValueError as error:
        raise errors.InvalidOperation(f"{error}; statuses are {', '.join(Status)}") from error


def describe(instance: Instance, attributes: dict[str, Any]) -> Description:
    args, kwargs = codec.plain_arguments(instance.input)
    return Description(
        instance.id,
        instance.workflow,
        instance.status,
        instance.run,
        list(args),
        kwargs,
        codec.decode(instance.result) if instance.result is not None else None,
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
    )


def history_entry(row: HistoryRow) -> HistoryEntry:
    args, kwargs = codec.plain_arguments(row.arguments) if row.arguments else ([], {})
    plan = codec.load(Compensation, row.compensation).name if row.compensation else None
    return HistoryEntry(
        row.seq,
        str(row.kind),
        row.name,
        row.scope,
        row.undoes,
        str(row.state),
        str(row.outcome) if row.outcome else None,
        list(args),
        kwargs,
        codec.decode(row.result) if row.result is not None else None,
        codec.load(Failure, row.failure) if row.failure else None,
        str(row.late_outcome) if row.late_outcome else None,
        row.attempt,
        row.lost,
        plan,
        row.resolution,
        row.strays,
        row.scheduled_at,
        row.started_at,
        row.settled_at,
        row.child_id,
    )


def _status_in_words(instance: Instance) -> str:
    """Return the status, and why it is ``BLOCKED``, without the traceback."""
    if instance.status is not Status.BLOCKED or not instance.blocked:
        return str(instance.status)
    return f"{instance.status} ({instance.blocked.partition(chr(10))[0]})"


class WorkflowHandle(AsyncResult):
    """An instance.  A Celery ``AsyncResult`` that reads the store, so that it needs no result backend."""

    poll_seconds = (0.02, 0.5)

    @property
    def _orchestrator(self) -> Orchestrator:
        return orchestrator_of(self.app)

    def _find(self) -> Instance | None:
        return self._orchestrator.find_instance(self.id)

    def _load(self) -> Instance:
        instance = self._find()
        if instance is None:
            raise errors.UnknownInstance(self.id)
        return instance

    def _get_task_meta(self) -> dict[str, Any]:
        instance = self._find()
        if instance is None:  # not recorded yet, as far as anybody can tell
            return {"status": "PENDING", "result": None, "traceback": None, "children": []}
        result: Any = None
        if instance.status is Status.COMPLETED:
            result = self._decode(instance)
        elif instance.status in finishing.REVOKED:
            result = TaskRevokedError(str(finishing.failure_of(instance)))
        elif instance.status.is_final:
            result = finishing.failure_of(instance)
        return {
            "status": CELERY_STATES[instance.status],
            "result": result,
            "traceback": getattr(result, "traceback", None),
            "date_done": instance.ended_at,
            "name": instance.workflow,
        }

    def _decode(self, instance: Instance) -> Any:
        task = self._orchestrator.workflows.find(instance.workflow)
        returns = None if task is None else codec.annotations_of(task.function).returns
        return codec.decode_leniently(instance.result or "null", returns)

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        disable_sync_subtasks: bool = True,
        **_options: Any,
    ) -> Any:
        """Wait, at most ``timeout`` seconds, until the instance has ended, and return its result.

        Raises the workflow's error (a ``WorkflowFailed`` that is also of the original class), ``TaskRevokedError`` for
        one that was cancelled or terminated, and Celery's ``TimeoutError``.
        """
        running.refuse_inside_passes("get()", "run it as a child with ctx.run, or have it send a message")
        if disable_sync_subtasks:
            assert_will_not_block()
        deadline = None if timeout is None else time.monotonic() + timeout
        pause, longest = (interval, interval) if interval else self.poll_seconds
        while True:
            instance = self._find()
            if instance is not None and instance.status.is_final:
                break
            if deadline is not None and time.monotonic() >= deadline:
                state = "not recorded yet" if instance is None else _status_in_words(instance)
                raise CeleryTimeoutError(f"instance {self.id} is {state} after {timeout} s")
            left = pause if deadline is None else min(pause, max(0.0, deadline - time.monotonic()))
            time.sleep(left)
            pause = min(pause * 1.5, longest)
        result = self._get_task_meta()["result"]
        if propagate and isinstance(result, Exception):
            raise result
        return result

    wait = get

    @property
    def instance_status(self) -> str:
        """The status of the instance, ``PENDING`` for one that is not recorded yet."""
        instance = self._find()
        return str(Status.PENDING if instance is None else instance.status)

    def describe(self) -> Description:
        """Return what the instance is and has come to.  Raises ``UnknownInstance``."""
        instance = self._load()
        with self._orchestrator.store.read("describe") as connection:
            return describe(instance, instances.load_attributes(connection, self.id))

    def history(self, run: int | None = None) -> list[HistoryEntry]:
        """Return the records of a run (``None``: the present one) by ``seq``; an operator's own are below zero."""
        instance = self._load()
        number = instance.run if run is None else run
        with self._orchestrator.store.read("history") as connection:
            return [history_entry(row) for row in history.load_rows(connection, self.id, number)]

    def cancel(self, reason: str | None = None, *, terminate: bool = False) -> None:
        """Ask for the instance to be cancelled: ``WorkflowCancelled`` is raised where it waits, and undoes it.

        A step that has not begun is withdrawn, one under way is left to end (with ``terminate``: its process is ended),
        and is undone if it took or may have taken effect.  Twice is once.  Raises ``InvalidOperation`` for an instance
        that has ended otherwise, or is past its pivot.
        """
        self._orchestrator.lifecycle.cancel(self._load(), reason, terminate=terminate)

    def terminate(self, reason: str | None = None) -> None:
        """End the instance where it stands, and its children; nothing is undone."""
        self._orchestrator.lifecycle.terminate(self._load(), reason)

    def send(
        self,
        channel: str,
        message: Any,
        message_id: str | None = None,
        *,
        missing: Literal["raise", "ignore"] = "raise",
        session: CallersSession | None = None,
    ) -> bool:
        """Send a message to the instance; see ``Orchestrator.send``."""
        return self._orchestrator.send(
            self.id, channel, message, message_id=message_id, missing=missing, session=session
        )

    def resume(self) -> None:
        """Give a ``BLOCKED`` instance another try: its blocked steps another attempt, its code another pass."""
        self._orchestrator.lifecycle.resume(self._load())

    def fail_step(self, seq: int) -> None:
        """Let the blocked step ``seq`` raise in the workflow."""
        self._orchestrator.lifecycle.fail_step(self._load(), seq)

    def undo(self) -> None:
        """Run the compensations of a completed instance, last step first; twice is one undo.

        It ends ``COMPENSATED``, or ``COMPENSATION_FAILED`` with the list of what could not be undone.
        """
        self._orchestrator.lifecycle.undo(self._load())

    def fork(self, seq: int, instance_id: str | None = None, *, owns_compensations: bool = False) -> WorkflowHandle:
        """Begin a new instance that shares the history before record ``seq``, and goes on from there.

        What that history records is not run again.  The steps in it stay the matter of this instance: the new one does
        not undo them, unless ``owns_compensations`` is set, which only a ``TERMINATED`` instance allows.  Raises
        ``InvalidOperation`` where that history is not whole: a step in it had not settled when ``seq`` was asked for.
        """
        return self._orchestrator.forks.fork(self._load(), seq, instance_id, owns_compensations)

    def runs(self) -> list[RunEntry]:
        """Return the runs that have ended in ``recur``, the first one first."""
        self._load()
        with self._orchestrator.store.read("runs") as connection:
            return [run_entry(*row) for row in instances.list_runs(connection, self.id)]

    def retry_compensation(self, seq: int) -> None:
        """Run the compensation of step ``seq`` again, which failed or waits for its next attempt.

        When the last one that failed has succeeded, ``COMPENSATION_FAILED`` becomes ``COMPENSATED``.
        """
        self._orchestrator.operator.retry_compensation(self._load(), seq)

    def skip_compensation(self, seq: int, reason: str) -> None:
        """Take the compensation of step ``seq`` as dealt with by hand; ``reason`` is kept with its record."""
        self._orchestrator.operator.skip_compensation(self._load(), seq, reason)
