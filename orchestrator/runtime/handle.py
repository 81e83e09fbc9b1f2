"""The handle of an instance: a Celery result that reads the store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, assert_will_not_block

from orchestrator import codec, errors
from orchestrator.runtime import finishing, running
from orchestrator.runtime.descriptions import (
    Description,
    HistoryEntry,
    RunEntry,
    describe,
    history_entry,
    run_entry,
    status_in_words,
)
from orchestrator.runtime.owner import orchestrator_of
from orchestrator.store import history, instances
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
                state = "not recorded yet" if instance is None else status_in_words(instance)
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
