"""What the clock drives: timers, timeouts, lost steps, work that was never delivered.

Every worker runs one; they need no leader, because each piece of work is taken by a conditional UPDATE.  The poller
runs no workflow code: a pass that it makes due is published as a message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from billiard.exceptions import Terminated, TimeLimitExceeded
from kombu.exceptions import KombuError

from orchestrator.codec import describe_error
from orchestrator.core.attempts import AttemptDoubtful, AttemptLost, Ended
from orchestrator.core.records import Failure
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import HEADER, Dispatcher, read_header, task_id_of
from orchestrator.runtime.enqueuing import Enqueuer
from orchestrator.runtime.executing import Executing, Execution, is_alive, token_of
from orchestrator.runtime.finishing import Finisher
from orchestrator.runtime.logs import about
from orchestrator.runtime.mail import Postman
from orchestrator.runtime.observer import Observer
from orchestrator.runtime.observing import Observers
from orchestrator.runtime.publications import BATCH, EARLY_SECONDS, Publications, backoff_seconds
from orchestrator.runtime.retention import Retention
from orchestrator.runtime.timers import Timers
from orchestrator.store import due, instances, mailbox, workers
from orchestrator.store.due import HeldClaim
from orchestrator.store.engine import is_transient
from orchestrator.store.history import StepKey

if TYPE_CHECKING:
    from orchestrator.runtime.revoking import Revocations

logger = logging.getLogger("orchestrator")

#: Somebody may be waiting for a result that a backend was not there to take.
LONGEST_FINISH_SECONDS = 300.0
#: So many tasks whose processes were killed are remembered until their claims are given back.
MOST_KILLED = 1000
#: Whoever stops a worker kills it if it takes too long.
STOP_SECONDS = 5.0
FORGET_WORKERS_AFTER, FORGET_EVERY_SECONDS = timedelta(days=1), 3600.0


class Poller:
    """A thread of each worker."""

    def __init__(
        self,
        coordinator: Coordinator,
        dispatcher: Dispatcher,
        finisher: Finisher,
        executing: Executing,
        publications: Publications,
        postman: Postman,
        enqueuer: Enqueuer,
        observers: Observers,
        look_for_monitors: Callable[[], None],
        revocations: Revocations,
    ) -> None:
        self.coordinator = coordinator
        self.store = coordinator.store
        self.settings = coordinator.settings
        self.dispatcher = dispatcher
        self.finisher = finisher
        self.executing = executing
        self.publications = publications
        self.postman = postman
        self.enqueuer = enqueuer
        self.observers = observers
        self._look_for_monitors = look_for_monitors
        self.revocations = revocations
        self.timers = Timers(coordinator)
        self.observer = Observer(self.settings.heartbeat_limit)
        self.retention = Retention(coordinator.store, coordinator.settings, coordinator.clock)
        self._interval = min(self.settings.poll_interval, self.settings.heartbeat_limit / 5)
        self._suspects: dict[tuple[str, int], float] = {}
        self._forgot_at = time.monotonic()
        self._retried_at = self._handed_out_at = -EARLY_SECONDS
        self._unregistered: deque[tuple[StepKey, int]] = deque()
        self._killed: OrderedDict[str, Failure] = OrderedDict()
        self._stopping = False
        self._called = threading.Event()  # there is something to do before the next instant that the store knows of
        self._thread = threading.Thread(target=self._run, name="orchestrator-poller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End, and give back what pool processes left behind that were killed just now."""
        was_stopping, self._stopping = self._stopping, True
        self._called.set()
        if self._thread.is_alive():
            self._thread.join(timeout=min(STOP_SECONDS, self.settings.heartbeat_limit))
        if not was_stopping and not self._thread.is_alive():
            # others could do it too, but only this one knows which of them were killed on purpose
            self._do(self.give_back)

    def _run(self) -> None:
        parts: list[Callable[[], None]] = [
            self.look_for_monitors,
            self.settle_unregistered,
            self.revocations.settle_revoked,
            self.revocations.mark_revoked,
            self.revocations.send_dropped,
            self.retry_blocked,
            self.give_back,
            self.give_up_stale_workers,
            self.give_up_orphans,
            self.fire_timers,
            self.publish_fired,
            self.publications.settle_due_records,
            self.pass_deadlines,
            self.deliver_mail,
            self.hand_out_shared,
            self.publications.publish_early,
            self.publications.publish_owed_passes,
            self.enqueuer.publish_due,
            self.finish_ended,
            self.forget_old,
            self.retention.purge_expired,
        ]
        self.observers.deferred.begin()
        while True:
            self._called.wait(self._seconds_to_next())
            if self._stopping:
                return
            self._called.clear()
            for part in parts:
                self._do(part)

    @staticmethod
    def _do(part: Callable[[], None]) -> None:
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
            self.coordinator.instrumentation.note_due(None)
            return self._interval
        remaining = self._interval if moment is None else (moment - self.coordinator.clock()).total_seconds()
        self.coordinator.instrumentation.note_due(max(0.0, -remaining))
        return min(self._interval, max(0.02, remaining))

    def look_for_monitors(self) -> None:
        """Notice when a monitor asks for events, or for no more of them."""
        self._look_for_monitors()

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

    def note_revokes(self, task_ids: Iterable[str], terminate: bool) -> None:
        """Somebody revokes tasks, ours or others (Celery's ``revoke``)."""
        self.revocations.note(task_ids, terminate)
        self._called.set()

    def note_unmarked(self, task_id: str) -> None:
        """Celery would mark a task as revoked, which may be an instance (Celery's ``revoke``)."""
        self.revocations.note_unmarked(task_id)
        self._called.set()

    def note_revoked(
        self, sender: Any = None, request: Any = None, terminated: bool = False, expired: bool = False, **_kwargs: Any
    ) -> None:
        """A message was dropped, or a pool process killed, because of a revoke (Celery's ``task_revoked``)."""
        if terminated:
            self._note_killed(request.id, describe_error(Terminated("its task was revoked")))
        self.revocations.note_dropped(sender, request, is_killed=terminated, has_expired=expired)
        self._called.set()

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
        extra = about(claim.key, claim.attempt)
        logger.warning("step %d of %s lost an attempt: %s", claim.key.seq, claim.key.instance_id, reason, extra=extra)
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

    def finish_ended(self) -> None:
        """Pay what endings still owe to Celery."""
        now = self.coordinator.clock()
        with self.store.read("due-finishes") as connection:
            finishes = instances.list_due_finishes(connection, now, BATCH)
        for instance_id, generation, attempts, due_at in finishes:
            again = now + timedelta(seconds=min(backoff_seconds(self.settings, attempts), LONGEST_FINISH_SECONDS))
            with self.store.begin("finish") as connection:
                taken = instances.postpone_finish(connection, instance_id, generation, due_at, again)
            if taken:
                self.finisher.finish(instance_id, generation, is_repeated=True)

    def forget_old(self) -> None:
        """Forget incarnations that ended long ago, and notices that nobody wants."""
        if time.monotonic() - self._forgot_at < FORGET_EVERY_SECONDS:
            return
        self._forgot_at = time.monotonic()
        with self.store.begin("forget-workers") as connection:
            workers.forget_workers(connection, self.coordinator.clock() - FORGET_WORKERS_AFTER)
        self.observers.forget()
