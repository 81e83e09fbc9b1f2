"""The parts of the runtime, and how they fit together.  Wiring only."""

from __future__ import annotations

import functools
from typing import Any

from celery import Celery

from orchestrator import codec
from orchestrator.runtime import django_store
from orchestrator.runtime.activity import StepRunner
from orchestrator.runtime.aftermath import Aftermath
from orchestrator.runtime.claims import Claims
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import Dispatcher
from orchestrator.runtime.enqueuing import Enqueuer
from orchestrator.runtime.executing import Executing
from orchestrator.runtime.finishing import Finisher
from orchestrator.runtime.foreign import ForeignSteps
from orchestrator.runtime.forks import Forks
from orchestrator.runtime.handoff import HandOff
from orchestrator.runtime.host import CeleryHost
from orchestrator.runtime.instrumentation import Instrumentation
from orchestrator.runtime.known import KnownTasks
from orchestrator.runtime.lifecycle import Lifecycle
from orchestrator.runtime.mail import Postman
from orchestrator.runtime.masking import Masks
from orchestrator.runtime.monitoring import Monitor
from orchestrator.runtime.observing import Observers
from orchestrator.runtime.operator import Operator
from orchestrator.runtime.registry import Registry
from orchestrator.runtime.running import RegisteredWorkflows
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.starter import Starter
from orchestrator.runtime.transactional import TransactionalBodies
from orchestrator.runtime.transactions import Clock, utc_now
from orchestrator.store import instances, workers
from orchestrator.store.engine import Store
from orchestrator.store.instances import Instance


class Parts:
    """What a process needs of the runtime; each part is made when it is first needed."""

    def __init__(self, app: Celery, options: dict[str, Any]) -> None:
        self.app = app
        self.registry = Registry()
        self.executing = Executing()
        self.options = options
        self.instrumentation = Instrumentation()

    @property
    def clock(self) -> Clock:
        return utc_now

    def find_instrumentation(self) -> Instrumentation:
        """Return what measures and traces; it may be replaced at any time."""
        return self.instrumentation

    def decode_result(self, instance: Instance) -> Any:
        """Return what a completed instance returned, as its annotation says where its workflow is registered."""
        task = self.workflows.find(instance.workflow)
        returns = None if task is None else codec.annotations_of(task.function).returns
        return codec.decode_leniently(instance.result or "null", returns)

    def check_startable(self) -> None:
        """Refuse to start anything where it could not run as it should: in eager mode, beside workers."""

    def work_for(self, instance_id: str) -> None:
        """Do what an instance needs done to end, where no worker does it: nothing, but in eager mode."""

    def find_instance(self, instance_id: str) -> Instance | None:
        """Return the row of an instance, ``None`` if there is none."""

        def once() -> Instance | None:
            with self.store.read("find-instance") as connection:
                return instances.find_instance(connection, instance_id)

        return self.store.retrying(once, patience_seconds=0)

    @functools.cached_property
    def settings(self) -> Settings:
        return Settings.read(self.app.conf, self.options)

    @functools.cached_property
    def store_url(self) -> str:
        return self.settings.require_store()

    @functools.cached_property
    def store(self) -> Store:
        options: dict[str, Any] = {
            "idle_limit_seconds": self.settings.heartbeat_limit,
            "migrate": self.settings.migrate,
        }
        alias = self.settings.store and django_store.find_alias(self.settings.store)
        return django_store.SharedStore(alias, self.store_url, **options) if alias else Store(self.store_url, **options)

    @functools.cached_property
    def masks(self) -> Masks:
        return Masks(self.settings.mask, lambda name: self.app.tasks.get(name))

    @functools.cached_property
    def workflows(self) -> RegisteredWorkflows:
        host = CeleryHost(self.app, self.registry, KnownTasks(self.store), self.settings, self.store)
        return RegisteredWorkflows(self.app, host, keeps_live=self.keeps_live_passes)

    @property
    def keeps_live_passes(self) -> bool:
        """Whether the next pass of an instance may go on from where the last one stands."""
        return self.settings.live_passes > 0

    @functools.cached_property
    def coordinator(self) -> Coordinator:
        return Coordinator(
            self.store,
            self.settings,
            self.workflows,
            lambda: self.executing.incarnation,
            self.clock,
            self.observers,
        )

    @functools.cached_property
    def monitor(self) -> Monitor:
        return Monitor(self.app, self.masks, self.executing, self._find_hostname)

    @functools.cached_property
    def observers(self) -> Observers:
        return Observers(self.store, self.settings, self.monitor, self.clock, self.find_instrumentation)

    @functools.cached_property
    def finisher(self) -> Finisher:
        return Finisher(self.app, self.store)

    @functools.cached_property
    def dispatcher(self) -> Dispatcher:
        return Dispatcher(self.app, self.masks, lambda: self.aftermath, keeps_step_results=self.settings.step_results)

    @functools.cached_property
    def postman(self) -> Postman:
        return Postman(self.coordinator)

    @functools.cached_property
    def aftermath(self) -> Aftermath:
        return Aftermath(self.coordinator, self.dispatcher, self.finisher, self.postman, self.observers)

    @functools.cached_property
    def lifecycle(self) -> Lifecycle:
        return Lifecycle(self.coordinator, self.dispatcher)

    @functools.cached_property
    def starter(self) -> Starter:
        return Starter(self.coordinator, self.dispatcher, self.workflows, self.hand_off)

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
        return StepRunner(
            self.app,
            self.settings,
            self.registry,
            self.coordinator,
            self.claims,
            self.dispatcher,
            self.hand_off,
            lambda: self.bodies,
        )

    @functools.cached_property
    def claims(self) -> Claims:
        return Claims(self.store, self.settings, self.executing, self.clock, self.observers)

    @functools.cached_property
    def hand_off(self) -> HandOff:
        return HandOff(self.app, self.settings, self.claims, self.coordinator, self.dispatcher, self.monitor)

    @functools.cached_property
    def bodies(self) -> TransactionalBodies:
        # connections of their own, as many as there are bodies: the heartbeat must never wait for one to end
        store = Store(
            self.store_url,
            idle_limit_seconds=self.settings.heartbeat_limit,
            migrate=False,
            max_overflow=-1,
        )
        return TransactionalBodies(store, self.coordinator)

    def _find_hostname(self) -> str | None:
        with self.store.read("find-worker") as connection:
            live = workers.list_workers(connection)
        return live[0].nodename if live else None
