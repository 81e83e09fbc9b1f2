"""What the clock drives: timers, timeouts, lost steps, work that was never delivered.

Every worker runs one; they need no leader, because each piece of work is taken by a conditional UPDATE.  The poller
runs no workflow code: a pass that it makes due is published as a message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from billiard.exceptions import Terminated, TimeLimitExceeded
from kombu.exceptions import KombuError

from orchestrator.codec import describe_error
from orchestrator.core.attempts import AttemptDoubtful, AttemptLost, Ended
from orchestrator.core.records import Failure, Kind, State
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import HEADER, Dispatcher, read_header, task_id_of
from orchestrator.runtime.enqueuing import Enqueuer
from orchestrator.runtime.executing import Executing, Execution, is_alive, token_of
from orchestrator.runtime.finishing import Finisher
from orchestrator.runtime.mail import Postman
from orchestrator.runtime.observer import Observer
from orchestrator.runtime.passes import earliest
from orchestrator.runtime.queues import Queues
from orchestrator.runtime.retention import Retention
from orchestrator.runtime.timers import Timers
from orchestrator.store import due, history, instances, mailbox, workers
from orchestrator.store.due import DueRecord, HeldClaim
from orchestrator.store.engine import is_transient
from orchestrator.store.history import StepKey

logger = logging.getLogger("orchestrator")

#: How many records of each kind one poll takes on; a backlog is worked off without flooding the broker.
BATCH = 200
#: A lost publication is suspected after so long, if the queue is empty.
EARLY_SECONDS = 2.0
#: Between publications of one record: four times as long each, at most a day.
BACKOFF, LONGEST_SECONDS = 4, 86400.0
#: Somebody may be waiting for a result that a backend was not there to take.
LONGEST_FINISH_SECONDS = 300.0
#: So many tasks whose processes were killed are remembered until their claims are given back.
MOST_KILLED = 1000
FORGET_WORKERS_AFTER, FORGET_EVERY_SECONDS = timedelta(days=1), 3600.0


class Poller:
    """A thread of each worker."""

    def __init__(
        self,
        coordinator: Coordinator,
        dispatcher: Dispatcher,
        finisher: Finisher,
        executing: Executing,
        queues: Queues,
        postman: Postman,
        enqueuer: Enqueuer,
    ) -> None:
        self.coordinator = coordinator
        self.store = coordinator.store
        self.settings = coordinator.settings
        self.dispatcher = dispatcher
        self.finisher = finisher
        self.executing = executing
        self.queues = queues
        self.postman = postman
        self.enqueuer = enqueuer
        self.timers = Timers(coordinator)
        self.observer = Observer(self.settings.heartbeat_limit)
        self.retention = Retention(coordinator.store, coordinator.settings, coordinator.clock)
        self._interval = min(self.settings.poll_interval, self.settings.heartbeat_limit / 5)
        self._suspects: dict[tuple[str, int], float] = {}
        self._early_at = self._forgot_at = time.monotonic()
        self._retried_at = self._handed_out_at = -EARLY_SECONDS
        self._unregistered: deque[tuple[StepKey, int]] = deque()
        self._killed: OrderedDict[str, Failure] = OrderedDict()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="orchestrator-poller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.settings.heartbeat_limit)

    def _run(self) -> None:
        parts: list[Callable[[], None]] = [
            self.settle_unregistered,
            self.retry_blocked,
            self.give_back,
            self.give_up_stale_workers,
            self.give_up_orphans,
            self.fire_timers,
            self.publish_fired,
            self.settle_due_records,
            self.pass_deadlines,
            self.deliver_mail,
            self.hand_out_shared,
            self.publish_early,
            self.publish_owed_passes,
            self.enqueuer.publish_due,
            self.finish_ended,
            self.forget_workers,
            self.retention.purge_expired,
        ]
        while not self._stopping.wait(self._seconds_to_next()):
            for part in parts:
                try:
                    part()
                except Exception as error:  # whatever it is, the rest of the poller's work must go on
                    expected = is_transient(error) or isinstance(error, OSError | KombuError)
                    level = logging.WARNING if expected else logging.ERROR
                    logger.log(level, "%s: will be tried again: %r", part.__name__, error, exc_info=not expected)

    def _seconds_to_next(self) -> float:
        """Sleep until something is due, or for the poll interval."""
        if self.timers.has_unpublished:
            return 0.0
        try:
            with self.store.read("next-due") as connection:
                moment = due.find_next_due(connection)
        except Exception:  # the thread must not end: the parts will say what is wrong
            return self._interval
        if moment is None:
            return self._interval
        remaining = (moment - self.coordinator.clock()).total_seconds()
        return min(self._interval, max(0.02, remaining))

    # --- what other threads tell --------------------------------------------------------------------------------

    def retry_blocked(self) -> None:
        """Try the code of this incarnation on instances that are blocked because no code matched so far.

        Not only once, when it begins: others may have blocked an instance knowing nothing of this worker yet.
        """
        incarnation = self.executing.incarnation
        if not incarnation or time.monotonic() - self._retried_at < EARLY_SECONDS:
            return
        self._retried_at = time.monotonic()
        with self.store.begin("retry-blocked") as connection:
            names = self.coordinator.workflows.names()
            instances.owe_blocked_passes(connection, names, incarnation, self.coordinator.clock())

    def note_unregistered(self, message: Any = None, **_kwargs: Any) -> None:
        """A step's message came to this worker, which does not know its task (Celery's ``task_unknown``)."""
        header = message.headers.get(HEADER) if message is not None else None
        if header is not None:
            self._unregistered.append(read_header(header))

    def note_failure(self, task_id: str = "", exception: object = None, **_kwargs: Any) -> None:
        """A pool process is about to be killed, because its task took too long (Celery's ``task_failure``)."""
        if isinstance(exception, TimeLimitExceeded):
            self._note_killed(task_id, describe_error(exception))

    def note_revoked(self, request: Any = None, terminated: bool = False, **_kwargs: Any) -> None:
        """A pool process was killed by ``revoke(terminate=True)`` (Celery's ``task_revoked``)."""
        if terminated:
            self._note_killed(request.id, describe_error(Terminated("its task was revoked")))

    def _note_killed(self, task_id: str, failure: Failure) -> None:
        self._killed[task_id] = failure
        if len(self._killed) > MOST_KILLED:  # most of them may be no steps
            self._killed.popitem(last=False)

    def settle_unregistered(self) -> None:
        """Let another worker have the step, a few times; then it is settled: no worker there knows its task."""
        while self._unregistered:
            key, dispatch = self._unregistered[0]
            self.dispatcher.deliver(self.coordinator.pass_on(key, dispatch))
            self._unregistered.popleft()

    # --- claims whose holder is gone ------------------------------------------------------------------------------

    def give_back(self) -> None:
        """Give back what is claimed under this worker's incarnation and no process of it executes."""
        incarnation = self.executing.incarnation
        if not incarnation:
            return
        # claims first, executions afterwards: a claim that is in the store was announced before it was made
        with self.store.read("own-claims") as connection:
            claims = due.list_claims(connection, incarnation)
        executions = self.executing.list_executions() if claims else set()
        now, suspects = time.monotonic(), {}
        for claim in claims:
            process, attempt = claim.claimant.process, (claim.key.idempotency_key, claim.dispatch)
            if not is_alive(process):
                self._lose(claim, f"the pool process {process} ended")
            elif Execution(process, token_of(claim.key, claim.dispatch)) not in executions:
                # of a process that is alive it is believed only when it has been seen for as long as a beat takes
                suspects[attempt] = self._suspects.get(attempt, now)
                if now - suspects[attempt] >= self.settings.heartbeat_limit / 5:
                    self._lose(claim, f"process {process} no longer executes it")
        self._suspects = suspects

    def give_up_stale_workers(self) -> None:
        """Mark incarnations dead whose heartbeat stood still for the whole limit."""
        with self.store.read("beats") as connection:
            beats = workers.list_beats(connection)
        stale = self.observer.list_stale(beats, time.monotonic())
        for incarnation, beat in stale.items():
            if incarnation == self.executing.incarnation:
                continue
            with self.store.begin("give-up-worker") as connection:
                if workers.mark_dead(connection, incarnation, beat, self.coordinator.clock()):
                    logger.warning("worker incarnation %s is given up: its heartbeat stood still", incarnation)

    def give_up_orphans(self) -> None:
        """Give up what is claimed under incarnations that are dead."""
        with self.store.read("orphaned-claims") as connection:
            claims = due.list_orphaned_claims(connection, BATCH)
        for claim in claims:
            self._lose(claim, f"the worker that ran it is gone (incarnation {claim.claimant.incarnation})")

    def _lose(self, claim: HeldClaim, reason: str) -> None:
        logger.warning("step %d of %s lost an attempt: %s", claim.key.seq, claim.key.instance_id, reason)
        task_id = task_id_of(claim.key, claim.dispatch)
        killed = self._killed.get(task_id)
        ended: Ended
        if killed is not None:  # on purpose: by itself it is not run again
            ended = AttemptDoubtful(killed)
        else:
            ended = AttemptLost(Failure("orchestrator.errors.AttemptLost", ("builtins.Exception",), reason))
        _, outbox = self.coordinator.end_attempt(claim.key, claim.attempt, ended, makes_pass=False)
        self._killed.pop(task_id, None)
        self.dispatcher.deliver(outbox)

    # --- what is due ----------------------------------------------------------------------------------------------

    def fire_timers(self) -> None:
        """Fire the timers that are due."""
        self.timers.fire()

    def publish_fired(self) -> None:
        """Ring the bell for the passes that timers made due, but look for other timers before long."""
        self.timers.publish(self.dispatcher.publish_advance, self._interval / 2)

    def settle_due_records(self) -> None:
        """Settle what timed out or expired, publish what is to be claimed from now on."""
        now = self.coordinator.clock()
        with self.store.read("due-records") as connection:
            records = due.list_due_records(connection, now, BATCH)
        for record in records:
            moment = earliest(record.timeout_at, record.expires_at)
            if moment is not None and moment <= now:
                self.dispatcher.deliver(self.coordinator.time_out(record.key))
            elif record.state is State.SCHEDULED:
                self._publish(record)

    def _publish(self, record: DueRecord) -> None:
        with self.store.read("publish") as connection:
            row = history.find_row(connection, record.key)
        if row is None or row.state is not State.SCHEDULED or (row.is_foreign and row.publications > 0):
            return
        is_step = row.kind is not Kind.CHILD  # a child is started by whoever gets to it, not by a worker that claims it
        is_capped = is_step and row.publications >= self.settings.max_publications
        if is_capped and self.queues.is_empty(self.dispatcher.queue_of(row)):
            reason = f"its message was published {row.publications} times and never led to a claim"
            failure = Failure("orchestrator.errors.NeverClaimed", ("builtins.Exception",), reason)
            self.dispatcher.deliver(self.coordinator.give_up_publishing(row, failure))
            return
        now = self.coordinator.clock()
        again = now + timedelta(seconds=self._backoff(row.publications))
        due_at = earliest(again, row.timeout_at, row.expires_at)
        assert due_at is not None
        # the next time is committed first, and the message is published with no lock held
        with self.store.begin("publish") as connection:
            taken = due.postpone_publication(connection, row, again, due_at, row.dispatched_at or now)
        if not taken:
            return
        try:
            following = self.dispatcher.send_out(row)
        except (OSError, KombuError):
            # a broker that is away must not make it look as if the message came and was never claimed
            soon = now + timedelta(seconds=self.settings.publish_grace)
            with self.store.begin("publish") as connection:
                due.take_back_publication(connection, row, soon, earliest(soon, row.timeout_at, row.expires_at))
            raise
        if following is not None:
            self.dispatcher.deliver(following)

    def pass_deadlines(self) -> None:
        """Cancel what has not ended in time."""
        with self.store.read("deadlines") as connection:
            passed = instances.list_past_deadline(connection, self.coordinator.clock(), BATCH)
        for instance_id, generation in passed:
            self.dispatcher.deliver(self.coordinator.pass_deadline(instance_id, generation))

    def deliver_mail(self) -> None:
        """Tell instances of mail that nobody has told them of."""
        now = self.coordinator.clock()
        with self.store.read("due-mail") as connection:
            receivers = mailbox.list_due_receivers(connection, now, BATCH)
        for instance_id in receivers:
            self.dispatcher.deliver(self.postman.wake(instance_id))

    def hand_out_shared(self) -> None:
        """Give what subscribers compete for to those whose wait was overlooked when it was published."""
        if time.monotonic() - self._handed_out_at < EARLY_SECONDS:
            return
        self._handed_out_at = time.monotonic()
        self.dispatcher.deliver(self.postman.hand_out(None))

    def _backoff(self, publications: int) -> float:
        return float(min(LONGEST_SECONDS, self.settings.publish_grace * BACKOFF**publications))

    def publish_early(self) -> None:
        """Publish again before the grace has passed what should be in a queue that is empty."""
        if time.monotonic() - self._early_at < EARLY_SECONDS:
            return
        self._early_at = time.monotonic()
        now = self.coordinator.clock()
        grace = timedelta(seconds=self.settings.publish_grace)
        with self.store.read("unclaimed") as connection:
            rows = due.list_published_once(connection, now + grace - timedelta(seconds=EARLY_SECONDS), BATCH)
            owed = instances.list_owed_passes(connection, now + grace - timedelta(seconds=EARLY_SECONDS), BATCH)
        for row in rows:
            if self.queues.is_empty(self.dispatcher.queue_of(row)):
                self._publish(DueRecord(row.key, row.kind, row.state, None, None, None, now))
        for each in owed:
            if each.pass_publications <= 1 and self.queues.is_empty(each.queue):
                self._publish_pass(each)

    def publish_owed_passes(self) -> None:
        """Ring the bell again for passes that nobody made."""
        now = self.coordinator.clock()
        with self.store.read("owed-passes") as connection:
            owed = instances.list_owed_passes(connection, now, BATCH)
        for each in owed:
            self._publish_pass(each)

    def _publish_pass(self, owed: instances.OwedPass) -> None:
        again = self.coordinator.clock() + timedelta(seconds=self._backoff(owed.pass_publications))
        with self.store.begin("publish-pass") as connection:
            taken = instances.postpone_pass(connection, owed, again)
        if not taken:
            return
        try:
            self.dispatcher.republish_pass(owed)
        except (OSError, KombuError):
            soon = self.coordinator.clock() + timedelta(seconds=self.settings.publish_grace)
            with self.store.begin("publish-pass") as connection:
                instances.take_back_pass(connection, owed, again, soon)
            raise

    def finish_ended(self) -> None:
        """Pay what endings still owe to Celery."""
        now = self.coordinator.clock()
        with self.store.read("due-finishes") as connection:
            finishes = instances.list_due_finishes(connection, now, BATCH)
        for instance_id, generation, attempts, due_at in finishes:
            again = now + timedelta(seconds=min(self._backoff(attempts), LONGEST_FINISH_SECONDS))
            with self.store.begin("finish") as connection:
                taken = instances.postpone_finish(connection, instance_id, generation, due_at, again)
            if taken:
                self.finisher.finish(instance_id, generation)

    def forget_workers(self) -> None:
        """Forget incarnations that ended long ago."""
        if time.monotonic() - self._forgot_at < FORGET_EVERY_SECONDS:
            return
        self._forgot_at = time.monotonic()
        with self.store.begin("forget-workers") as connection:
            workers.forget_workers(connection, self.coordinator.clock() - FORGET_WORKERS_AFTER)
