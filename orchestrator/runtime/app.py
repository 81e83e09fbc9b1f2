"""``Orchestrator``: binds the parts to a Celery app.  Wiring only."""

from __future__ import annotations

import functools
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
from orchestrator.runtime import foreign, owner, running, softlimit
from orchestrator.runtime.activity import StepRunner, wrap
from orchestrator.runtime.aftermath import Aftermath
from orchestrator.runtime.claims import Claims
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.descriptions import InstancePage, describe, read_statuses
from orchestrator.runtime.dispatch import ADVANCE, HEADER, Dispatcher
from orchestrator.runtime.enqueuing import Enqueuer
from orchestrator.runtime.executing import Executing
from orchestrator.runtime.finishing import Finisher
from orchestrator.runtime.foreign import ForeignSteps
from orchestrator.runtime.forks import Forks
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.runtime.heartbeat import Heartbeat, WorkerDescription
from orchestrator.runtime.host import CeleryHost
from orchestrator.runtime.known import KnownTasks
from orchestrator.runtime.lifecycle import Lifecycle
from orchestrator.runtime.mail import Postman, read_message
from orchestrator.runtime.operator import Operator
from orchestrator.runtime.poller import Poller
from orchestrator.runtime.queues import Queues
from orchestrator.runtime.registry import ActivityDefaults, RegisteredCompensation, Registry, seconds
from orchestrator.runtime.retention import Retention
from orchestrator.runtime.running import RegisteredWorkflows, refuse_sending_inside_passes
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.starter import Starter
from orchestrator.runtime.transactional import TransactionalBodies, open_up, open_when_made
from orchestrator.runtime.worker import OrchestratorStep
from orchestrator.runtime.workflow import make_run, workflow_options
from orchestrator.store import instances
from orchestrator.store.engine import Store
from orchestrator.store.instances import Instance
from orchestrator.store.mailbox import NewMail

if TYPE_CHECKING:
    from orchestrator.runtime.callers import CallersSession

F = TypeVar("F", bound=Callable[..., Any])


class Orchestrator:
    """Makes workflows of functions over the tasks of a Celery app.

    ``store`` is a SQLAlchemy URL (``sqlite:///sagas.db``, ``postgresql+psycopg://…``, ``mysql+pymysql://…``); every
    other option is also a Celery setting with the prefix ``orchestrator_``.  Makes no connection by itself.
    """

    def __init__(self, app: Celery, *, store: str | None = None, **options: Any) -> None:
        unknown = set(options) - set(Settings.model_fields)
        if unknown:
            raise errors.ConfigurationError(f"Orchestrator has no option {', '.join(sorted(unknown))}")
        self.app = app
        self._options = {"store": store, **options}
        self.registry = Registry()
        self.executing = Executing()
        owner.bind(app, self)
        # not shared: Celery would register it with every other app of the process, whose own it would displace
        app.task(name=ADVANCE, ignore_result=True, shared=False)(self._advance)
        foreign.register(app, lambda: self.foreign)
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
                open_when_made(task, self.app, lambda: self.bodies)
            return task

        return register

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

        With ``session``, a SQLAlchemy ``Session``, ``scoped_session`` or ``Connection`` on the store's database, the
        instance exists if and only if the caller's transaction commits; it begins after that.
        """
        return self.starter.start(signature, instance_id, on_conflict, session)

    def enqueue(self, signature: Any, *, session: CallersSession) -> AsyncResult:
        """Send a plain task, or a canvas, if and only if the caller's transaction commits.

        ``session`` is as for ``start``.  The message is sent after the commit, at least once, and always under the ids
        of the result returned.  Raises ``NotEncodable`` for arguments that have no JSON form, ``PayloadTooLarge``,
        ``InputMismatch`` for those that the task does not take, and ``InvalidOperation`` for a workflow.
        """
        return self.enqueuer.enqueue(signature, session)

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
        return self.postman.send(new, missing, session, self.dispatcher.deliver)

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
        self.postman.publish(command, session, self.dispatcher.deliver)

    def get(self, instance_id: str) -> WorkflowHandle:
        """Return the handle of an instance.  Raises ``UnknownInstance``."""
        instance = self.find_instance(instance_id)
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
        limit: int = 100,
        cursor: str | None = None,
    ) -> InstancePage:
        """Return up to ``limit`` instances, newest first; ``page.cursor`` asks for the next ones."""
        if started_after is not None and started_after.tzinfo is None:
            raise errors.NaiveDatetime("started_after", started_after)
        with self.store.read("list") as connection:
            page = instances.list_instances(
                connection,
                workflow=workflow if workflow is None or isinstance(workflow, str) else workflow.name,
                statuses=read_statuses(status),
                attributes=attributes,
                started_after=started_after,
                limit=limit,
                cursor=cursor,
            )
            return InstancePage(
                [describe(each, instances.load_attributes(connection, each.id)) for each in page.instances], page.cursor
            )

    def purge(self, *, older_than: timedelta | datetime, statuses: str | Iterable[str] | None = None) -> int:
        """Delete instances that ended longer ago than ``older_than``, or before that instant; return how many.

        ``statuses`` names those to purge (default: all in which an instance has ended); any other status raises
        ``InvalidOperation``, a datetime without a time zone ``NaiveDatetime``.  An instance stays while its callbacks
        have not been told, a repair of it is under way, or its parent is there.  Its id stays used: a late message of
        ``.delay()`` does not begin it anew, only ``start`` does.
        """
        return Retention(self.store, self.settings, self.coordinator.clock).purge(older_than, statuses)

    def find_instance(self, instance_id: str) -> Instance | None:
        """Return the row of an instance, ``None`` if there is none."""

        def once() -> Instance | None:
            with self.store.read("find-instance") as connection:
                return instances.find_instance(connection, instance_id)

        return self.store.retrying(once, patience_seconds=0)

    # --- parts, made when they are first needed -------------------------------------------------------------------

    @functools.cached_property
    def settings(self) -> Settings:
        return Settings.read(self.app.conf, self._options)

    @functools.cached_property
    def store(self) -> Store:
        limit = self.settings.heartbeat_limit
        return Store(self.settings.require_store(), idle_limit_seconds=limit, migrate=self.settings.migrate)

    @functools.cached_property
    def workflows(self) -> RegisteredWorkflows:
        host = CeleryHost(self.app, self.registry, KnownTasks(self.store), self.settings, self.store)
        return RegisteredWorkflows(self.app, host)

    @functools.cached_property
    def coordinator(self) -> Coordinator:
        return Coordinator(self.store, self.settings, self.workflows, lambda: self.executing.incarnation)

    @functools.cached_property
    def finisher(self) -> Finisher:
        return Finisher(self.app, self.store)

    @functools.cached_property
    def dispatcher(self) -> Dispatcher:
        return Dispatcher(self.app, lambda: self.aftermath)

    @functools.cached_property
    def postman(self) -> Postman:
        return Postman(self.coordinator)

    @functools.cached_property
    def aftermath(self) -> Aftermath:
        return Aftermath(self.coordinator, self.dispatcher, self.finisher, self.postman)

    @functools.cached_property
    def lifecycle(self) -> Lifecycle:
        return Lifecycle(self.coordinator, self.dispatcher)

    @functools.cached_property
    def starter(self) -> Starter:
        return Starter(self.coordinator, self.dispatcher, self.workflows)

    @functools.cached_property
    def enqueuer(self) -> Enqueuer:
        return Enqueuer(self.app, self.store, self.settings, self.coordinator.clock)

    @functools.cached_property
    def foreign(self) -> ForeignSteps:
        return ForeignSteps(self.coordinator, self.dispatcher)

    @functools.cached_property
    def forks(self) -> Forks:
        return Forks(self.coordinator, self.starter)

    @functools.cached_property
    def operator(self) -> Operator:
        return Operator(self.coordinator, self.dispatcher)

    @functools.cached_property
    def steps(self) -> StepRunner:
        claims = Claims(self.store, self.settings, self.executing)
        return StepRunner(
            self.app, self.settings, self.registry, self.coordinator, claims, self.dispatcher, lambda: self.bodies
        )

    @functools.cached_property
    def bodies(self) -> TransactionalBodies:
        # connections of their own, as many as there are bodies: the heartbeat must never wait for one to end
        store = Store(
            self.settings.require_store(),
            idle_limit_seconds=self.settings.heartbeat_limit,
            migrate=False,
            max_overflow=-1,
        )
        return TransactionalBodies(store, self.coordinator)

    # --- in workers -----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Wrap every registered task, so that it can run as a step."""
        own = [each for each in self.app.tasks.values() if not each.name.startswith(("celery.", "orchestrator."))]
        for task in own:
            if not getattr(task, "is_workflow", False):
                wrap(task, lambda: self.steps)
        for task in own:  # when all the others are wrapped: it may be refused
            if self.registry.find_defaults(task.name).is_transactional:
                open_up(task, lambda: self.bodies)

    def make_threads(self, worker: Any) -> tuple[Heartbeat, Poller]:
        """Return the threads of a worker; called before its pool forks."""
        self.executing.share()
        poller = Poller(
            self.coordinator,
            self.dispatcher,
            self.finisher,
            self.executing,
            Queues(self.app),
            self.postman,
            self.enqueuer,
        )
        describe_worker = functools.partial(self._describe_worker, worker)
        heartbeat = Heartbeat(self.store, self.settings, self.executing, describe_worker)
        signals.task_unknown.connect(poller.note_unregistered, weak=False)
        signals.task_failure.connect(poller.note_failure, weak=False)
        signals.task_revoked.connect(poller.note_revoked, weak=False)
        signals.task_failure.connect(self._on_task_failure, weak=False)
        return heartbeat, poller

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
