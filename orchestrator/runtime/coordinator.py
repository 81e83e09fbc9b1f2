"""The coordinator: settles what attempts came to, in one transaction with the pass that follows.

What was committed is published afterwards, never before: a crash between the two leaves a record that the poller finds.
"""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from orchestrator import codec
from orchestrator.core.attempts import AttemptLost, AttemptSucceeded, Ended, Standing, judge, late_outcome
from orchestrator.core.records import Failure, Outcome, State
from orchestrator.errors import UnknownTask
from orchestrator.runtime import requests, settling
from orchestrator.runtime.change import Change, Outbox
from orchestrator.runtime.counting import count_off
from orchestrator.runtime.logs import about
from orchestrator.runtime.offering import Offer, take_up
from orchestrator.runtime.passes import earliest
from orchestrator.runtime.settlements import Settlements
from orchestrator.store import history, instances
from orchestrator.store.claiming import Held
from orchestrator.store.engine import is_transient
from orchestrator.store.history import RELEASED, HistoryRow, StepKey
from orchestrator.store.instances import Instance

logger = logging.getLogger("orchestrator")

#: The poller has other things to do, and comes back.
POLLER_PATIENCE_SECONDS = 1.0

#: So often a settlement is tried together with the pass that follows it; then it commits alone.
MOST_INLINE_PASSES = 2


class Coordinator(Settlements):
    """Settles steps, and what the clock makes of them."""

    def end_attempt(
        self,
        key: StepKey,
        attempt: int,
        ended: Ended,
        *,
        makes_pass: bool = True,
        offer: Offer | None = None,
        held: Held | None = None,
    ) -> tuple[bool, Outbox]:
        """Record how an attempt ended, in one transaction with the pass that follows if nothing else is waited for.

        Returns whether the attempt still held the claim; if it did not, what it came to is kept beside the outcome.
        ``makes_pass=False`` leaves the pass to be made elsewhere (the poller runs no workflow code).  ``offer``: the
        next step may be claimed in the same commit.  ``held``: the step as it was claimed, with its instance, of which
        nothing is read again where that is as it was.
        """
        if held is not None and held.instance is None and isinstance(ended, AttemptSucceeded):
            counted = count_off(self, held.row, ended)
            if counted is not None:
                return True, counted
        was_held, is_inline, passes = False, makes_pass, 0
        prepared: Outbox | None = None
        known = None if held is None else held.instance

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            nonlocal is_inline, passes, prepared
            if offer is not None:
                offer.withdraw()  # what an earlier try announced was rolled back
            change = end(connection, instance)
            if offer is not None and change is not None:
                take_up(change, offer, max(self.clock(), instance.last_at))
            prepared = None if change is None else change.outbox
            passes += change is not None and change.has_pass
            # one that takes longer than what happens to its instance meanwhile would conflict with all of it
            is_inline = is_inline and passes < MOST_INLINE_PASSES
            return change

        def end(connection: Connection, instance: Instance) -> Change | None:
            nonlocal was_held
            row = held.row if held is not None and instance is known else history.find_row(connection, key)
            if row is None:
                return None
            was_held = _is_held(row, attempt)
            if not was_held:
                return settling.note_stray(connection, instance, row, attempt, ended, self.clock())
            if row.state is State.TIMED_OUT:
                return self._end_late(connection, instance, row, ended, is_inline)
            return self._end(connection, instance, row, ended, is_inline)

        def settle_alone(error: BaseException) -> None:
            nonlocal is_inline
            if is_inline:
                alone = "%s: the pass after step %d is made by itself: %r"
                logger.warning(alone, key.instance_id, key.seq, error, extra=about(key, attempt))
            is_inline = False

        def transact() -> Outbox:
            return self.transact(
                "settle",
                key.instance_id,
                key.generation,
                prepare,
                on_error=settle_alone,
                decides=lambda: is_inline,
                look=None if known is None else lambda _connection: known,
            )

        try:
            outbox = transact()
        except Exception as error:
            if not makes_pass or is_transient(error):
                raise
            # what the step came to must not be hostage to the pass that follows it
            outbox = transact()
        # where a later try finds that the instance is gone, what an earlier one prepared was not written
        return was_held and outbox is prepared, outbox

    def end_inside(self, connection: Connection, key: StepKey, attempt: int, ended: Ended) -> Change | None:
        """Write how an attempt ended into the transaction of its own body; ``None``: it holds the claim no longer.

        The pass is left owed: workflow code must not make the locks of a body last longer.
        """
        instance = instances.lock_instance(connection, key.instance_id)
        row = history.find_row(connection, key)
        if instance is None or instance.generation != key.generation or row is None or not _is_held(row, attempt):
            return None
        end = self._end_late if row.state is State.TIMED_OUT else self._end
        change = end(connection, instance, row, ended, False)
        self._write(connection, instance, change)
        return change

    @staticmethod
    def is_held(connection: Connection, key: StepKey, attempt: int) -> bool:
        """Tell whether an attempt holds its claim."""
        row = history.find_row(connection, key)
        return row is not None and _is_held(row, attempt)

    def has_written(self, key: StepKey, change: Change) -> bool:
        """Tell whether a change took effect to whose COMMIT no answer came."""
        with self.store.begin("read-back") as connection:
            # the lock first: the server may be busy with that COMMIT still
            instance = instances.lock_instance(connection, key.instance_id)
            return instance is not None and settling.is_written(connection, instance, change)

    def end_foreign(self, key: StepKey, dispatch: int, ended: Ended) -> Outbox:
        """Settle a step that ran in a worker without this package, as its callbacks told; the first one counts."""

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            row = history.find_row(connection, key)
            if row is None or not row.is_foreign or row.dispatch != dispatch:
                return None
            if row.state is not State.SCHEDULED:
                return settling.note_stray(connection, instance, row, row.attempt, ended, self.clock())
            values = {"state": State.SETTLED, **RELEASED}
            if isinstance(ended, AttemptSucceeded):
                return self.settle(connection, instance, row, values, Outcome.SUCCEEDED, ended.result, None, True)
            failure = codec.dump(ended.failure)
            return self.settle(connection, instance, row, values, Outcome.UNKNOWN, None, failure, True)

        return self.transact("settle", key.instance_id, key.generation, prepare, decides=lambda: True)

    def _end(
        self, connection: Connection, instance: Instance, row: HistoryRow, ended: Ended, makes_pass: bool
    ) -> Change:
        now = self.clock()
        verdict = judge(_standing(row, now), ended, max_lost=self.settings.max_lost, chance=random.random())  # noqa: S311
        counters = {"failures": verdict.failures, "lost": verdict.lost, "is_in_doubt": verdict.is_in_doubt}
        is_late = row.state is State.RUNNING and row.is_timed_out  # past its timeout, which blocked the instance
        if verdict.outcome is None and is_late:
            verdict = replace(verdict, outcome=Outcome.UNKNOWN if verdict.is_in_doubt else Outcome.FAILED)
        if verdict.outcome is None:
            values = {**counters, "failure": codec.dump(verdict.failure)}
            if not isinstance(ended, AttemptLost):
                values["celery_retries"] = 0  # another attempt of ours has all of the task's own retries
            return self.schedule_again(row, values, verdict.delay_seconds)
        failure = codec.dump(verdict.failure) if verdict.failure else None
        values = {**counters, "state": State.SETTLED, **RELEASED}
        return self.settle(connection, instance, row, values, verdict.outcome, verdict.result, failure, makes_pass)

    def release(
        self, key: StepKey, attempt: int, *, delay_seconds: float, failure: Failure | None, values: dict[str, Any]
    ) -> tuple[bool, Outbox]:
        """Give a claim back for another attempt that the task itself asked for (Celery's ``retry``, ``Reject``).

        Returns ``False`` where the step is not to be tried again: it timed out, was revoked, or its scope drains.
        """
        released = False

        def prepare(connection: Connection, _instance: Instance) -> Change | None:
            nonlocal released
            row = history.find_row(connection, key)
            is_held = row is not None and row.state is State.RUNNING and row.attempt == attempt
            released = row is not None and is_held and not (row.is_draining or row.is_revoked or row.is_timed_out)
            if row is None or not released:
                return None
            told = {"failure": codec.dump(failure)} if failure is not None else {}
            return self.schedule_again(row, {**values, **told}, delay_seconds)

        outbox = self.transact("release", key.instance_id, key.generation, prepare)
        return released, outbox

    def _end_late(
        self, connection: Connection, instance: Instance, row: HistoryRow, ended: Ended, makes_pass: bool
    ) -> Change:
        """The attempt outlived the step's timeout: the outcome stands, what it came to is told beside it."""
        outcome = late_outcome(_standing(row, self.clock()), ended)
        values = {
            "state": State.SETTLED,
            "late_outcome": outcome,
            "late_result": getattr(ended, "result", None),
            "late_order": instance.next_order,
            "late_at": max(self.clock(), instance.last_at),
            **RELEASED,
        }
        return self._settled(connection, instance, row, values, makes_pass, is_closed=True)

    # --- what the clock brings ------------------------------------------------------------------------------------

    def time_out(self, key: StepKey) -> Outbox:
        """Settle a step whose timeout or expiry has passed; do nothing if it is not due."""

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            row = history.find_row(connection, key)
            if row is None or row.due_at is None:
                return None
            if instance.status.is_final and row.seq >= 0:
                # its end left this attempt or child alone; were it to stay due, it would keep others from their turn
                values = {"timeout_at": None, "expires_at": None, "due_at": row.publish_at}
                return Change(rows={row.seq: (row, values)})
            due = settling.settle_by_clock(row, self.clock())
            if due is None:
                return None
            values, outcome, failure = due
            return self.settle(connection, instance, row, values, outcome, None, failure, makes_pass=False)

        return self.transact("time-out", key.instance_id, key.generation, prepare, POLLER_PATIENCE_SECONDS)

    def pass_deadline(self, instance_id: str, generation: str) -> Outbox:
        """Cancel an instance whose deadline has passed."""

        def prepare(_connection: Connection, instance: Instance) -> Change | None:
            if instance.deadline_at is None or instance.deadline_at > self.clock():
                return None
            change = Change()
            requests.pass_deadline(self, instance, change)
            return change

        return self.transact("deadline", instance_id, generation, prepare, POLLER_PATIENCE_SECONDS)

    def give_up_publishing(self, row: HistoryRow, failure: Failure) -> Outbox:
        """Settle a step that was published time and again, and never claimed."""

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            current = history.find_row(connection, row.key)
            if current is None or (current.state, current.dispatch) != (State.SCHEDULED, row.dispatch):
                return None
            # its message may have killed whoever took it, after the body began or before
            values = {"state": State.SETTLED, **RELEASED}
            text = codec.dump(failure)
            return self.settle(connection, instance, current, values, Outcome.UNKNOWN, None, text, makes_pass=False)

        return self.transact("give-up", row.instance_id, row.generation, prepare, POLLER_PATIENCE_SECONDS)

    def pass_on(self, key: StepKey, dispatch: int) -> Outbox:
        """A worker that does not know the task took the step's message: another may, so it is published again."""

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            row = history.find_row(connection, key)
            if row is None or (row.state, row.dispatch) != (State.SCHEDULED, dispatch):
                return None
            if row.publications >= self.settings.max_publications:
                text = codec.dump(codec.describe_error(UnknownTask(row.name)))
                values = {"state": State.SETTLED, **RELEASED}
                outcome = settling.outcome_unbegun(row)
                return self.settle(connection, instance, row, values, outcome, None, text, makes_pass=False)
            publish_at = self.later(self.settings.poll_interval * row.publications)
            change = Change()
            due_at = earliest(publish_at, row.timeout_at, row.expires_at)
            change.change_row(row, {"publish_at": publish_at, "due_at": due_at})
            return change

        return self.transact("pass-on", key.instance_id, key.generation, prepare, POLLER_PATIENCE_SECONDS)


def _is_held(row: HistoryRow, attempt: int) -> bool:
    return row.attempt == attempt and row.state in (State.RUNNING, State.TIMED_OUT)


def _standing(row: HistoryRow, now: datetime) -> Standing:
    elapsed = (now - row.scheduled_at).total_seconds()
    is_unwanted = row.is_draining or row.is_revoked
    return Standing(row.failures, row.lost, row.is_in_doubt, is_unwanted, row.retry_policy, elapsed)
