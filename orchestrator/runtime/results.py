"""What Celery's results say of instances and of their steps, read from the store.

Where an app has no result backend, ``StoreBackend`` takes the place of the one that says so: a plain ``AsyncResult`` of
an instance, or of one of its steps, then answers as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery import Celery, states
from celery.backends.base import BaseBackend, DisabledBackend
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, assert_will_not_block

from orchestrator import codec, errors
from orchestrator.core.records import Failure, Kind, Outcome, State
from orchestrator.runtime import ending, running
from orchestrator.runtime.dispatch import read_task_id, task_id_of
from orchestrator.runtime.owner import orchestrator_of
from orchestrator.store import history
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status

if TYPE_CHECKING:
    from orchestrator.runtime.parts import Parts

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

_STATES_OF_STEPS = {Outcome.SUCCEEDED: "SUCCESS", Outcome.WITHDRAWN: "REVOKED"}

Meta = dict[str, Any]

#: Between two looks at the store this part of the time waited so far is let pass.
POLL_PART = 0.04


def describe_instance(instance: Instance, decode: Callable[[Instance], Any]) -> Meta:
    """Return what a result backend would hold of an instance."""
    result: Any = None
    if instance.status is Status.COMPLETED:
        result = decode(instance)
    elif instance.status in ending.REVOKED:
        result = TaskRevokedError(str(ending.failure_of(instance)))
    elif instance.status.is_final:
        result = ending.failure_of(instance)
    return _meta(CELERY_STATES[instance.status], result, instance.workflow, instance.ended_at)


def describe_step(row: HistoryRow) -> Meta:
    """Return what a result backend would hold of a step, or of a compensation."""
    if row.state is not State.SETTLED and row.state is not State.TIMED_OUT:
        has_begun = row.attempt > 0 and row.state is State.RUNNING
        return _meta("STARTED" if has_begun else "PENDING", None, row.name, None)
    assert row.outcome is not None
    state = _STATES_OF_STEPS.get(row.outcome, "FAILURE")
    result: Any = None
    if row.outcome is Outcome.SUCCEEDED:
        result = codec.decode(row.result or "null")
    elif row.outcome is Outcome.WITHDRAWN:
        result = TaskRevokedError("it never began")
    else:
        failure = codec.load(Failure, row.failure) if row.failure else Failure("builtins.Exception", (), "")
        result = errors.in_class_of(
            errors.StepUnknown if row.outcome is Outcome.UNKNOWN else errors.StepFailed,
            failure.type,
            failure.bases,
            seq=row.seq,
            name=row.name,
            outcome=str(row.outcome),
            message=failure.message,
            traceback=failure.traceback,
        )
    return _meta(state, result, row.name, row.settled_at)


def _meta(state: str, result: Any, name: str, date_done: datetime | None) -> Meta:
    traceback = getattr(result, "traceback", None)
    return {"status": state, "result": result, "traceback": traceback, "name": name, "date_done": date_done}


class StoreResult(AsyncResult):
    """A Celery result that reads the store, so that it needs no result backend."""

    poll_seconds = (0.002, 0.5)

    @property
    def _parts(self) -> Parts:
        return orchestrator_of(self.app).current

    def _find_meta(self) -> Meta | None:
        return find_meta(self._parts, self.id)

    def _get_task_meta(self) -> Meta:
        return self._find_meta() or self._ask_backend()

    def _ask_backend(self) -> Meta:
        """Return what Celery knows of a task that the store does not have: its message may be under way, or dropped."""
        if isinstance(self.backend, DisabledBackend):
            return {"status": "PENDING", "result": None, "traceback": None, "children": []}
        meta: Meta = self.backend.get_task_meta(self.id)
        return meta

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        disable_sync_subtasks: bool = True,
        follow_parents: bool = True,
        callback: Callable[[str, Any], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        **_options: Any,
    ) -> Any:
        """Wait, at most ``timeout`` seconds, until the task has ended, and return its result or raise its error.

        Raises ``TaskRevokedError`` for one that was cancelled or terminated, the error of the one before it in a chain,
        and Celery's ``TimeoutError``.
        """
        running.refuse_inside_passes("get()", "run it as a child with ctx.run, or have it send a message")
        if disable_sync_subtasks:
            assert_will_not_block()
        self._parts.work_for(self.id)
        began_at = time.monotonic()
        deadline = None if timeout is None else began_at + timeout
        shortest, longest = (interval, interval) if interval else self.poll_seconds
        while True:
            meta = self._get_task_meta()
            if meta["status"] in states.READY_STATES:
                break
            if propagate and follow_parents and self.parent and not isinstance(self.backend, DisabledBackend):
                self._maybe_reraise_parent_error()
            if on_interval:
                on_interval()
            if deadline is not None and time.monotonic() >= deadline:
                raise CeleryTimeoutError(f"{self._describe_state(meta)} after {timeout} s")
            now = time.monotonic()
            pause = min(max(shortest, POLL_PART * (now - began_at)), longest)
            time.sleep(pause if deadline is None else min(pause, max(0.0, deadline - now)))
        result = meta["result"]
        if propagate and meta["status"] in states.PROPAGATE_STATES:
            raise result
        if callback is not None:
            callback(self.id, result)
        return result

    wait = get

    def _describe_state(self, meta: Meta) -> str:
        return f"{self.id} is {meta['status']}"

    def forget(self) -> None:
        """Have the result backend forget the result, if there is one; what is recorded stays until it is purged."""
        if not isinstance(self.backend, DisabledBackend):
            super().forget()


class StepResult(StoreResult):
    """The task of a step, or of a compensation."""


class StoreBackend(DisabledBackend):
    """What an app without a result backend has instead, once it has an orchestrator: nothing is kept but by the store.

    Instances and steps are found in it; any other id is refused as Celery does.
    """

    def get_task_meta(self, task_id: str, cache: bool = True) -> Meta:  # noqa: ARG002 - the store is the truth
        meta = find_meta(orchestrator_of(self.app).current, task_id)
        if meta is None:
            raise errors.ResultNotKept(task_id)
        return meta

    _get_task_meta_for = get_task_meta
    wait_for = BaseBackend.wait_for

    def get_state(self, task_id: str) -> str:
        return str(self.get_task_meta(task_id)["status"])

    get_status = get_state

    def get_result(self, task_id: str) -> Any:
        return self.get_task_meta(task_id)["result"]

    def get_traceback(self, task_id: str) -> Any:
        return self.get_task_meta(task_id)["traceback"]

    def forget(self, task_id: str) -> None:
        """Do nothing: what the store holds of an instance is history, and stays until it is purged."""


def install(app: Celery) -> None:
    """Let results of ``app`` that no backend keeps be read from the store."""
    name = f"{StoreBackend.__module__}:{StoreBackend.__name__}"
    app.loader.override_backends = {**app.loader.override_backends, "disabled": name}


def find_meta(own: Parts, task_id: str) -> Meta | None:
    """Return what is known of the instance, or of the step, that has the id of a task; ``None``: it is neither."""
    instance = own.find_instance(task_id)
    if instance is not None:
        meta = describe_instance(instance, own.decode_result)
        return {**meta, "children": list_children(own, instance)}
    row = find_step(own, task_id)
    return None if row is None else {**describe_step(row), "children": []}


def find_step(own: Parts, task_id: str) -> HistoryRow | None:
    """Return the record whose dispatch has the id of a task."""
    place = read_task_id(task_id)
    instance = None if place is None else own.find_instance(place[0])
    if place is None or instance is None:
        return None
    instance_id, run, seq, _dispatch = place
    key = history.StepKey(instance_id, instance.generation, run, seq)
    with own.store.read("find-step") as connection:
        return history.find_row(connection, key)


def list_children(own: Parts, instance: Instance) -> list[AsyncResult]:
    """Return the results of an instance's steps, compensations and children, by ``seq``."""
    from orchestrator.runtime.handle import WorkflowHandle

    with own.store.read("children") as connection:
        parts = history.list_parts(connection, instance.id, instance.run)
    app = own.app
    return [
        WorkflowHandle(part.child_id, app=app)
        if part.kind is Kind.CHILD and part.child_id is not None
        else StepResult(task_id_of(part.key, part.dispatch), app=app)
        for part in parts
    ]
