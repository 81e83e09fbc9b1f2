"""What needs a person, or may wait for ever: why, and what mends it.

Every instance ends, is ``BLOCKED``, or waits for a message, for a step without a timeout, or for a queue that nobody
serves; this finds the latter ones, what could not be undone, and what cannot be delivered.  It changes nothing.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from orchestrator import codec, errors
from orchestrator.core.records import Failure, NotUndone, State
from orchestrator.runtime import liveness
from orchestrator.runtime.dispatch import task_id_of
from orchestrator.store import stuck
from orchestrator.store.history import StepKey
from orchestrator.store.instances import Status
from orchestrator.store.stuck import Crowd, WaitingInstance, WaitingRecord
from orchestrator.store.workers import Worker

if TYPE_CHECKING:
    from orchestrator.runtime.app import Orchestrator
    from orchestrator.runtime.parts import Parts

#: From so many failures on a compensation is told of, or when its next attempt is further away than this.
MOST_FAILURES, SOON = 3, timedelta(minutes=1)
#: What was tried so often did not fail by chance.
MOST_ATTEMPTS = 3
_CHILD_NOT_UNDONE = "orchestrator.errors.ChildNotUndone"


class Reason(StrEnum):
    """Why something does not go on."""

    BLOCKED_STEP = "blocked_step"
    BLOCKED_CODE = "blocked_code"
    BLOCKED_UNREGISTERED = "blocked_unregistered"
    BLOCKED_PASSES = "blocked_passes"
    NOT_UNDONE = "not_undone"
    COMPENSATION_RETRIED = "compensation_retried"
    NO_WORKER = "no_worker"
    QUEUE_UNSERVED = "queue_unserved"
    TASK_UNREGISTERED = "task_unregistered"
    WORKFLOW_UNSERVED = "workflow_unserved"
    PASS_UNMADE = "pass_unmade"  # noqa: S105
    MESSAGE_AWAITED = "message_awaited"
    ATTEMPT_LONG = "attempt_long"
    ATTEMPT_PAST_TIMEOUT = "attempt_past_timeout"
    END_UNTOLD = "end_untold"
    TASK_UNPUBLISHED = "task_unpublished"
    SIGNAL_UNTOLD = "signal_untold"


@dataclass(frozen=True, slots=True)
class Stuck:
    """Something that does not go on by itself, or not soon.

    ``why`` says in words what it waits for and what helps; ``mend`` is the command that mends it, as it follows
    ``celery -A app`` (empty: there is none).  Where it is not an instance that waits, ``instance_id`` is ``None``.
    """

    reason: Reason
    why: str
    mend: tuple[str, ...] = ()
    instance_id: str | None = None
    workflow: str | None = None
    status: Status | None = None
    run: int | None = None
    seq: int | None = None
    name: str | None = None
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class StuckReport:
    """What was found; ``is_complete`` tells whether there is no more of any kind than the limit let through."""

    findings: tuple[Stuck, ...]
    is_complete: bool


def find_stuck(
    orchestrator: Orchestrator,
    *,
    older_than: timedelta = timedelta(hours=1),
    workflow: str | None = None,
    limit: int = 100,
) -> StuckReport:
    """Find what needs a person or may wait for ever, at most ``limit`` of each kind.

    A wait for a message and an attempt without a timeout count when they are older than ``older_than``.  Raises
    ``InvalidOperation`` for a limit below 1.  Takes up to a fifth of the heartbeat limit longer where a worker may be
    dead.
    """
    if limit < 1:
        raise errors.InvalidOperation(f"the limit is {limit}; it is 1 or more")
    parts = orchestrator.current
    live = liveness.look(parts.store, parts.settings.heartbeat_limit).beating
    with parts.store.read("stuck") as connection:
        finder = _Finder(parts, connection, live, older_than, workflow, limit)
        kinds = [list(itertools.islice(kind, limit + 1)) for kind in finder.list_kinds()]
    findings = [found for kind in kinds for found in kind[:limit]]
    return StuckReport(tuple(findings), all(len(kind) <= limit for kind in kinds))


class _Finder:
    """One look at a store."""

    def __init__(
        self,
        parts: Parts,
        connection: Connection,
        live: Sequence[Worker],
        older_than: timedelta,
        workflow: str | None,
        limit: int,
    ) -> None:
        self.parts = parts
        self.connection = connection
        self.workflow = workflow
        # one more than is told: whether there are more is told as well
        self.limit = limit + 1
        self.now = parts.coordinator.clock()
        self.before = self.now - older_than
        self.live = live

    def list_kinds(self) -> list[Iterator[Stuck]]:
        kinds = [
            self.list_blocked(),
            self.list_not_undone(),
            self.list_retried(),
            self.list_unserved_steps(),
            self.list_unserved_passes(),
            self.list_unanswered(),
            self.list_long(),
        ]
        # these are nobody's in particular
        return [*kinds, self.list_undelivered()] if self.workflow is None else kinds

    # --- BLOCKED -----------------------------------------------------------------------------------------------------

    def list_blocked(self) -> Iterator[Stuck]:
        blocked = stuck.list_blocked_instances(self.connection, self.workflow, self.limit)
        steps = defaultdict(list)
        for record in stuck.list_blocked_records(self.connection, [each.id for each in blocked if each.blocked_steps]):
            steps[record.instance_id].append(record)
        for instance in blocked:
            # a finding for each, of which ``blocked`` has a line each; for its code it may be blocked besides
            for record in steps[instance.id]:
                yield self._blocked_step(instance, record)
            if instance.refused is not None or not steps[instance.id]:
                yield self._blocked_pass(instance)

    def _blocked_step(self, instance: WaitingInstance, record: WaitingRecord) -> Stuck:
        own = f"step {record.seq} ({record.name})"
        fails = f"fail-step {record.seq} lets it raise in the workflow"
        if record.state is State.RUNNING:
            why = f"{own} did not end in time, and an attempt of it goes on; wait, or resume to give it as much again"
        elif record.is_in_doubt:
            why = f"{own}: nobody can say whether it took effect{_said(record)}; find out, then resume to try again"
        else:
            why = f"{own} failed{_said(record)}; mend the cause, then resume to try again"
        parks = "its workflow parks what fails" if instance.parks else "its workflow is past its pivot, or this is it"
        why = f"{why}, or {fails} ({parks})"
        return Stuck(
            Reason.BLOCKED_STEP,
            why,
            ("orchestrator", "resume", instance.id),
            *_whose(instance),
            record.run,
            record.seq,
            record.name,
            instance.last_at,
        )

    def _blocked_pass(self, instance: WaitingInstance) -> Stuck:
        why = _first_line(instance.blocked) or "nobody noted why"
        mend: tuple[str, ...] = ("orchestrator", "resume", instance.id)
        if instance.refused is None:
            reason = Reason.BLOCKED_PASSES
        elif not any(instance.workflow in worker.workflows for worker in self.live):
            reason, mend = Reason.BLOCKED_UNREGISTERED, ("worker",)
        else:
            reason = Reason.BLOCKED_CODE
        return Stuck(reason, why, mend, *_whose(instance), since=instance.last_at)

    # --- compensations -----------------------------------------------------------------------------------------------

    def list_not_undone(self) -> Iterator[Stuck]:
        for instance in stuck.list_instances_not_undone(self.connection, self.workflow, self.limit):
            for entry in (NotUndone(**each) for each in json.loads(instance.not_undone or "[]")):
                is_child = entry.message.startswith(_CHILD_NOT_UNDONE)
                helps = "mend that one first, and then" if is_child else "mend the cause, and"
                why = (
                    f"{entry.name} did not undo step {entry.undoes}: {_first_line(entry.message)}; {helps} have it run "
                    "again, or undo it by hand and say so with skip-compensation"
                )
                mend = ("orchestrator", "retry-compensation", instance.id, str(entry.seq))
                yield Stuck(
                    Reason.NOT_UNDONE,
                    why,
                    mend,
                    *_whose(instance),
                    entry.run,
                    entry.seq,
                    entry.name,
                    instance.last_at,
                )

    def list_retried(self) -> Iterator[Stuck]:
        records = stuck.list_retried_compensations(
            self.connection, MOST_FAILURES, self.now + SOON, self.workflow, self.limit
        )
        for record in records:
            at = record.due_at.isoformat(timespec="seconds") if record.due_at else "once it is published"
            why = (
                f"compensation {record.seq} ({record.name}) has failed {_times(record.failures)}{_said(record)}; its "
                f"next attempt is at {at}: mend the cause, and have it run now"
            )
            mend = ("orchestrator", "retry-compensation", record.instance_id, str(record.seq))
            yield _of_record(Reason.COMPENSATION_RETRIED, why, mend, record)

    # --- what nobody serves ------------------------------------------------------------------------------------------

    def list_unserved_steps(self) -> Iterator[Stuck]:
        crowds = stuck.count_scheduled(self.connection, self.workflow, self.now)
        if crowds and not self.live:
            yield _no_worker(crowds, "step")
            return
        for crowd in crowds:
            queue = self._queue_of(crowd)
            found = self._unserved(crowd.name, queue)
            if found is None:
                continue
            reason, why, mend = found
            same = (crowd.name, crowd.options, self.workflow, self.now, self.limit)
            for record in stuck.list_scheduled(self.connection, *same):
                yield _of_record(reason, f"{record.kind} {record.seq} ({record.name}) {why}", mend, record)

    def _queue_of(self, crowd: Crowd) -> str | None:
        options = dict(codec.decode(crowd.options)) if crowd.options else {}
        return self.parts.dispatcher.workflow_queue(crowd.name, options)

    def _unserved(self, task: str, queue: str | None) -> tuple[Reason, str, tuple[str, ...]] | None:
        """Return why no live worker takes a task from its queue; ``None``: one does."""
        serving = [worker for worker in self.live if _consumes(worker, queue)]
        if any(task in worker.tasks for worker in serving):
            return None
        if not serving:
            why = f"waits in the queue {queue!r}, which no live worker serves; start one that does"
            return Reason.QUEUE_UNSERVED, why, ("worker", "--queues", queue or "celery")
        where = "" if queue is None else f" that serves the queue {queue!r}"
        why = f"waits for a worker{where} and has this task registered; deploy its code there"
        return Reason.TASK_UNREGISTERED, why, ()

    def list_unserved_passes(self) -> Iterator[Stuck]:
        crowds = stuck.count_owed_passes(self.connection, self.workflow, self.now)
        if crowds and not self.live:
            yield _no_worker(crowds, "instance")
            return
        most = self.parts.settings.max_publications
        for crowd in crowds:
            workflow, queue = crowd.name, crowd.options
            serves = any(workflow in w.workflows and _consumes(w, queue) for w in self.live)
            least = most if serves else 0
            owing = stuck.list_owing_passes(self.connection, workflow, queue, least, self.now, self.limit)
            for instance in owing:
                yield self._unmade(instance) if serves else self._unserved_pass(instance)

    def _unserved_pass(self, instance: WaitingInstance) -> Stuck:
        where = "" if instance.queue is None else f" and serves its queue {instance.queue!r}"
        why = f"no live worker has the workflow {instance.workflow}{where}; start one that does"
        mend = ("worker",) if instance.queue is None else ("worker", "--queues", instance.queue)
        return Stuck(Reason.WORKFLOW_UNSERVED, why, mend, *_whose(instance), since=instance.last_at)

    @staticmethod
    def _unmade(instance: WaitingInstance) -> Stuck:
        why = (
            f"the message for its next pass was published {instance.pass_publications} times, and no worker made the "
            f"pass; look into the log of those that serve {instance.queue or 'its queue'}"
        )
        return Stuck(Reason.PASS_UNMADE, why, (), *_whose(instance), since=instance.last_at)

    # --- what nothing ends -------------------------------------------------------------------------------------------

    def list_unanswered(self) -> Iterator[Stuck]:
        for record in stuck.list_unanswered_receives(self.connection, self.before, self.workflow, self.limit):
            why = f"waits without a timeout for a message on {record.name!r}; send it, or cancel the instance"
            mend = ("orchestrator", "send", record.instance_id, record.name, "MESSAGE")
            yield _of_record(Reason.MESSAGE_AWAITED, why, mend, record)

    def list_long(self) -> Iterator[Stuck]:
        for record in stuck.list_long_attempts(self.connection, self.before, self.workflow, self.limit):
            task_id = task_id_of(StepKey(record.instance_id, "", record.run, record.seq), record.dispatch)
            mend = ("control", "terminate", "SIGTERM", task_id)
            own = f"{record.kind} {record.seq} ({record.name})"
            if record.state is State.TIMED_OUT:
                why = (
                    f"{own} has timed out, and its attempt goes on; it is not undone before that has ended: wait for "
                    "it, or end its task"
                )
                yield _of_record(Reason.ATTEMPT_PAST_TIMEOUT, why, mend, record, record.started_at)
                continue
            why = f"{own} runs without a timeout; wait for it, or end its task, after which nobody knows what it did"
            yield _of_record(Reason.ATTEMPT_LONG, why, mend, record, record.started_at)

    # --- what cannot be delivered ------------------------------------------------------------------------------------

    def list_undelivered(self) -> Iterator[Stuck]:
        owner: str | None
        for row in stuck.list_undelivered(self.connection, MOST_ATTEMPTS, self.limit):
            match row.what:
                case "orchestrator_finish":
                    what = "what follows its end (callbacks, chain, chord, the result backend) could not be told"
                    reason, owner = Reason.END_UNTOLD, row.name
                case "orchestrator_outbox":
                    what = f"the enqueued task {row.name} could not be published"
                    reason, owner = Reason.TASK_UNPUBLISHED, None
                case _:
                    what = "a receiver of a signal about it failed, or did not come back"
                    reason, owner = Reason.SIGNAL_UNTOLD, row.name
            why = (
                f"{what}, {_times(row.attempts)}; workers go on trying, and log why it fails; doctor says whether the "
                "broker is there"
            )
            yield Stuck(reason, why, ("orchestrator", "doctor"), owner, since=row.since)


def _whose(instance: WaitingInstance) -> tuple[str, str, Status]:
    return instance.id, instance.workflow, instance.status


def _of_record(
    reason: Reason, why: str, mend: tuple[str, ...], record: WaitingRecord, since: datetime | None = None
) -> Stuck:
    return Stuck(
        reason,
        why,
        mend,
        record.instance_id,
        record.workflow,
        record.status,
        record.run,
        record.seq,
        record.name,
        since or record.scheduled_at,
    )


def _said(record: WaitingRecord) -> str:
    """Return what the last attempt of a record ended with, as it follows "failed"."""
    if not record.failure:
        return ""
    failure = codec.load(Failure, record.failure)
    return f", last with {failure.type}: {_first_line(failure.message)}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _no_worker(crowds: Iterable[Crowd], what: str) -> Stuck:
    waiting = list(crowds)
    count, since = sum(crowd.count for crowd in waiting), min(crowd.since for crowd in waiting)
    told = f"{count} {what}{'s wait' if count != 1 else ' waits'}"
    return Stuck(Reason.NO_WORKER, f"no worker is alive, and {told} for one", ("worker",), since=since)


def _consumes(worker: Worker, queue: str | None) -> bool:
    """Tell whether a worker takes messages from a queue, as far as it told when it began and routing is known here."""
    return queue is None or not worker.queues or queue in worker.queues


def _first_line(text: str | None) -> str:
    return next(iter((text or "").splitlines()), "")
