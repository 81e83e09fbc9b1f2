"""Celery's revoke: of an instance, which it cancels or terminates, and of a step's task, whose step it settles.

A revoke reaches every worker by broadcast, in the thread that takes its messages, which must not wait for a database:
the poller does what follows.  All of them do, so that whatever one has done the others must find done.  Celery itself
drops the messages that have a revoked id, for as long as a worker remembers it; what of ours must get through goes out
under another id.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from celery.worker.control import Panel
from kombu.exceptions import KombuError
from sqlalchemy import Connection

from orchestrator import codec, errors
from orchestrator.core.records import Failure, Kind, State
from orchestrator.runtime import marking, settling
from orchestrator.runtime.change import Change
from orchestrator.runtime.coordinator import POLLER_PATIENCE_SECONDS, Coordinator
from orchestrator.runtime.dispatch import HEADER, START_HEADER, Dispatcher, read_header, read_task_id
from orchestrator.runtime.inputs import is_workflow
from orchestrator.runtime.lifecycle import Lifecycle
from orchestrator.runtime.starter import Starter
from orchestrator.store import history, instances
from orchestrator.store.engine import is_transient
from orchestrator.store.history import RELEASED, HistoryRow, StepKey
from orchestrator.store.instances import Instance, Status

logger = logging.getLogger("orchestrator")

#: So many ids are looked up by one query.
BATCH = 200
REASON = "revoked"

Note = Callable[[Iterable[str], bool], None]
_told: weakref.WeakKeyDictionary[Any, Note] = weakref.WeakKeyDictionary()


def listen(app: Any, note: Note) -> None:
    """Tell ``note`` of the ids that workers of ``app`` in this process are asked to revoke, before Celery acts."""
    _told[app] = note
    _tell("revoke", terminates=False)
    _tell("terminate", terminates=True)  # it calls the other by its own name, not by the one that is registered


def _tell(command: str, *, terminates: bool) -> None:
    handler = Panel.data[command]
    if getattr(handler, "tells_orchestrator", False):
        return
    parameters = inspect.signature(handler)

    @functools.wraps(handler)
    def told(state: Any, *args: Any, **kwargs: Any) -> Any:
        note = _told.get(state.app)
        if note is not None:
            try:
                given = parameters.bind(state, *args, **kwargs).arguments
                task_ids = [each for each in maybe_list(given["task_id"]) or [] if isinstance(each, str)]
                note(task_ids, bool(given.get("terminate", terminates)))
            except Exception:  # what Celery does with a revoke must not depend on us
                logger.exception("a revoke could not be taken note of")
        return handler(marking.leaving_marks(state), *args, **kwargs)

    told.tells_orchestrator = True  # type: ignore[attr-defined]
    Panel.data[command] = told


@dataclass(frozen=True, slots=True)
class DroppedStart:
    """A start message that Celery dropped, or whose process it killed, because of a revoke."""

    task: Any
    request: Any
    is_killed: bool
    # by a stamp or because it expired: then no revoke has named the id
    is_unannounced: bool


class Revocations:
    """What a worker was told of revokes, until its poller has dealt with it."""

    def __init__(
        self, coordinator: Coordinator, lifecycle: Lifecycle, starter: Starter, dispatcher: Dispatcher
    ) -> None:
        self.coordinator = coordinator
        self.store = coordinator.store
        self.lifecycle = lifecycle
        self.starter = starter
        self.dispatcher = dispatcher
        self._revoked: deque[tuple[str, bool]] = deque()
        self._unmarked: deque[str] = deque()
        self._dropped_steps: deque[tuple[StepKey, int]] = deque()
        self._dropped_starts: deque[DroppedStart] = deque()

    def note(self, task_ids: Iterable[str], terminate: bool) -> None:
        """Take note of ids that somebody revokes; most of them may be none of ours."""
        self._revoked.extend((task_id, terminate) for task_id in task_ids)

    def note_unmarked(self, task_id: str) -> None:
        """Take note of an id that Celery would have marked as revoked."""
        self._unmarked.append(task_id)

    def note_dropped(self, task: Any, request: Any, *, is_killed: bool, has_expired: bool) -> None:
        """Take note of a message that Celery dropped, or whose process it killed."""
        header = getattr(request, HEADER, None)
        if header is not None and is_killed:
            # whatever killed it (a revoke by stamps names no id), nobody wants it to be tried again
            self.note([request.id], terminate=True)
        elif header is not None:
            self._dropped_steps.append(read_header(header))
        elif is_workflow(task):
            is_unannounced = has_expired or request.id not in worker_state.revoked
            self._dropped_starts.append(DroppedStart(task, request, is_killed, is_unannounced))

    # --- by the poller --------------------------------------------------------------------------------------------

    def settle_revoked(self) -> None:
        """Cancel or terminate the instances, and settle the steps, that somebody revoked."""
        for _ in range(-(-len(self._revoked) // BATCH)):
            noted = list(islice(self._revoked, BATCH))
            # looked at before the store is: what is recorded meanwhile is found the next time
            starting = {task_id for task_id, _ in noted if _is_starting(task_id)}
            found = self._find_named(task_id for task_id, _ in noted)
            for task_id, terminate in noted:
                is_left = task_id in starting and task_id not in found
                self._take_on(self._revoked, functools.partial(self._revoke, task_id, terminate, found))
                if is_left:
                    self._revoked.append((task_id, terminate))

    def mark_revoked(self) -> None:
        """Have the result backend say of what was revoked, and is no instance, what Celery would have it say.

        Of an instance it is told how it has ended, when it has.
        """
        while self._unmarked:
            noted = list(islice(self._unmarked, BATCH))
            with self.store.read("unmarked") as connection:
                found = instances.find_instances(connection, set(noted))
            for task_id in noted:
                if task_id not in found:
                    try:
                        marking.mark_revoked(self.dispatcher.app.backend, task_id)
                    except Exception as error:  # what was revoked stays revoked
                        logger.warning("the result backend could not be told that %s is revoked: %r", task_id, error)
                self._unmarked.popleft()

    def _find_named(self, task_ids: Iterable[str]) -> dict[str, Instance]:
        """Return the instances that are named by themselves, or by the ids of their steps."""
        named = set(task_ids)
        named |= {step[0] for task_id in named if (step := read_task_id(task_id)) is not None}
        with self.store.read("revoked") as connection:
            return instances.find_instances(connection, named)

    @staticmethod
    def _take_on(noted: deque[Any], do: Callable[[], None]) -> None:
        """Do what the first of ``noted`` asks for; it stays noted if the store or the broker is away."""
        try:
            do()
        except Exception as error:
            if is_transient(error) or isinstance(error, OSError | KombuError):
                raise
            logger.exception("a revoke could not be dealt with")
        noted.popleft()

    def _revoke(self, task_id: str, terminate: bool, found: dict[str, Instance]) -> None:
        step = read_task_id(task_id)
        if task_id in found:
            self._revoke_instance(found[task_id], terminate)
        elif step is not None and step[0] in found:
            self._revoke_step(found[step[0]], *step[1:])

    def _revoke_instance(self, instance: Instance, terminate: bool) -> None:
        is_done = instance.status.is_final or (instance.cancel_order is not None and not terminate)
        if is_done:
            return
        try:
            if terminate:
                self.lifecycle.terminate(instance, REASON)
            else:
                self.lifecycle.cancel(instance, REASON, terminate=False)
        except errors.InvalidOperation as error:
            logger.warning("a revoke changes nothing: %s", error)

    def _revoke_step(self, instance: Instance, run: int, seq: int, dispatch: int) -> None:
        key = StepKey(instance.id, instance.generation, run, seq)

        def prepare(connection: Connection, locked: Instance) -> Change | None:
            row = history.find_row(connection, key)
            # an older id names the same step: it is the one that is shown while the step waits for its next attempt
            if row is None or dispatch > row.dispatch:
                return None
            match row.kind:
                case Kind.STEP:
                    return self._withdraw(connection, locked, row)
                case Kind.COMPENSATION if row.dispatch == dispatch:
                    return self._shield(row)
                case _:
                    return None

        outbox = self.coordinator.transact(
            "revoke-step", instance.id, instance.generation, prepare, POLLER_PATIENCE_SECONDS
        )
        self.dispatcher.deliver(outbox)

    def _withdraw(self, connection: Connection, instance: Instance, row: HistoryRow) -> Change | None:
        """Settle a step that has not begun, or waits for another attempt; one that runs is not tried again."""
        change = Change()
        is_out = row.is_foreign and row.publications > 0  # nobody can say whether it has begun
        if row.state is State.RUNNING and not row.is_revoked:
            change.change_row(row, {"is_revoked": True})
            return change
        if row.state not in (State.HELD, State.SCHEDULED) or is_out:
            return None
        failure = row.failure
        if failure is None:
            failure = codec.dump(Failure("orchestrator.errors.StepWithdrawn", (), "it was revoked before it began"))
        values = {"state": State.SETTLED, **RELEASED}
        outcome = settling.outcome_unbegun(row)
        return self.coordinator.settle(connection, instance, row, values, outcome, None, failure, makes_pass=False)

    def _shield(self, row: HistoryRow) -> Change | None:
        """Send a compensation under another id: workers drop its message, and what it undoes must be undone."""
        if row.state is not State.SCHEDULED:
            return None
        logger.warning(
            "compensation %d (%s) of %s cannot be revoked, it goes on under another task id; handle.skip_compensation"
            "(%d, reason) takes it as dealt with",
            *(row.seq, row.name, row.instance_id, row.seq),
        )
        return self._send_again(row)

    def _send_again(self, row: HistoryRow) -> Change:
        seconds = 0.0
        if row.publications == 0 and row.publish_at is not None:  # it waits for its countdown
            seconds = max(0.0, (row.publish_at - self.coordinator.clock()).total_seconds())
        return self.coordinator.schedule_again(row, {}, seconds)

    def send_dropped(self) -> None:
        """Send again what Celery dropped though nobody revoked it: the id was revoked in an earlier life."""
        while self._dropped_steps:
            send = functools.partial(self._send_dropped_step, *self._dropped_steps[0])
            self._take_on(self._dropped_steps, send)
        while self._dropped_starts:
            begin = functools.partial(self._begin_dropped, self._dropped_starts[0])
            self._take_on(self._dropped_starts, begin)

    def _send_dropped_step(self, key: StepKey, dispatch: int) -> None:
        def prepare(connection: Connection, _instance: Instance) -> Change | None:
            row = history.find_row(connection, key)
            if row is None or (row.state, row.dispatch) != (State.SCHEDULED, dispatch):
                return None
            return self._send_again(row)

        outbox = self.coordinator.transact(
            "send-dropped", key.instance_id, key.generation, prepare, POLLER_PATIENCE_SECONDS
        )
        self.dispatcher.deliver(outbox)

    def _begin_dropped(self, dropped: DroppedStart) -> None:
        """Make the pass that a start message was for; without a record of it the instance ends here, unbegun."""
        request = dropped.request
        header = getattr(request, START_HEADER, None)
        with self.store.read("dropped-start") as connection:
            found = instances.find_instance(connection, request.id)
        if found is None:
            if header is None and not self._record_unbegun(dropped):
                # recorded a moment ago, by the process that was killed
                self.note([request.id], dropped.is_killed)
            return
        is_own = header is None or header["generation"] == found.generation
        if found.status is not Status.PENDING or not is_own:
            return
        if dropped.is_unannounced:
            self._revoke_instance(found, terminate=False)
        self.dispatcher.publish_advance(found.id, found.generation, found.queue)

    def _record_unbegun(self, dropped: DroppedStart) -> bool:
        why = "its start message was revoked, or expired, before it was recorded"
        if dropped.is_killed:
            failure = Failure("orchestrator.errors.WorkflowTerminated", ("builtins.Exception",), why)
            return self.starter.record_unbegun(dropped.task, dropped.request, Status.TERMINATED, failure)
        failure = codec.describe_error(errors.WorkflowCancelled(why))
        return self.starter.record_unbegun(dropped.task, dropped.request, Status.CANCELLED, failure)


def _is_starting(task_id: str) -> bool:
    """Tell whether this worker has the start message of a workflow that may not be recorded yet."""
    request = worker_state.requests.get(task_id)
    return request is not None and is_workflow(request.task)
