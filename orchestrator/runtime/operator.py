"""What a person does to an instance."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from orchestrator import codec, errors
from orchestrator.core.records import Failure, Kind, Outcome, State
from orchestrator.runtime import running, settling
from orchestrator.runtime.change import Change
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import Dispatcher
from orchestrator.runtime.recording import mail_to_undo
from orchestrator.store import history
from orchestrator.store.history import RELEASED, HistoryRow, StepKey
from orchestrator.store.instances import Instance

_PATIENCE_SECONDS = 10.0


class Operator:
    """Repeats and skips compensations."""

    def __init__(self, coordinator: Coordinator, dispatcher: Dispatcher) -> None:
        self.coordinator = coordinator
        self.dispatcher = dispatcher

    def retry_compensation(self, instance: Instance, seq: int) -> None:
        """Run a compensation again: now, if it waits for its next attempt; as a new record, if it has failed."""

        def prepare(connection: Connection, locked: Instance) -> Change:
            row = self._find_compensation(connection, locked, seq)
            if row.state is State.SCHEDULED and row.kind is Kind.COMPENSATION:
                return self.coordinator.schedule_again(row, {}, 0.0)
            self._check_failed(locked, row)
            return self._repeat(connection, locked, row)

        self._do(instance, "retry-compensation", prepare)

    def skip_compensation(self, instance: Instance, seq: int, reason: str) -> None:
        """Take a compensation as dealt with by hand."""
        if not reason.strip():
            raise errors.InvalidOperation("skip_compensation needs a reason; it is kept with the record")

        def prepare(connection: Connection, locked: Instance) -> Change:
            row = self._find_compensation(connection, locked, seq)
            resolution = {"resolution": f"skipped: {reason}"}
            if row.state in (State.SCHEDULED, State.HELD):
                failure = Failure("orchestrator.errors.CompensationSkipped", ("builtins.Exception",), reason)
                values = {**RELEASED, **resolution, "state": State.SETTLED}
                return self.coordinator.settle(
                    connection, locked, row, values, Outcome.FAILED, None, codec.dump(failure), makes_pass=False
                )
            self._check_failed(locked, row)
            change = Change(notes=[(row, resolution)])
            dealt_with = (row.run, row.seq)
            remaining = [e for e in settling.list_not_undone(locked) if (e.run, e.seq) != dealt_with]
            settling.settle_not_undone(locked, change, remaining)
            return change

        self._do(instance, "skip-compensation", prepare)

    def _do(self, instance: Instance, purpose: str, prepare: Callable[[Connection, Instance], Change]) -> None:
        running.refuse_inside_passes(f"{purpose.replace('-', '_')}()")
        outbox = self.coordinator.transact(purpose, instance.id, instance.generation, prepare, _PATIENCE_SECONDS)
        self.dispatcher.deliver(outbox)

    def _find_compensation(self, connection: Connection, instance: Instance, seq: int) -> HistoryRow:
        """Return the compensation recorded as ``seq``, or the one that undoes step ``seq``."""
        # of an earlier run, where only that one has something to be dealt with
        runs = {e.run for e in settling.list_not_undone(instance) if seq in (e.seq, e.undoes)}
        run = instance.run if instance.run in runs or len(runs) != 1 else runs.pop()
        key = StepKey(instance.id, instance.generation, run, seq)
        row = history.find_row(connection, key)
        if row is not None and row.kind not in (Kind.COMPENSATION, Kind.UNDO):
            row = history.find_undoing(connection, key)
        if row is None:
            raise errors.InvalidOperation(f"{instance.id} has no compensation {seq}, and none that undoes step {seq}")
        return row

    def _check_failed(self, instance: Instance, row: HistoryRow) -> None:
        where = f"compensation {row.seq} ({row.name}) of {row.instance_id}"
        if row.state is not State.SETTLED:
            raise errors.InvalidOperation(f"{where} is {row.state}; wait until its attempt has ended")
        # one that has succeeded is listed where an attempt that was given up took effect after it
        is_listed = any((e.run, e.seq) == (row.run, row.seq) for e in settling.list_not_undone(instance))
        if row.outcome is Outcome.SUCCEEDED and not is_listed:
            raise errors.InvalidOperation(f"{where} has succeeded")
        if row.resolution is not None:
            raise errors.InvalidOperation(f"{where} has been dealt with: {row.resolution}")

    def _repeat(self, connection: Connection, instance: Instance, row: HistoryRow) -> Change:
        rows = history.load_rows(connection, instance.id, row.run)
        repeated = [r for r in rows if r.seq < 0]
        if any(r.undoes == row.undoes and r.state is not State.SETTLED for r in repeated):
            raise errors.InvalidOperation(f"compensation {row.seq} of {instance.id} is being repeated already")
        # below zero: what an operator asked for is no part of what the workflow asked for, and no replay sees it
        seq = min([r.seq for r in repeated], default=0) - 1
        new = {
            "instance_id": instance.id,
            "generation": instance.generation,
            "run": row.run,
            "seq": seq,
            "kind": row.kind,
            "name": row.name,
            "scope": row.scope,
            "undoes": row.undoes,
            "after_order": instance.next_order - 1,
            "arguments": row.arguments,
            "options": row.options,
            "passes": row.passes,
            "retry": row.retry,
            "child_id": row.child_id,
            "scheduled_at": self.coordinator.clock(),
        }
        if row.kind is Kind.UNDO:
            new["state"] = State.SCHEDULED
            repeat = HistoryRow(**{**history.FRESH, **new})
            return Change(new_rows=[new], mail=[mail_to_undo(repeat)])
        new |= self.coordinator.first_dispatch(None, row.message_options)
        change = Change(new_rows=[new])
        if new["publications"]:
            change.outbox.steps.append(HistoryRow(**{**history.FRESH, **new}))
        return change
