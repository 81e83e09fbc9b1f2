"""The coordinator: load, decide, commit, dispatch.  The only caller of ``decide()``.

Every change of an instance is one ``Change``: it is *prepared* from what was read, then *written*, in one transaction
that begins by locking the instance.  On SQLite, where a write transaction stops everybody else, it is prepared outside
of it, and the instance's version tells at the commit whether what was read still holds.

What was committed is published afterwards, never before: a crash between the two leaves a record that the poller finds.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import Connection

from orchestrator import codec
from orchestrator.core.attempts import AttemptSucceeded, Ended, Standing, judge, late_outcome
from orchestrator.core.records import Broken, Decision, Failure, Outcome, State
from orchestrator.errors import UnknownTask
from orchestrator.runtime import decisions, settling
from orchestrator.runtime.change import Change, Outbox, with_values
from orchestrator.runtime.settings import Settings
from orchestrator.store import history, instances, workers
from orchestrator.store.engine import Conflict, Store, is_transient
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Instance, Status
from orchestrator.store.workers import Worker

logger = logging.getLogger("orchestrator")

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Workflows(Protocol):
    """How the coordinator runs workflow code, where it is registered."""

    def knows(self, workflow: str) -> bool: ...

    def names(self) -> list[str]: ...

    def decide(self, instance: Instance, rows: list[HistoryRow]) -> Decision: ...


class Coordinator:
    """Settles steps and makes passes; ``workflows`` runs the code of those registered in this process."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        workflows: Workflows,
        incarnation: Callable[[], str],
        clock: Clock = utc_now,
    ) -> None:
        self.store = store
        self.settings = settings
        self.workflows = workflows
        self.incarnation = incarnation
        self.clock = clock

    # --- transactions ---------------------------------------------------------------------------------------------

    def transact(
        self,
        purpose: str,
        instance_id: str,
        generation: str,
        prepare: Callable[[Connection, Instance], Change | None],
        patience_seconds: float | None = None,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> Outbox:
        """Prepare and write a change of one instance; repeat both when anything it was built on has changed.

        ``on_error`` is told of what went wrong, if it was not merely that.
        """
        tried: Change | None = None

        def prepare_once(connection: Connection, instance: Instance) -> tuple[Change | None, Outbox]:
            nonlocal tried
            if tried is not None and settling.is_written(connection, instance, tried):
                # the answer to the COMMIT before was lost: all of it is in the store already
                return None, tried.outbox
            tried = prepare(connection, instance)
            return tried, Outbox()

        def once() -> Outbox:
            nonlocal tried
            try:
                return run()
            except Conflict:
                tried = None  # rolled back for certain: what looks like it was written by another
                raise
            except Exception as error:
                if on_error is not None:
                    on_error(error)
                raise

        def run() -> Outbox:
            if self.store.is_sqlite:
                return self._prepared_outside(purpose, instance_id, generation, prepare_once)
            with self.store.begin(purpose) as connection:
                instance = instances.lock_instance(connection, instance_id)
                if instance is None or instance.generation != generation:
                    return Outbox()
                change, outbox = prepare_once(connection, instance)
                return outbox if change is None else self._write(connection, instance, change)

        patience = self.settings.store_patience if patience_seconds is None else patience_seconds
        return self.store.retrying(once, patience_seconds=patience)

    def _prepared_outside(
        self,
        purpose: str,
        instance_id: str,
        generation: str,
        prepare: Callable[[Connection, Instance], tuple[Change | None, Outbox]],
    ) -> Outbox:
        with self.store.read(purpose) as connection:
            instance = instances.find_instance(connection, instance_id)
            if instance is None or instance.generation != generation:
                return Outbox()
            change, outbox = prepare(connection, instance)
        if change is None:
            return outbox
        with self.store.begin(purpose) as connection:
            locked = instances.lock_instance(connection, instance_id)
            if locked is None or (locked.generation, locked.version) != (generation, instance.version):
                raise Conflict
            return self._write(connection, locked, change)

    def _write(self, connection: Connection, instance: Instance, change: Change) -> Outbox:
        for row, values in change.rows.values():
            # a claim is taken without the instance's lock: whatever is written to a record names its state as read
            if not history.change_row(connection, row, values):
                raise Conflict
        for row, values in change.notes:
            history.note_on_row(connection, row, values)
        history.insert_rows(connection, change.new_rows)
        history.await_rows(connection, instance, change.instance.get("wait_number", instance.wait_number), change.wakes)
        instances.set_attributes(connection, instance.id, change.attributes)
        instances.update_instance(connection, instance, change.instance)
        if change.ends:
            instances.insert_finish(
                connection, instance.id, instance.generation, self.later(self.settings.publish_grace)
            )
        return change.outbox

    def later(self, seconds: float) -> datetime:
        return self.clock() + timedelta(seconds=seconds)

    # --- steps ----------------------------------------------------------------------------------------------------

    def end_attempt(self, key: StepKey, attempt: int, ended: Ended, *, makes_pass: bool = True) -> tuple[bool, Outbox]:
        """Record how an attempt ended, in one transaction with the pass that follows if nothing else is waited for.

        Returns whether the attempt still held the claim; if it did not, what it came to is kept beside the outcome.
        ``makes_pass=False`` leaves the pass to be made elsewhere (the poller runs no workflow code).
        """
        was_held, is_inline = False, makes_pass

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            nonlocal was_held
            row = history.find_row(connection, key)
            if row is None:
                return None
            was_held = row.attempt == attempt and row.state in (State.RUNNING, State.TIMED_OUT)
            if not was_held:
                return settling.note_stray(connection, instance, row, attempt, ended, self.clock())
            if row.state is State.TIMED_OUT:
                return self._end_late(connection, instance, row, ended, is_inline)
            return self._end(connection, instance, row, ended, is_inline)

        def settle_alone(error: BaseException) -> None:
            nonlocal is_inline
            if is_inline:
                logger.warning("%s: the pass after step %d is made by itself: %r", key.instance_id, key.seq, error)
            is_inline = False

        def transact() -> Outbox:
            return self.transact("settle", key.instance_id, key.generation, prepare, on_error=settle_alone)

        try:
            outbox = transact()
        except Exception as error:
            if not makes_pass or is_transient(error):
                raise
            # what the step came to must not be hostage to the pass that follows it
            outbox = transact()
        return was_held, outbox

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

        return self.transact("settle", key.instance_id, key.generation, prepare)

    def _end(
        self, connection: Connection, instance: Instance, row: HistoryRow, ended: Ended, makes_pass: bool
    ) -> Change:
        now = self.clock()
        verdict = judge(_standing(row, now), ended, max_lost=self.settings.max_lost, chance=random.random())  # noqa: S311
        counters = {"failures": verdict.failures, "lost": verdict.lost, "is_in_doubt": verdict.is_in_doubt}
        if verdict.outcome is None:
            values = {**counters, "failure": codec.dump(verdict.failure)}
            return self.schedule_again(row, values, verdict.delay_seconds)
        failure = codec.dump(verdict.failure) if verdict.failure else None
        values = {**counters, "state": State.SETTLED, **RELEASED}
        return self.settle(connection, instance, row, values, verdict.outcome, verdict.result, failure, makes_pass)

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
            "publish_at": publish_at,
            "due_at": earliest(publish_at, row.timeout_at),
        }
        change = Change()
        change.change_row(row, values)
        if is_now:
            change.outbox.steps.append(row.changed(values))
        return change

    def release(
        self, key: StepKey, attempt: int, *, delay_seconds: float, failure: Failure | None, values: dict[str, Any]
    ) -> tuple[bool, Outbox]:
        """Give a claim back for another attempt that the task itself asked for (Celery's ``retry``, ``Reject``).

        Returns ``False`` where the step is not to be tried again, because it timed out or its scope drains.
        """
        released = False

        def prepare(connection: Connection, _instance: Instance) -> Change | None:
            nonlocal released
            row = history.find_row(connection, key)
            released = row is not None and row.state is State.RUNNING and row.attempt == attempt and not row.is_draining
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
    ) -> Change:
        values = {
            **values,
            "outcome": outcome,
            "result": result,
            "failure": failure,
            "settled_order": instance.next_order,
            "settled_at": max(self.clock(), instance.last_at),
        }
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
        if settling.frees_place(instance, row, settled.outcome):
            held = history.find_held(connection, row)
            if held is not None:
                self._let_go(change, held)
        if row.seq < 0:
            settling.conclude_repair(connection, instance, change, settled)
        elif waiting == 0 and instance.waiting > 0 and instance.status in PASSING:
            # after a lost attempt the pass is a message of its own: a pass that kills its process is then counted
            self.make_pass(connection, instance, change, inline=makes_pass and row.lost == 0)
        return change

    def _let_go(self, change: Change, held: HistoryRow) -> None:
        values = self.first_dispatch(held.timeout_seconds, held.message_options, is_foreign=held.is_foreign)
        change.change_row(held, values)
        if values["publications"]:
            change.outbox.steps.append(held.changed(values))

    def first_dispatch(
        self, timeout_seconds: float | None, options: Mapping[str, Any], *, is_foreign: bool = False
    ) -> dict[str, Any]:
        """Return the columns of a record that may be claimed from now on, or from its countdown or eta."""
        now = self.clock()
        begins_at = now
        if options.get("eta") is not None:
            begins_at = options["eta"]
        elif options.get("countdown"):
            begins_at = now + timedelta(seconds=float(options["countdown"]))
        is_now = begins_at <= now
        publish_at = self._next_publication(now, is_foreign) if is_now else begins_at
        expires_at = _expiry(options.get("expires"), now)
        timeout_at = None if timeout_seconds is None else max(begins_at, now) + timedelta(seconds=timeout_seconds)
        return {
            "state": State.SCHEDULED,
            "publications": 1 if is_now else 0,
            "dispatched_at": now if is_now else None,
            "publish_at": publish_at,
            "expires_at": expires_at,
            "timeout_at": timeout_at,
            "due_at": earliest(publish_at, expires_at, timeout_at),
        }

    def _next_publication(self, now: datetime, is_foreign: bool) -> datetime | None:
        """Return when a message just published is doubted; that of a foreign step, which nobody claims, never is."""
        return None if is_foreign else now + timedelta(seconds=self.settings.publish_grace)

    # --- what the clock brings ------------------------------------------------------------------------------------

    def time_out(self, key: StepKey) -> Outbox:
        """Settle a step whose timeout or expiry has passed, or fire a timer; do nothing if it is not due."""

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            row = history.find_row(connection, key)
            if row is None or row.due_at is None or (instance.status.is_final and row.seq >= 0):
                return None
            due = settling.settle_by_clock(row, self.clock())
            if due is None:
                return None
            values, outcome, failure = due
            return self.settle(connection, instance, row, values, outcome, None, failure, makes_pass=False)

        return self.transact("time-out", key.instance_id, key.generation, prepare, POLLER_PATIENCE_SECONDS)

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

    # --- passes ---------------------------------------------------------------------------------------------------

    def make_pass(self, connection: Connection, instance: Instance, change: Change, *, inline: bool) -> None:
        """Decide on what ``change`` makes of the instance, and add what follows to it; or leave the pass owed."""
        if not inline or not self.workflows.knows(instance.workflow):
            settling.owe_pass(instance, change, self.later(self.settings.publish_grace))
            return
        rows = {row.seq: row for row in history.load_rows(connection, instance.id, instance.run)}
        for row, values in change.rows.values():
            rows[row.seq] = rows.get(row.seq, row).changed(values)
        seen = with_values(instance, change.instance)
        decision = self.workflows.decide(seen, list(rows.values()))
        decisions.apply_decision(self, connection, seen, rows, decision, change)

    def advance(self, instance_id: str, generation: str) -> Outbox:
        """Make the pass that an instance owes.  A second message for the same pass finds nothing to do."""
        begun = self._count_pass(instance_id, generation)
        if begun is None or begun.status is Status.BLOCKED:
            return Outbox()

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            if instance.pass_due_at is None or instance.status not in PASSING:
                return None
            change = Change()
            self.make_pass(connection, instance, change, inline=True)
            return change

        try:
            return self.transact("advance", instance_id, generation, prepare)
        except Exception as error:
            if is_transient(error):
                raise
            logger.exception("%s: what its pass decided cannot be written", instance_id)
            return self._refuse_for(instance_id, generation, error)

    def _refuse_for(self, instance_id: str, generation: str, error: Exception) -> Outbox:
        reason = settling.explain(Broken(codec.describe_error(error)))

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            if instance.pass_due_at is None or instance.status not in PASSING:
                return None
            change = Change()
            self.refuse(connection, instance, reason, change)
            return change

        return self.transact("refuse", instance_id, generation, prepare)

    def refuse(self, connection: Connection, instance: Instance, reason: str, change: Change) -> None:
        """The code of this incarnation does not match: let the others have their turn, block when all have refused."""
        refused = sorted({*self.list_refused(instance), self.incarnation()})
        change.instance.update(refused=json.dumps(refused), blocked=reason)
        serving = {w.incarnation for w in workers.list_workers(connection) if _serves(w, instance)}
        if serving - set(refused):
            # not published at once: this process would be the first to take the message
            change.instance.update(pass_due_at=self.later(self.settings.poll_interval), pass_publications=0)
        else:
            change.instance.update(status=Status.BLOCKED, pass_due_at=None)

    @staticmethod
    def list_refused(instance: Instance) -> list[str]:
        return list(json.loads(instance.refused)) if instance.refused else []

    def _count_pass(self, instance_id: str, generation: str) -> Instance | None:
        """Count a pass before it is made; at the cap the instance is blocked: running its code kills the process."""
        found: Instance | None = None

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            nonlocal found
            found = None
            is_owed = instance.pass_due_at is not None and instance.status in PASSING
            if not is_owed:
                return None
            change = Change()
            if not self.workflows.knows(instance.workflow):
                # the message came to a worker without the code: it is soon sent again, for another to take
                polls = max(1, instance.pass_publications)
                change.instance = {"pass_due_at": self.later(self.settings.poll_interval * polls)}
                return change
            if self.incarnation() in self.list_refused(instance):
                self.refuse(connection, instance, instance.blocked or "", change)
                return change
            cap = self.settings.max_pass_attempts
            if instance.pass_attempts >= cap and settling.may_be_passing(instance, self.clock()):
                return None
            change.instance = settling.count_attempt(instance, cap, self.later(self.settings.publish_grace))
            found = with_values(instance, change.instance)
            return change

        self.transact("count-pass", instance_id, generation, prepare)
        return found


#: The poller has other things to do, and comes back.
POLLER_PATIENCE_SECONDS = 1.0

#: The columns of a claim that is held no longer.
RELEASED: dict[str, Any] = {
    "claim_incarnation": None,
    "claim_process": None,
    "publish_at": None,
    "expires_at": None,
    "due_at": None,
}

#: The statuses in which passes are made.
PASSING = (Status.PENDING, Status.RUNNING, Status.COMPENSATING)


def earliest(*moments: datetime | None) -> datetime | None:
    return min((moment for moment in moments if moment is not None), default=None)


def _serves(worker: Worker, instance: Instance) -> bool:
    """Tell whether a worker has the workflow's code and is sent its passes."""
    has_code = instance.workflow in worker.workflows
    return has_code and (instance.queue is None or not worker.queues or instance.queue in worker.queues)


def _standing(row: HistoryRow, now: datetime) -> Standing:
    elapsed = (now - row.scheduled_at).total_seconds()
    return Standing(row.failures, row.lost, row.is_in_doubt, row.is_draining, row.retry_policy, elapsed)


def _expiry(expires: Any, now: datetime) -> datetime | None:
    if expires is None or isinstance(expires, datetime):
        return expires
    return now + timedelta(seconds=float(expires))
