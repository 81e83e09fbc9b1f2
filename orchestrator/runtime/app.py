"""``Orchestrator``: binds the parts to a Celery app.  Wiring only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import celery
from billiard import current_process
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, signals
from celery.result import AsyncResult

from orchestrator import errors
from orchestrator.core.records import PublishMessage
from orchestrator.core.retry import RetryPolicy
from orchestrator.runtime import eager, foreign, owner, results, running, softlimit
from orchestrator.runtime.activity import wrap
from orchestrator.runtime.descriptions import InstancePage, describe, read_statuses
from orchestrator.runtime.dispatch import ADVANCE, HEADER, SURVIVING
from orchestrator.runtime.eager import EagerParts
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.runtime.heartbeat import Heartbeat, WorkerDescription
from orchestrator.runtime.logs import AboutStarts
from orchestrator.runtime.mail import read_message
from orchestrator.runtime.parts import Parts
from orchestrator.runtime.poller import Poller
from orchestrator.runtime.publications import Publications
from orchestrator.runtime.queues import Queues
from orchestrator.runtime.registry import ActivityDefaults, RegisteredCompensation, seconds
from orchestrator.runtime.retention import Retention
from orchestrator.runtime.running import refuse_sending_inside_passes
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.telling import Teller
from orchestrator.runtime.transactional import open_up, open_when_made
from orchestrator.runtime.worker import OrchestratorStep
from orchestrator.runtime.workflow import drop_traceback, make_run, workflow_options
from orchestrator.store import instances
from orchestrator.store.mailbox import NewMail

if TYPE_CHECKING:
    from orchestrator.runtime.callers import CallersSession

F = TypeVar("F", bound=Callable[..., Any])


class Orchestrator(Parts):
    """Makes workflows of functions over the tasks of a Celery app.

    ``store`` is a SQLAlchemy URL (``sqlite:///sagas.db``, ``postgresql+psycopg://…``, ``mysql+pymysql://…``), or
    ``django`` or ``django:alias`` for a database of Django's settings; every other option is also a Celery setting with
    the prefix ``orchestrator_``.  Makes no connection by itself.
    """

    def __init__(self, app: Celery, *, store: str | None = None, **options: Any) -> None:
        unknown = set(options) - set(Settings.model_fields)
        if unknown:
            raise errors.ConfigurationError(f"Orchestrator has no option {', '.join(sorted(unknown))}")
        super().__init__(app, {"store": store, **options})
        owner.bind(app, self)
        # not shared: Celery would register it with every other app of the process, whose own it would displace
        app.task(name=ADVANCE, ignore_result=True, shared=False, **SURVIVING)(self._advance)
        foreign.register(app, lambda: self.foreign)
        results.install(app)
        app.steps["worker"].add(OrchestratorStep)
        refuse_sending_inside_passes(app)
        app.on_after_finalize.connect(self._on_finalized, weak=False)
        signals.worker_process_init.connect(self._on_pool_process, weak=False)

    # --- defining -------------------------------------------------------------------------------------------------

    def workflow(
        self,
        function: F | None = None,
        *,
        park: bool = False,
        deadline: timedelta | None = None,
        **options: Any,
    ) -> Any:
        """Make a workflow of ``function(ctx, …)``: a Celery task that is durable from its first step on.

        ``park``: a step that fails blocks the instance, for an operator to resume it or to let it fail, instead of
        raising.  ``deadline``: what has not ended so long after it was started is cancelled.  ``options`` are those of
        ``app.task`` (``name``, ``queue``, ``priority`` …).  ``async`` and generator functions are refused.
        """
        if function is None:
            return functools.partial(self.workflow, park=park, deadline=deadline, **options)
        own = workflow_options(function, park, deadline, {"shared": False, **options})
        return self.app.task(**own)(make_run(function))

    def compensates(
        self,
        task: Any,
        *,
        pass_step: bool = False,
        retry: RetryPolicy | None = None,
        always: bool = False,
    ) -> Callable[[F], F]:
        """Register the decorated task as what undoes ``task``, wherever that is a step.

        It gets the step's result as its only argument, or with ``pass_step`` an ``UndoneStep``.  ``retry`` is its own
        policy (default: at most an hour apart, for three days); ``always`` undoes a step that failed as well.

        No worker starts where two different ones are registered for a task: ``ConfigurationError`` names them.
        """

        def register(compensation: F) -> F:
            self.registry.add_compensation(task, RegisteredCompensation(compensation, pass_step, retry, always))
            return compensation

        return register

    def activity(
        self,
        *,
        retry: RetryPolicy | None = None,
        timeout: float | timedelta | None = None,
        unknown_on: tuple[type[BaseException], ...] = (),
        transactional: bool = False,
    ) -> Callable[[F], F]:
        """Set defaults for a task wherever it is a step; goes above ``@app.task``.

        ``unknown_on`` names exceptions after which nobody can say whether the task took effect.

        ``transactional`` gives the task's parameter ``session``, which callers leave out, a SQLAlchemy ``Session`` on
        the store's database.  What it writes there commits together with its result, or is rolled back: when the task
        raises, when its process dies, and when the attempt was given up.  ``session.commit()`` commits nothing before
        that.  After a deadlock or a lost connection the body runs again.  The server ends the transaction of a body
        that leaves it alone for longer than ``heartbeat_limit``.  On SQLite nobody else can write to the store while
        the body runs.  Outside of a step, the transaction commits when the task returns.  Raises
        ``ConfigurationError``, as soon as there is a task, if its function takes no ``session``.
        """
        entries: tuple[object, ...] = tuple(unknown_on)
        if not all(isinstance(entry, type) and issubclass(entry, BaseException) for entry in entries):
            raise errors.ConfigurationError(f"unknown_on takes a tuple of exception classes, not {unknown_on!r}")

        def register(task: F) -> F:
            defaults = ActivityDefaults(retry, seconds(timeout), tuple(unknown_on), transactional)
            self.registry.add_defaults(task, defaults)
            if transactional:
                open_when_made(task, self.app, lambda: self.current.bodies)
            return task

        return register

    # --- eager mode -------------------------------------------------------------------------------------------------

    @property
    def is_eager(self) -> bool:
        """Whether instances run in the process that starts them (``task_always_eager``)."""
        return eager.is_on() or bool(self.app.conf.task_always_eager)

    @functools.cached_property
    def eager(self) -> EagerParts:
        return EagerParts(self, self.install)

    @property
    def current(self) -> Parts:
        """What serves the calling code."""
        return self.eager if self.is_eager else self

    # --- using ----------------------------------------------------------------------------------------------------

    def start(
        self,
        signature: Any,
        *,
        instance_id: str | None = None,
        session: CallersSession | None = None,
        on_conflict: Literal["return", "raise"] = "return",
    ) -> WorkflowHandle:
        """Start a workflow, durably: when this returns the instance is recorded, whatever becomes of the message.

        ``instance_id`` makes it idempotent: a second start with the same id, workflow and input returns the same
        instance (or raises ``InstanceExists`` with ``on_conflict="raise"``); other input raises ``InstanceExists``.

        With ``session``, a SQLAlchemy ``Session``, ``scoped_session`` or ``Connection`` on the store's database, or
        Django's ``connection`` to it within ``transaction.atomic()``, the instance exists if and only if the caller's
        transaction commits; it begins after that.
        """
        parts = self.current
        parts.check_startable()
        return parts.starter.start(signature, instance_id, on_conflict, session)

    def enqueue(self, signature: Any, *, session: CallersSession) -> AsyncResult:
        """Send a plain task, or a canvas, if and only if the caller's transaction commits.

        ``session`` is as for ``start``.  The message is sent after the commit, at least once, and always under the ids
        of the result returned.  Raises ``NotEncodable`` for arguments that have no JSON form, ``PayloadTooLarge``,
        ``InputMismatch`` for those that the task does not take, and ``InvalidOperation`` for a workflow.
        """
        return self.current.enqueuer.enqueue(signature, session)

    def send(
        self,
        instance_id: str,
        channel: str,
        message: Any,
        *,
        message_id: str | None = None,
        missing: Literal["raise", "ignore"] = "raise",
        session: CallersSession | None = None,
    ) -> bool:
        """Send ``message`` to an instance, which keeps it until it receives on ``channel``.

        When this returns the message is recorded; with ``session`` (see ``start``) it is when the caller's transaction
        commits.  The same ``message_id`` is delivered once on a channel.  Raises ``UnknownInstance`` or
        ``InstanceEnded``, or with ``missing="ignore"`` returns ``False``.
        """
        running.refuse_inside_passes("send()", "use ctx.send")
        payload = read_message(channel, message, message_id, self.settings.max_payload_bytes)
        new = NewMail(instance_id, channel, payload, message_id)
        parts = self.current
        return parts.postman.send(new, missing, session, parts.dispatcher.deliver)

    def publish(
        self,
        channel: str,
        message: Any,
        *,
        message_id: str | None = None,
        session: CallersSession | None = None,
    ) -> None:
        """Give ``message`` to every instance that has subscribed to ``channel``; of those that compete, to one.

        When this returns it is recorded; with ``session`` (see ``start``) it is when the caller's transaction commits.
        The same ``message_id`` is delivered once on a channel.
        """
        running.refuse_inside_passes("publish()", "use ctx.publish")
        payload = read_message(channel, message, message_id, self.settings.max_payload_bytes)
        command = PublishMessage(channel, "", payload, message_id)
        parts = self.current
        parts.postman.publish(command, session, parts.dispatcher.deliver)

    def get(self, instance_id: str) -> WorkflowHandle:
        """Return the handle of an instance.  Raises ``UnknownInstance``."""
        instance = self.current.find_instance(instance_id)
        if instance is None:
            raise errors.UnknownInstance(instance_id)
        return WorkflowHandle(instance_id, app=self.app, task_name=instance.workflow)

    def list(
        self,
        *,
        workflow: Any = None,
        status: str | Iterable[str] | None = None,
        attributes: Mapping[str, Any] | None = None,
        started_after: datetime | None = None,
        started_before: datetime | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> InstancePage:
        """Return up to ``limit`` instances, newest first; ``page.cursor`` asks for the next ones."""
        if limit < 1:
            raise errors.InvalidOperation(f"the limit is {limit}; it is 1 or more")
        for name, instant in (("started_after", started_after), ("started_before", started_before)):
            if instant is not None and instant.tzinfo is None:
                raise errors.NaiveDatetime(name, instant)
        with self.current.store.read("list") as connection:
            page = instances.list_instances(
                connection,
                workflow=workflow if workflow is None or isinstance(workflow, str) else workflow.name,
                statuses=read_statuses(status),
                attributes=attributes,
                started_after=started_after,
                started_before=started_before,
                limit=limit,
                cursor=cursor,
            )
            return InstancePage(
                [describe(self.masks, each, instances.load_attributes(connection, each.id)) for each in page.instances],
                page.cursor,
            )

    def migrate(self) -> None:
        """Bring the store's tables up to date, also where that is not done at first use (``migrate=False``)."""
        self.current.store.migrate_now()

    def close(self) -> None:
        """Let go of the connections that this process keeps to the store; the next use opens new ones."""
        parts = self.current
        parts.store.dispose()
        if "bodies" in vars(parts):  # which have connections of their own
            parts.bodies.store.dispose()

    def purge(
        self,
        *,
        older_than: timedelta | datetime,
        statuses: str | Iterable[str] | None = None,
        dry_run: bool = False,
    ) -> int:
        """Delete instances that ended longer ago than ``older_than``, or before that instant; return how many.

        With ``dry_run`` nothing is deleted: what is returned is how many would be.

        ``statuses`` names those to purge (default: all in which an instance has ended); any other status raises
        ``InvalidOperation``, a datetime without a time zone ``NaiveDatetime``.  An instance stays while its callbacks
        have not been told, a repair of it is under way, or its parent is there.  Its id stays used: a late message of
        ``.delay()`` does not begin it anew, only ``start`` does.
        """
        parts = self.current
        retention = Retention(parts.store, parts.settings, parts.clock)
        return retention.count(older_than, statuses) if dry_run else retention.purge(older_than, statuses)

    # --- in workers -----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Wrap every registered task, so that it can run as a step."""
        own = [each for each in self.app.tasks.values() if not each.name.startswith(("celery.", "orchestrator."))]
        for task in own:
            if not getattr(task, "is_workflow", False):
                wrap(task, lambda: self.current.steps)
        for task in own:  # when all the others are wrapped: it may be refused
            if self.registry.find_defaults(task.name).is_transactional:
                open_up(task, lambda: self.current.bodies)
        self.registry.check()

    def make_threads(self, worker: Any) -> tuple[Heartbeat, Poller, Teller]:
        """Return the threads of a worker; called before its pool forks."""
        # of what Celery has for its workers alone, which other processes do not load
        from orchestrator.runtime import marking, revoking

        self.executing.share()
        self.store.repeats_all = True
        for task in self.app.tasks.values():
            if self.masks.hides_result(task.name):
                task.resultrepr_maxsize = 0  # of what a task returned Celery logs and sends so many characters
        poller = Poller(
            self.coordinator,
            self.dispatcher,
            self.finisher,
            self.executing,
            Publications(self.coordinator, self.dispatcher, Queues(self.app)),
            self.postman,
            self.enqueuer,
            self.observers,
            functools.partial(self.monitor.look, worker),
            revoking.Revocations(self.coordinator, self.lifecycle, self.starter, self.dispatcher),
        )
        if worker.pool_cls.__module__.endswith((".gevent", ".eventlet")):
            self.workflows.keeps_live = False  # they switch between greenlets of their own
        self.monitor.begin(worker)
        logging.getLogger("celery.app.trace").addFilter(AboutStarts(self.workflows.knows))
        self.coordinator.owes_telling = self.finisher.owes  # of other processes a worker may know more
        self.hand_off.begin(worker)
        signals.task_postrun.connect(drop_traceback, weak=False)
        signals.task_postrun.connect(self.hand_off.on_postrun, weak=False)
        signals.worker_shutting_down.connect(self._on_shutting_down, weak=False)
        describe_worker = functools.partial(self._describe_worker, worker)
        heartbeat = Heartbeat(self.store, self.settings, self.executing, describe_worker)
        revoking.listen(self.app, poller.note_revokes)
        marking.leave_to(self.app, poller.note_unmarked)
        signals.task_unknown.connect(poller.note_unregistered, weak=False)
        signals.task_failure.connect(poller.note_failure, weak=False)
        signals.task_revoked.connect(poller.note_revoked, weak=False)
        signals.task_failure.connect(self._on_task_failure, weak=False)
        return heartbeat, poller, Teller(self.observers, self.settings.poll_interval)

    def _describe_worker(self, worker: Any) -> WorkerDescription:
        tasks = tuple(name for name in self.app.tasks if not name.startswith("celery."))
        queues = tuple(self.app.amqp.queues.consume_from)
        return WorkerDescription(worker.hostname, tuple(self.workflows.names()), tasks, queues)

    def _on_finalized(self, **_kwargs: Any) -> None:
        self.install()

    def _on_pool_process(self, **_kwargs: Any) -> None:
        index = getattr(current_process(), "index", None)
        if index is not None:  # the solo pool sends this signal too, in the worker's own process
            self.executing.become_child(index)

    def _on_shutting_down(self, **_kwargs: Any) -> None:
        self.executing.note_ending()

    def _on_task_failure(self, sender: Any = None, exception: Any = None, **_kwargs: Any) -> None:
        request = sender.request
        is_step = getattr(request, HEADER, None) is not None and not hasattr(request, "is_inside_step")
        if is_step and not isinstance(exception, WorkerLostError | TimeLimitExceeded):
            self.steps.fail_unbegun(sender, request, exception)

    def _advance(self, instance_id: str, generation: str) -> None:
        """Make the pass that an instance owes."""
        with softlimit.deferred(in_pool_process=self.executing.is_child):
            self.dispatcher.deliver(self.coordinator.advance(instance_id, generation))


def shared_workflow(
    function: Any = None, *, park: bool = False, deadline: timedelta | None = None, **options: Any
) -> Any:
    """Make a workflow for whichever app has an orchestrator; to ``workflow`` what ``shared_task`` is to ``task``."""
    if function is None:
        return functools.partial(shared_workflow, park=park, deadline=deadline, **options)
    return celery.shared_task(**workflow_options(function, park, deadline, options))(make_run(function))
