"""Settlements: a record gets its outcome, is counted, and makes the pass that follows if it is time; or is tried again.

Of children, too: their end is an outcome of the record of their parent.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from orchestrator import codec
from orchestrator.core.records import Failure, Kind, Outcome, Role, State
from orchestrator.runtime import blocking, settling
from orchestrator.runtime.change import Change, Outbox, Report, StartedChild
from orchestrator.runtime.passes import Passes, earliest
from orchestrator.runtime.recording import mail_to_undo
from orchestrator.store import history
from orchestrator.store.history import RELEASED, HistoryRow, StepKey
from orchestrator.store.instances import Instance


class Settlements(Passes):
    """Gives records their outcomes."""

    def schedule_again(self, row: HistoryRow, values: dict[str, Any], delay_seconds: float) -> Change:
        """Another attempt follows: a new dispatch, which no older message can claim."""
        now = self.clock()
        is_now = delay_seconds <= 0
        publish_at = self._next_publication(now, row.is_foreign) if is_now else now + timedelta(seconds=delay_seconds)
        values = {
            **values,
            **RELEASED,
            "state": State.SCHEDULED,
            "dispatch": row.dispatch + 1,
            "publications": 1 if is_now else 0,
            "dispatched_at": now if is_now else None,
            "publish_at": publish_at,
            "due_at": earliest(publish_at, row.timeout_at),
        }
        change = Change()
        change.change_row(row, values)
        if is_now:
            change.outbox.steps.append(row.changed(values))
        return change

    def settle(
        self,
        connection: Connection,
        instance: Instance,
        row: HistoryRow,
        values: dict[str, Any],
        outcome: Outcome,
        result: str | None,
        failure: str | None,
        makes_pass: bool,
        *,
        may_block: bool = True,
    ) -> Change:
        """Give a record its outcome; where a failing step blocks its instance it is left unsettled instead."""
        if may_block and blocking.is_blocking(instance, row, outcome):
            return blocking.block(row, values, outcome, failure, history.list_blocked(connection, instance))
        values = {
            **values,
            "outcome": outcome,
            "result": result,
            "failure": failure,
            "settled_order": instance.next_order,
            "settled_at": max(self.clock(), instance.last_at),
        }
        if row.is_blocked:
            # of what is closed no attempt is alive: a scope that drains would wait for the end of one for ever
            values["is_timed_out"] = values["state"] is State.TIMED_OUT
        return self._settled(connection, instance, row, values, makes_pass, is_closed=values["state"] is State.SETTLED)

    def _settled(
        self,
        connection: Connection,
        instance: Instance,
        row: HistoryRow,
        values: dict[str, Any],
        makes_pass: bool,
        *,
        is_closed: bool,
    ) -> Change:
        """Write an event of the inbox: count it, let the map's next item go, and make the pass if it is time."""
        # of a child that its parent's run left behind: no replay will see it
        if row.run != instance.run and row.seq >= 0:
            return Change(rows={row.seq: (row, {**values, "settled_order": None, "late_order": None})})
        waiting = settling.count_down(instance, row, values, is_closed=is_closed)
        if waiting != instance.waiting:
            values["awaited"] = None
        settled = row.changed(values)
        change = Change()
        change.change_row(row, values)
        change.instance = {
            "next_order": instance.next_order + 1,
            "last_at": settled.late_at or settled.settled_at,
            "waiting": waiting,
        }
        if row.role is Role.PIVOT and settled.outcome is Outcome.SUCCEEDED:
            change.instance["is_past_pivot"] = True
        if row.is_blocked:
            blocking.release(instance, row, change, history.list_blocked(connection, instance))
        if settling.frees_place(instance, row, settled.outcome):
            held = history.find_held(connection, row)
            if held is not None:
                self.let_go(change, held)
        if row.seq < 0:
            settling.conclude_repair(connection, instance, change, settled)
        elif instance.may_pass and (
            (waiting == 0 and instance.waiting > 0) or settling.frees_cancellation(instance, settled)
        ):
            # after a lost attempt the pass is a message of its own: a pass that kills its process is then counted
            self.make_pass(connection, instance, change, inline=makes_pass and row.lost == 0)
        return change

    def let_go(self, change: Change, held: HistoryRow) -> None:
        """Dispatch a record that its map has held back."""
        if held.kind is Kind.UNDO:
            change.change_row(held, {"state": State.SCHEDULED})
            change.mail.append(mail_to_undo(held))
            return
        values = self.first_dispatch(held.timeout_seconds, held.message_options, is_foreign=held.is_foreign)
        change.change_row(held, values)
        if values["publications"]:
            change.outbox.steps.append(held.changed(values))

    # --- children -------------------------------------------------------------------------------------------------

    def settle_report(self, connection: Connection, parent: Instance, report: Report) -> Change | None:
        """Settle the record of a parent that waits for the end of a child, or of its undoing; once."""
        row = history.find_row(connection, report.key)
        if row is None or row.state not in (State.SCHEDULED, State.RUNNING, State.TIMED_OUT):
            return None
        if row.state is State.TIMED_OUT:
            values = {
                "state": State.SETTLED,
                "late_outcome": report.outcome,
                "late_result": report.result,
                "late_order": parent.next_order,
                "late_at": max(self.clock(), parent.last_at),
            }
            return self._settled(connection, parent, row, values, makes_pass=False, is_closed=True)
        values = {"state": State.SETTLED, **RELEASED}
        result = report.result if report.outcome is Outcome.SUCCEEDED else None
        return self.settle(connection, parent, row, values, report.outcome, result, report.failure, makes_pass=False)

    def start_child(self, key: StepKey, dispatch: int, queue: str | None) -> tuple[HistoryRow | None, Outbox]:
        """Begin the life of the child that a record asks for; ``None`` where it has begun, or is not to begin."""
        begun: HistoryRow | None = None

        def prepare(connection: Connection, _parent: Instance) -> Change | None:
            nonlocal begun
            begun = None
            row = history.find_row(connection, key)
            if row is None or (row.state, row.dispatch) != (State.SCHEDULED, dispatch):
                return None
            values = {
                "state": State.RUNNING,
                "attempt": row.attempt + 1,
                "started_at": self.clock(),
                **RELEASED,
                "due_at": row.timeout_at,
            }
            change = Change(started_child=StartedChild(row, queue))
            change.change_row(row, values)
            begun = row
            return change

        outbox = self.transact("start-child", key.instance_id, key.generation, prepare)
        return begun, outbox

    def end_child_unbegun(self, key: StepKey, failure: Failure) -> Outbox:
        """Settle a record whose child cannot be started."""

        def prepare(connection: Connection, parent: Instance) -> Change | None:
            row = history.find_row(connection, key)
            if row is None or row.state is not State.SCHEDULED:
                return None
            values = {"state": State.SETTLED, **RELEASED}
            text = codec.dump(failure)
            return self.settle(connection, parent, row, values, Outcome.FAILED, None, text, makes_pass=False)

        return self.transact("settle", key.instance_id, key.generation, prepare)

    def end_report(self, report: Report) -> Outbox:
        """Settle a parent's record without its child: that one does not exist any more."""
        return self.transact(
            "settle",
            report.key.instance_id,
            report.key.generation,
            lambda connection, parent: self.settle_report(connection, parent, report),
        )
