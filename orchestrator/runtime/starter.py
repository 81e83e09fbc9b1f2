"""Starting instances: from the call, durable at once; or by the workflow's start task, once a worker recorded it."""

from __future__ import annotations

import functools
import logging
import secrets
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from celery.canvas import Signature
from kombu.exceptions import KombuError
from sqlalchemy import Connection, exc

from orchestrator import codec, errors
from orchestrator.core.records import Failure, Payload
from orchestrator.runtime import callers, kept, running
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import START_HEADER, Dispatcher
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.runtime.handoff import HandOff
from orchestrator.runtime.inputs import check_instance_id
from orchestrator.runtime.logs import about
from orchestrator.runtime.running import RegisteredWorkflows
from orchestrator.runtime.workflow import WorkflowTask
from orchestrator.store import instances, purging
from orchestrator.store.engine import is_transient
from orchestrator.store.instances import Instance, Status

if TYPE_CHECKING:
    from orchestrator.runtime.callers import CallersSession

logger = logging.getLogger("orchestrator")

#: How long a start task tries to reach the store before it gives its process back, and after how many poll intervals
#: it is sent again.
START_PATIENCE_SECONDS, START_DELAY_POLLS = 5.0, 10


class IfPurged(Enum):
    """What becomes of a start whose id was that of an instance that was purged."""

    FORGET = "the id is used again"
    REFUSE = "it comes too late, or again"
    CANNOT_BE = "nobody has to look: the id has been made just now"


class Purged(Exception):
    """The instance that a start task would begin was purged; its transaction is rolled back."""


@dataclass(frozen=True, slots=True)
class NewInstance:
    """What an instance begins with."""

    instance_id: str
    generation: str
    workflow: str
    queue: str | None
    arguments: Payload
    request: Payload
    begins_at: datetime | None = None
    expires_at: datetime | None = None


class Starter:
    """Records instances."""

    def __init__(
        self, coordinator: Coordinator, dispatcher: Dispatcher, workflows: RegisteredWorkflows, hand_off: HandOff
    ) -> None:
        self.coordinator = coordinator
        self.store = coordinator.store
        self.dispatcher = dispatcher
        self.workflows = workflows
        self.hand_off = hand_off

    # --- from the call --------------------------------------------------------------------------------------------

    def start(
        self,
        signature: Any,
        instance_id: str | None,
        on_conflict: Literal["return", "raise"],
        session: CallersSession | None = None,
    ) -> WorkflowHandle:
        """Record an instance and publish its start task; see ``Orchestrator.start``."""
        if on_conflict not in ("return", "raise"):
            raise errors.InvalidOperation(f"on_conflict is {on_conflict!r}; it is 'return' or 'raise'")
        task = self._workflow_of(signature)
        running.check_outside_of_passes(task.name)
        if_purged = IfPurged.CANNOT_BE if instance_id is None else IfPurged.FORGET
        instance_id = check_instance_id(instance_id) if instance_id is not None else str(uuid.uuid4())
        text = task.encode_input(tuple(signature.args), signature.kwargs)
        now = self.coordinator.clock()
        request, how = kept.of_options(
            self.dispatcher.app, task, instance_id, signature.options, now, self.coordinator.instrumentation.carry()
        )
        generation = secrets.token_hex(8)
        queue = self.dispatcher.workflow_queue(task.name, how.options)
        new = NewInstance(instance_id, generation, task.name, queue, text, request, how.begins_at, how.expires_at)
        if not self._insert_surely(new, session, if_purged):
            existing = self._existing(instance_id, task.name, text, on_conflict, session)
            return task.AsyncResult(existing.id)
        if how.begins_at is not None and how.begins_at > now:
            # not with an eta, which a broker may lose, or deliver time and again: the poller publishes it then
            return task.AsyncResult(instance_id)
        publish = functools.partial(self.publish, instance_id, generation, task.name, text, how.options)
        if session is None:
            publish()
        else:
            callers.after_commit(session, publish)
        return task.AsyncResult(instance_id)

    def publish(
        self, instance_id: str, generation: str, workflow: str, text: str, options: dict[str, Any]
    ) -> WorkflowHandle:
        """Publish the start task of an instance that is recorded; if the broker is away, the poller does."""
        try:
            self.dispatcher.publish_start(instance_id, generation, workflow, text, options)
        except (OSError, KombuError) as error:
            unpublished = "%s is recorded, but could not be published; the poller will: %r"
            logger.warning(unpublished, instance_id, error, extra=about(instance_id))
        return WorkflowHandle(instance_id, app=self.dispatcher.app, task_name=workflow)

    def _workflow_of(self, signature: Any) -> WorkflowTask:
        if getattr(signature, "is_workflow", False):
            raise errors.InvalidOperation(f"{signature.name} is a workflow; give its signature: {signature.name}.s(…)")
        if not isinstance(signature, Signature):
            raise errors.UnknownWorkflow(repr(signature))
        task = self.workflows.find(signature.task)
        if task is None:
            raise errors.UnknownWorkflow(signature.task)
        found: WorkflowTask = task
        return found

    def _insert_surely(self, new: NewInstance, session: CallersSession | None, if_purged: IfPurged) -> bool:
        """Record an instance from a call; return ``False`` if its id is taken."""
        if session is not None:
            return self._insert(new, if_purged, session)

        def insert() -> bool:
            return self._insert(new, if_purged)

        def insert_again() -> bool:
            if insert():
                return True
            with self.store.read("start") as connection:
                existing = instances.find_instance(connection, new.instance_id)
            return existing is not None and existing.generation == new.generation

        return self.store.once_more(insert, insert_again)

    def _insert(
        self,
        new: NewInstance,
        if_purged: IfPurged,
        session: CallersSession | None = None,
        *,
        values: dict[str, Any] | None = None,
    ) -> bool:
        """Record an instance; return ``False`` if its id is taken.  Raises ``Purged``."""
        now = self.coordinator.clock()
        # what is not told of its commit is not published by it: the poller finds it due
        is_published = session is None or callers.tells_of_commits(session)
        begins_at = new.begins_at if new.begins_at is not None and new.begins_at > now else None
        grace = timedelta(seconds=self.coordinator.settings.publish_grace if is_published else 0.0)
        with self._writing(session, is_alone=if_purged is IfPurged.CANNOT_BE) as connection:
            is_new = instances.insert_instance(
                connection,
                instance_id=new.instance_id,
                generation=new.generation,
                workflow=new.workflow,
                queue=new.queue,
                arguments=new.arguments,
                request=new.request,
                now=now,
                pass_due_at=now + grace if begins_at is None else begins_at,
                # until it begins, its deadline is its expiry
                values={"run_started_at": begins_at, "deadline_at": new.expires_at, **(values or {})},
                is_lent=session is not None,
            )
            # after the insert, which waits for a purge of that id that is under way: what it leaves is seen then
            if is_new and if_purged is IfPurged.FORGET:
                purging.forget_purged(connection, new.instance_id)
            elif is_new and if_purged is IfPurged.REFUSE and purging.is_purged(connection, new.instance_id):
                raise Purged
            return is_new

    def _writing(self, session: CallersSession | None, *, is_alone: bool) -> AbstractContextManager[Connection]:
        if session is not None:
            return callers.writing(session, self.store)
        return self.store.begin("start", locks_late=is_alone)  # one statement is a transaction of its own

    def _existing(
        self, instance_id: str, workflow: str, text: str, on_conflict: str, session: CallersSession | None
    ) -> Instance:
        existing = None
        if session is not None:
            # it may be the caller's own, which nobody else sees yet
            with callers.writing(session, self.store) as connection:
                existing = instances.find_instance(connection, instance_id)
        if existing is None:
            # or another's, younger than what the caller's transaction sees
            with self.store.read("start") as connection:
                existing = instances.find_instance(connection, instance_id)
        if existing is None:
            raise errors.InstanceExists(instance_id, "and was deleted just now; try again")
        if on_conflict == "raise":
            raise errors.InstanceExists(instance_id, "")
        if existing.workflow != workflow:
            raise errors.InstanceExists(instance_id, f"of the workflow {existing.workflow}")
        if existing.input != text:
            raise errors.InstanceExists(instance_id, "with other input")
        return existing

    # --- from the start task --------------------------------------------------------------------------------------

    def begin(self, task: WorkflowTask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the instance that a start task names, unless it is recorded, and make its first pass."""
        request, settings = task.request, self.coordinator.settings
        try:
            generation, is_counted = self.store.retrying(
                lambda: self._record(task, request, args, kwargs),
                patience_seconds=min(START_PATIENCE_SECONDS, settings.store_patience),
            )
        except (exc.SQLAlchemyError, errors.StoreUnreachable) as error:
            if not is_transient(error):
                raise
            extra = about(request.id)
            logger.warning("%s: the store is away, will be tried again: %r", request.id, error, extra=extra)
            raise task.retry(
                exc=error, countdown=START_DELAY_POLLS * settings.poll_interval, max_retries=None
            ) from error
        except Purged:
            logger.warning(
                "%s was purged: its start message came late or again, and is dropped; only orchestrator.start() uses "
                "the id again",
                request.id,
                extra=about(request.id),
            )
            return
        except errors.InstanceExists as error:
            # not as the failure of this task: its id is that of the instance which goes on
            logger.error("a start of %s is dropped: %s", task.name, error, extra=about(request.id))
            return
        try:
            with self.hand_off.offering(task) as offer:
                if is_counted or not (request.delivery_info or {}).get("redelivered"):
                    outbox = self.coordinator.begin(request.id, generation, offer, is_counted=is_counted)
                else:
                    outbox = self.coordinator.advance(request.id, generation, offer)
                self.hand_off.take(outbox)
            self.dispatcher.deliver(outbox)
        except Exception:
            # it is recorded, and its pass is owed: were this task to fail, Celery would take the workflow for failed
            owed = "%s: its first pass could not be made, and will be tried again"
            logger.exception(owed, request.id, extra=about(request.id))

    def _record(
        self, task: WorkflowTask, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, bool]:
        """Return the generation of an instance, and whether its first pass has been counted, for this process."""
        header = getattr(request, START_HEADER, None)
        if header is not None:
            return str(header["generation"]), False
        new = self._read_request(task, request, args, kwargs)
        if self._insert(new, IfPurged.REFUSE, values={"pass_attempts": 1}):
            return new.generation, True
        with self.store.read("start") as connection:
            existing = instances.find_instance(connection, new.instance_id)
            if existing is None and purging.is_purged(connection, new.instance_id):
                raise Purged
        if existing is None:
            raise errors.InstanceExists(new.instance_id, "and was deleted just now")
        if existing.workflow != task.name:
            raise errors.InstanceExists(new.instance_id, f"of the workflow {existing.workflow}")
        if existing.input != new.arguments:
            raise errors.InstanceExists(new.instance_id, "with other input")
        return existing.generation, False

    def _read_request(
        self, task: WorkflowTask, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NewInstance:
        instance_id = check_instance_id(request.id)
        text = codec.encode_arguments(tuple(args), kwargs, f"the input of {task.name}", None)
        queue = self.dispatcher.queue_bound_to(request.delivery_info or {}) or self.dispatcher.workflow_queue(
            task.name, {}
        )
        request_text = kept.of_message(self.dispatcher.app, request)
        return NewInstance(instance_id, secrets.token_hex(8), task.name, queue, text, request_text)

    def record_unbegun(self, task: WorkflowTask, request: Any, status: Status, failure: Failure) -> bool:
        """Record as ended an instance whose start message will never be run; ``False``: its id is taken.

        Celery has been told: it was Celery that dropped the message.
        """
        new = self._read_request(task, request, tuple(request.args or ()), dict(request.kwargs or {}))
        ended = {
            "status": status,
            "failure": codec.dump(failure),
            "pass_due_at": None,
            "ended_at": self.coordinator.clock(),
        }
        try:
            return self._insert(new, IfPurged.REFUSE, values=ended)
        except Purged:
            return True  # a late message of an instance that has come and gone
