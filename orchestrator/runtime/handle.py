"""The handle of an instance: a Celery result that reads the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from celery.result import AsyncResult

from orchestrator import errors
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
from orchestrator.runtime.results import StoreResult, describe_instance, list_children
from orchestrator.store import history, instances
from orchestrator.store.instances import Instance, Status

if TYPE_CHECKING:
    from orchestrator.runtime.callers import CallersSession


class WorkflowHandle(StoreResult):
    """An instance.  A Celery ``AsyncResult`` that reads the store, so that it needs no result backend."""

    def _find(self) -> Instance | None:
        return self._parts.find_instance(self.id)

    def _load(self) -> Instance:
        instance = self._find()
        if instance is None:
            raise errors.UnknownInstance(self.id)
        return instance

    def _find_meta(self) -> dict[str, Any] | None:
        instance = self._find()
        return None if instance is None else describe_instance(instance, self._parts.decode_result)

    @property
    def children(self) -> list[AsyncResult]:
        """Results of the steps and compensations of the present run, and handles of its children, by ``seq``."""
        instance = self._find()
        return [] if instance is None else list_children(self._parts, instance)

    def _describe_state(self, _meta: dict[str, Any]) -> str:
        instance = self._find()
        return f"instance {self.id} is {'not recorded yet' if instance is None else status_in_words(instance)}"

    @property
    def instance_status(self) -> str:
        """The status of the instance, ``PENDING`` for one that is not recorded yet."""
        instance = self._find()
        return str(Status.PENDING if instance is None else instance.status)

    def describe(self) -> Description:
        """Return what the instance is and has come to.  Raises ``UnknownInstance``."""
        instance = self._load()
        with self._parts.store.read("describe") as connection:
            return describe(self._parts.masks, instance, instances.load_attributes(connection, self.id))

    def history(
        self, run: int | None = None, *, from_seq: int | None = None, limit: int | None = None
    ) -> list[HistoryEntry]:
        """Return the records of a run (``None``: the present one) by ``seq``; an operator's own are below zero.

        Of a long history ``from_seq`` and ``limit`` ask for a part: at most ``limit`` records from that one on.
        """
        instance = self._load()
        number = instance.run if run is None else run
        masks = self._parts.masks
        with self._parts.store.read("history") as connection:
            rows = history.load_rows(connection, self.id, number, from_seq=from_seq, limit=limit)
            return [history_entry(masks, row) for row in rows]

    def cancel(self, reason: str | None = None, *, terminate: bool = False) -> None:
        """Ask for the instance to be cancelled: ``WorkflowCancelled`` is raised where it waits, and undoes it.

        A step that has not begun is withdrawn, one under way is left to end (with ``terminate``: its process is ended),
        and is undone if it took or may have taken effect.  Twice is once.  Raises ``InvalidOperation`` for an instance
        that has ended otherwise, or is past its pivot.
        """
        self._parts.lifecycle.cancel(self._load(), reason, terminate=terminate)

    def terminate(self, reason: str | None = None) -> None:
        """End the instance where it stands, and its children; nothing is undone."""
        self._parts.lifecycle.terminate(self._load(), reason)

    def revoke(
        self,
        connection: Any = None,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Cancel the instance, or with ``terminate`` terminate it, as Celery's name for it.

        When this returns it is recorded.  Like Celery's, it leaves alone what has ended.  One that no worker has
        recorded yet is revoked as any task is, by a broadcast to the workers that run, for which the other parameters
        are.  Raises ``InvalidOperation`` for an instance past its pivot, unless it is terminated.
        """
        instance = self._find()
        if instance is None:
            super().revoke(connection, terminate, signal, wait, timeout)
        elif not instance.status.is_final and terminate:
            self.terminate("revoked")
        elif not instance.status.is_final:
            self.cancel("revoked")

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
        return orchestrator_of(self.app).send(
            self.id, channel, message, message_id=message_id, missing=missing, session=session
        )

    def resume(self) -> None:
        """Give a ``BLOCKED`` instance another try: its blocked steps another attempt, its code another pass."""
        self._parts.lifecycle.resume(self._load())

    def fail_step(self, seq: int) -> None:
        """Let the blocked step ``seq`` raise in the workflow."""
        self._parts.lifecycle.fail_step(self._load(), seq)

    def undo(self) -> None:
        """Run the compensations of a completed instance, last step first; twice is one undo.

        It ends ``COMPENSATED``, or ``COMPENSATION_FAILED`` with the list of what could not be undone.
        """
        self._parts.lifecycle.undo(self._load())

    def fork(self, seq: int, instance_id: str | None = None, *, owns_compensations: bool = False) -> WorkflowHandle:
        """Begin a new instance that shares the history before record ``seq``, and goes on from there.

        What that history records is not run again.  The steps in it stay the matter of this instance: the new one does
        not undo them, unless ``owns_compensations`` is set, which only a ``TERMINATED`` instance allows.  Raises
        ``InvalidOperation`` where that history is not whole: a step in it had not settled when ``seq`` was asked for.
        """
        return self._parts.forks.fork(self._load(), seq, instance_id, owns_compensations)

    def runs(self) -> list[RunEntry]:
        """Return the runs that have ended in ``recur``, the first one first."""
        workflow, masks = self._load().workflow, self._parts.masks
        with self._parts.store.read("runs") as connection:
            return [run_entry(masks, workflow, *row) for row in instances.list_runs(connection, self.id)]

    def retry_compensation(self, seq: int) -> None:
        """Run the compensation of step ``seq`` again, which failed or waits for its next attempt.

        When the last one that failed has succeeded, ``COMPENSATION_FAILED`` becomes ``COMPENSATED``, or ``CANCELLED``
        where a cancellation was what it was undone for.
        """
        self._parts.operator.retry_compensation(self._load(), seq)

    def skip_compensation(self, seq: int, reason: str) -> None:
        """Take the compensation of step ``seq`` as dealt with by hand; ``reason`` is kept with its record."""
        self._parts.operator.skip_compensation(self._load(), seq, reason)
