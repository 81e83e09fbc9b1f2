"""Hand-off: the process that settles a step runs the next one as well, without a message.

The commit that records the next step records it as claimed by this process.  The rules are those of the model in
``tests/protocol/handoff.py``: the step is announced to the worker's parent before that commit, beside the one that is
being settled; it is begun only under the incarnation that claimed it, and after a beat where the last one is old; a
worker that was asked to end hands nothing over; and what is not gone on with is announced no longer.

What the process was handed it runs when Celery has done all that it does for the task before, with Celery's tracer: so
with its signals, events and results.  What happens in a worker's main process does not happen, for there is no message.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.app.trace import trace_task

from orchestrator.core.records import Kind
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.claims import Claims
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import Dispatcher
from orchestrator.runtime.executing import token_of
from orchestrator.runtime.monitoring import Monitor
from orchestrator.runtime.offering import Offer
from orchestrator.runtime.settings import Settings
from orchestrator.store.claiming import Claimant, Held
from orchestrator.store.history import HistoryRow, StepKey

#: Options of a signature that are heeded where there is no message, or mean nothing there.
_HEEDED = {"headers", "ignore_result", "countdown", "eta", "expires", "queue", "exchange", "routing_key"}
_HEEDED |= {"priority", "delivery_mode", "serializer", "compression"}


@dataclass(slots=True)
class Burst:
    """What a process runs one after the other, and began with a message."""

    message_id: str  # of the task that it began with
    ends_at: float  # by the monotonic clock
    hostname: str | None
    is_running: bool = False
    handed: Held | None = None
    held: Held | None = None  # what was handed over, and is about to run


class _OfThread(threading.local):
    """Of the thread, not of its context variables: users run bodies in contexts of their own."""

    burst: Burst | None = None


_own = _OfThread()


class HandOff:
    """Offers this process for the next step, and runs it."""

    def __init__(
        self,
        app: Celery,
        settings: Settings,
        claims: Claims,
        coordinator: Coordinator,
        dispatcher: Dispatcher,
        monitor: Monitor,
    ) -> None:
        self.app = app
        self.settings = settings
        self.claims = claims
        self.executing = claims.state
        self.coordinator = coordinator
        self.dispatcher = dispatcher
        self.monitor = monitor
        self._has_limits: bool | None = None  # not known: nothing is handed over

    def begin(self, worker: Any) -> None:
        """Take over from a worker whether it was started with time limits; called before its pool forks.

        Pool processes that are spawned know nothing of it, and hand nothing over.
        """
        self._has_limits = bool(worker.time_limit or worker.soft_time_limit)

    # --- offering ---------------------------------------------------------------------------------------------------

    @contextmanager
    def offering(self, task: Any) -> Iterator[Offer | None]:
        """Give what the transaction is offered that ends what ``task`` runs; ``None`` where this process may not go on.

        What was announced and is not taken until the end of the block is announced no longer.
        """
        offer = self._make_offer(task)
        if offer is None:
            yield None
            return
        try:
            yield offer
        finally:
            burst = _own.burst
            if burst is None or burst.handed is None:
                offer.withdraw()

    def _make_offer(self, task: Any) -> Offer | None:
        if task is None or not self.settings.hand_off or self.executing.is_ending or self._has_limits is None:
            return None
        incarnation = self.executing.incarnation
        is_in_worker = self.executing.is_child or self.executing.is_worker
        if not is_in_worker or not incarnation or self._is_limited(task) or any(task.request.timelimit or ()):
            return None
        burst, now = self._find_burst(task.request), time.monotonic()
        if burst is None:
            request = task.request
            _own.burst = Burst(request.id, now + self.settings.hand_off_limit, request.hostname)
        elif burst.ends_at <= now:
            return None
        return Offer(Claimant(incarnation, os.getpid()), self.executing, self._may_run)

    def _find_burst(self, request: Any) -> Burst | None:
        """Return the burst that a request belongs to; one that Celery has never come back to is let go of."""
        burst = _own.burst
        if burst is None or burst.is_running or burst.message_id == request.id:
            return burst
        if burst.handed is not None:
            self.executing.end(token_of(burst.handed.row.key, burst.handed.row.dispatch))
        _own.burst = None
        return None

    def _is_limited(self, task: Any) -> bool:
        conf = self.app.conf
        limits = (task.time_limit, task.soft_time_limit, task.rate_limit, conf.task_time_limit)
        return bool(self._has_limits) or any(limits) or bool(conf.task_soft_time_limit)

    def _may_run(self, row: HistoryRow) -> bool:
        """Tell whether this worker would be sent the step, and nothing but a message could do what it asks for."""
        if row.kind not in (Kind.STEP, Kind.COMPENSATION) or row.is_foreign:
            return False
        task = self.app.tasks.get(row.name)
        if task is None or self._is_limited(task) or not _HEEDED.issuperset(row.message_options):
            return False
        return self.dispatcher.queue_of(row) in self.app.amqp.queues.consume_from

    # --- running ----------------------------------------------------------------------------------------------------

    def take(self, outbox: Outbox) -> None:
        """Run what was handed over when Celery has done with the task before."""
        burst = _own.burst
        if burst is not None:
            burst.handed = outbox.handed

    def find_held(self, key: StepKey, dispatch: int) -> Held | None:
        """Return the step that this process holds already, if that is the one."""
        burst = _own.burst
        held = None if burst is None else burst.held
        return held if held is not None and (held.row.key, held.row.dispatch) == (key, dispatch) else None

    def on_postrun(self, task_id: str | None = None, **_kwargs: Any) -> None:
        """Run what was handed over, one step after the other (Celery's ``task_postrun``)."""
        burst = _own.burst
        if burst is None or burst.is_running or burst.message_id != task_id:
            return
        burst.is_running = True
        try:
            while burst.handed is not None:
                held, burst.handed = burst.handed, None
                self._run(burst, held)
        finally:
            _own.burst = None

    def _run(self, burst: Burst, held: Held) -> None:
        row = held.row
        try:
            if self._may_begin(row):
                burst.held = held
                self._trace(row, burst.hostname)
        finally:
            burst.held = None
            self.executing.end(token_of(row.key, row.dispatch))

    def _may_begin(self, row: HistoryRow) -> bool:
        if self.executing.is_ending:
            released, outbox = self.coordinator.release(row.key, row.attempt, delay_seconds=0, failure=None, values={})
            self.dispatcher.deliver(outbox)
            if released:  # else it is not to be tried again: then it may as well be run
                return False
        # it may have been given up meanwhile, and run by another
        return self.claims.beat_first() and self.executing.incarnation == row.claim_incarnation

    def _trace(self, row: HistoryRow, hostname: str | None) -> None:
        task, request = self.app.tasks[row.name], self.dispatcher.request_of(row, hostname)
        self.monitor.tell_taken(request)
        _result, info, runtime, shown = trace_task(
            task, request["id"], request["args"], request["kwargs"], request, app=self.app
        )
        self.monitor.tell_done(request, info, runtime, shown)
