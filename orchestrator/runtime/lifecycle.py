"""What is asked of an instance from outside, as a whole: cancel, terminate, undo, resume, let a blocked step fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from orchestrator import errors
from orchestrator.core.calls.plans import name_child
from orchestrator.core.records import Kind, State
from orchestrator.runtime import blocking, requests, running, settling
from orchestrator.runtime.change import Change
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import Dispatcher, task_id_of
from orchestrator.store import history, instances
from orchestrator.store.history import RELEASED, HistoryRow, StepKey
from orchestrator.store.instances import Instance, Status

_PATIENCE_SECONDS = 10.0


class Lifecycle:
    """Changes the course of instances."""

    def __init__(self, coordinator: Coordinator, dispatcher: Dispatcher) -> None:
        self.coordinator = coordinator
        self.dispatcher = dispatcher

    def cancel(self, instance: Instance, reason: str | None, *, terminate: bool) -> None:
        """Ask for an instance to be cancelled; once is enough."""

        def prepare(_connection: Connection, locked: Instance) -> Change | None:
            requests.check_cancellable(locked)
            change = Change()
            requests.request_cancel(self.coordinator, locked, change, reason)
            return change if change.instance else None

        self._do(instance, "cancel", prepare)
        if terminate:
            self._revoke_running(instance)

    def _revoke_running(self, instance: Instance) -> None:
        """Have Celery end the processes of the steps that are under way; whether they took effect nobody can say."""
        with self.coordinator.store.read("running") as connection:
            rows = history.load_rows(connection, instance.id, instance.run)
        running = [task_id_of(row.key, row.dispatch) for row in rows if _is_running_step(row)]
        if running:
            self.dispatcher.app.control.revoke(running, terminate=True)

    def terminate(self, instance: Instance, reason: str | None) -> None:
        """End an instance where it stands, undoing nothing."""

        def prepare(connection: Connection, locked: Instance) -> Change | None:
            requests.check_terminable(locked)
            if locked.status is Status.TERMINATED:
                return None
            change = Change()
            requests.terminate(self.coordinator, connection, locked, change, reason)
            return change

        self._do(instance, "terminate", prepare)

    def undo(self, instance: Instance) -> None:
        """Have a completed instance run its compensations; once is enough."""

        def prepare(_connection: Connection, locked: Instance) -> Change | None:
            requests.check_undoable(locked)
            if locked.undo_order is not None:
                return None
            change = Change()
            requests.request_undo(self.coordinator, locked, change, None)
            return change

        self._do(instance, "undo", prepare)

    # --- blocked instances ----------------------------------------------------------------------------------------

    def resume(self, instance: Instance) -> None:
        """Give a blocked instance another try: its blocked steps another attempt, its code another pass."""
        was_blocked = False

        def prepare(connection: Connection, locked: Instance) -> Change | None:
            nonlocal was_blocked
            if was_blocked and locked.status is not Status.BLOCKED:
                return None  # the answer to the COMMIT before was lost: it has been resumed
            was_blocked = locked.status is Status.BLOCKED
            requests.check_blocked(locked)
            change = Change()
            is_for_code = blocking.is_blocked_for_code(locked)
            for row in history.list_blocked(connection, locked):
                if row.state is State.BLOCKED:
                    _check_clean(connection, row)
                    self._try_again(row, change)
                else:
                    self._wait_again(row, change)
            if is_for_code:
                change.instance.update(refused=None, pass_attempts=0)
                settling.owe_pass(locked, change, self.coordinator.later(self.coordinator.settings.publish_grace))
            change.instance.update(status=Status.RUNNING, blocked_steps=0, blocked=None)
            return change

        self._do(instance, "resume", prepare)

    def _try_again(self, row: HistoryRow, change: Change) -> None:
        # attempts are counted on, for they are the fence; what they have come to is a matter of the past
        values: dict[str, Any] = {"failures": 0, "lost": 0, "is_timed_out": False, "celery_retries": 0}
        values["is_revoked"] = False
        if row.timeout_seconds is not None:
            values["timeout_at"] = self.coordinator.later(row.timeout_seconds)
        if row.kind is Kind.CHILD:
            # the child that failed has ended: another attempt is another instance
            values["child_id"] = name_child(f"{row.child_id}.{row.dispatch + 1}")
        again = self.coordinator.schedule_again(row.changed(values), values, 0.0)
        change.rows[row.seq] = (row, again.rows[row.seq][1])
        change.outbox.extend(again.outbox)

    def _wait_again(self, row: HistoryRow, change: Change) -> None:
        """Give an attempt that goes on past its step's timeout as much time again."""
        timeout_at = None if row.timeout_seconds is None else self.coordinator.later(row.timeout_seconds)
        change.change_row(row, {"is_timed_out": False, "timeout_at": timeout_at, "due_at": timeout_at})

    def fail_step(self, instance: Instance, seq: int) -> None:
        """Let a blocked step raise in the workflow, as it would have without blocking."""

        def prepare(connection: Connection, locked: Instance) -> Change:
            key = StepKey(locked.id, locked.generation, locked.run, seq)
            row = history.find_row(connection, key)
            if row is None:
                raise errors.InvalidOperation(f"{locked.id} has no step {seq}")
            if not row.is_blocked:
                raise errors.InvalidOperation(
                    f"step {seq} ({row.name}) of {locked.id} is {row.state}; only a step that blocks can be failed"
                )
            is_alive = row.state is State.RUNNING
            values: dict[str, Any] = {"state": State.TIMED_OUT} if is_alive else {"state": State.SETTLED, **RELEASED}
            outcome = blocking.outcome_of(row)
            return self.coordinator.settle(
                connection, locked, row, values, outcome, None, row.failure, makes_pass=False, may_block=False
            )

        self._do(instance, "fail-step", prepare)

    def _do(self, instance: Instance, purpose: str, prepare: Callable[[Connection, Instance], Change | None]) -> None:
        running.refuse_inside_passes(f"{purpose.replace('-', '_')}()")
        outbox = self.coordinator.transact(purpose, instance.id, instance.generation, prepare, _PATIENCE_SECONDS)
        self.dispatcher.deliver(outbox)


def _check_clean(connection: Connection, row: HistoryRow) -> None:
    """Refuse to start another child while the one before it has left something behind that nobody would undo."""
    child = instances.find_instance(connection, row.child_id) if row.child_id is not None else None
    if child is not None and child.status in (Status.TERMINATED, Status.COMPENSATION_FAILED):
        raise errors.InvalidOperation(
            f"the child {child.id} of step {row.seq} is {child.status}: what it did would be forgotten; deal with its "
            f"compensations first, or let it raise with fail_step({row.seq})"
        )


def _is_running_step(row: HistoryRow) -> bool:
    is_running = row.state in (State.RUNNING, State.TIMED_OUT)
    return is_running and row.kind is Kind.STEP and not row.is_foreign
