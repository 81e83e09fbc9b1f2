"""Eager mode: an instance runs in the process that starts it, without a worker or a broker; for tests, above all.

What would be published is put on a list instead, and worked off by whoever is not inside of something on that list
already: a trampoline, so that neither long workflows nor long chains of them recurse.  When nothing is left to do, time
is skipped forward to the next timer, retry or timeout.  Everything is recorded as always: in the store that is
configured, or in a temporary one.
"""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from celery import states
from celery.app.trace import build_tracer
from celery.canvas import Signature
from celery.result import EagerResult
from celery.utils.functional import maybe_list
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import codec, errors
from orchestrator.runtime import liveness
from orchestrator.runtime.dispatch import HEADER, Dispatcher, header_of, task_id_of
from orchestrator.runtime.executing import Executing
from orchestrator.runtime.finishing import Finisher
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.runtime.heartbeat import Heartbeat, WorkerDescription
from orchestrator.runtime.instrumentation import Instrumentation
from orchestrator.runtime.parts import Parts
from orchestrator.runtime.publications import Publications
from orchestrator.runtime.timers import Timers
from orchestrator.runtime.transactions import Clock, utc_now
from orchestrator.store import family, history, instances, workers
from orchestrator.store.engine import Store
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status

if TYPE_CHECKING:
    from orchestrator.runtime.workflow import WorkflowTask

logger = logging.getLogger("orchestrator")

#: A workflow that goes on for ever (``recur`` after a timer) would never let its caller go.
MOST_SKIPS = 1_000
#: No other worker sends this one anything.
_NO_QUEUES = ("(eager)",)

_is_on: ContextVar[bool] = ContextVar("orchestrator_eager", default=False)


def is_on() -> bool:
    """Tell whether what the calling code does belongs to an instance that runs eagerly."""
    return _is_on.get()


class SkippingClock:
    """The time of this process's eager instances."""

    def __init__(self) -> None:
        self._skipped = timedelta()

    def __call__(self) -> datetime:
        return utc_now() + self._skipped

    def skip_to(self, moment: datetime) -> None:
        self._skipped += max(timedelta(), moment - self())


class EagerDispatcher(Dispatcher):
    """Puts on a list what would be published."""

    parts: EagerParts

    def deliver(self, outbox: Any) -> None:
        super().deliver(outbox)
        self.parts.work()

    def publish_start(self, instance_id: str, generation: str, _workflow: str, _text: str, _options: Any) -> None:
        self.publish_advance(instance_id, generation, None)
        self.parts.work()

    def publish_start_of_child(self, row: HistoryRow, generation: str) -> None:
        assert row.child_id is not None
        self.publish_advance(row.child_id, generation, None)

    def publish_advance(self, instance_id: str, generation: str, _queue: str | None) -> None:
        self.parts.add(instance_id, functools.partial(self.parts.advance, instance_id, generation))

    def publish_step(self, row: HistoryRow) -> None:
        if not row.is_foreign:  # nobody is there who would run it: it times out
            self.parts.add(row.instance_id, functools.partial(self.parts.run_step, row))


class AllEmpty:
    """The queues of a broker that is not there."""

    def is_empty(self, _name: str | None) -> bool:
        return True


class EagerParts(Parts):
    """The parts of a process that is client and worker in one."""

    def __init__(self, real: Parts, install: Callable[[], None]) -> None:
        super().__init__(real.app, real.options)
        self.registry = real.registry
        self.executing = Executing()
        self._clock = SkippingClock()
        self._real = real
        self._install = install
        self._deeds: deque[Callable[[], object]] = deque()
        self._touched: dict[str, None] = {}
        self._worker: int | None = None
        self._lock = threading.RLock()

    @property
    def clock(self) -> Clock:
        return self._clock

    def find_instrumentation(self) -> Instrumentation:
        return self._real.find_instrumentation()

    @functools.cached_property
    def store_url(self) -> str:
        if self.settings.store is not None:
            return self._real.store_url
        folder = tempfile.mkdtemp(prefix="orchestrator-eager-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return f"sqlite:///{Path(folder) / 'store.db'}"

    @functools.cached_property
    def store(self) -> Store:
        return super().store if self.settings.store is None else self._real.store

    @property
    def keeps_live_passes(self) -> bool:
        return False  # in tests, above all, what a replay would find is to be found

    @functools.cached_property
    def dispatcher(self) -> Dispatcher:
        dispatcher = EagerDispatcher(
            self.app, self.masks, lambda: self.aftermath, keeps_step_results=self.settings.step_results
        )
        dispatcher.parts = self
        return dispatcher

    @functools.cached_property
    def finisher(self) -> Finisher:
        return Finisher(self.app, self.store, keeps_results=bool(self.app.conf.task_store_eager_result))

    @functools.cached_property
    def _heartbeat(self) -> Heartbeat:
        own = WorkerDescription(f"eager@{socket.gethostname()}", (), (), _NO_QUEUES)
        return Heartbeat(self.store, self.settings, self.executing, lambda: own, self.clock)

    # --- starting -------------------------------------------------------------------------------------------------

    def delay(self, task: WorkflowTask, args: Any, kwargs: Any, options: dict[str, Any]) -> WorkflowHandle:
        """Do what ``delay`` does: run until the instance has ended, or waits for a message."""
        handle = self._start(task, args, kwargs, options)
        if self.app.conf.task_eager_propagates and handle.ready():
            handle.get()
        return handle

    def apply(
        self, task: WorkflowTask, args: Any, kwargs: Any, throw: bool | None, options: dict[str, Any]
    ) -> EagerResult:
        """Do what ``apply`` does: run to the end."""
        with self._on():
            handle = self._start(task, args, kwargs, options)
            result = handle.get(propagate=False)
            if throw or (throw is None and self.app.conf.task_eager_propagates):
                handle.get()
            # what follows in a canvas is given the result as a message would carry it
            plain = codec.decode(codec.encode(result, "the result")) if handle.state == states.SUCCESS else result
            return EagerResult(handle.id, plain, handle.state, traceback=handle.traceback, name=task.name)

    def _start(self, task: WorkflowTask, args: Any, kwargs: Any, options: dict[str, Any]) -> WorkflowHandle:
        signature = Signature(task.name, tuple(args or ()), dict(kwargs or {}), app=self.app)
        signature.set(**{name: value for name, value in options.items() if value is not None})
        self.check_startable()
        with self._on():
            return self.starter.start(signature, options.get("task_id"), "return")

    def check_startable(self) -> None:
        names = ", ".join(self._list_workers())
        if names:
            raise errors.ConfigurationError(
                f"workers live on the store {self.store.describe()}: {names}; run eagerly on a store of its own, or "
                "stop them first"
            )

    def _list_workers(self) -> list[str]:
        """Return the names of live workers, beside which nothing is done here.

        They would take this process, which does not beat while a body runs, for dead, and it would skip their time.
        """
        live = liveness.list_recent(self.store, self.settings.heartbeat_limit)
        return sorted({each.nodename for each in live if each.queues != _NO_QUEUES})

    # --- working ----------------------------------------------------------------------------------------------------

    def add(self, instance_id: str, deed: Callable[[], object]) -> None:
        """Put on the list what a worker would have been sent a message for."""
        self._touched[instance_id] = None
        self._deeds.append(deed)

    def work(self) -> None:
        """Work the list off, and let time pass for the instances on it; not inside of something on the list.

        Where workers live it is left to them: all of it is recorded.
        """
        if self._is_working_here():
            return
        with self._on(), self._working():
            if self._list_workers():
                self._forget()
            while self._touched:
                touched, self._touched = list(self._touched), {}
                for instance_id in touched:
                    self._run(instance_id, past_receives=False)

    def work_for(self, instance_id: str) -> None:
        """Run an instance to its end, whatever it waits for; its caller waits for it, perhaps inside of a step."""
        if not self._is_working_here() and self._list_workers():
            return
        with self._on(), self._working():
            self._run(instance_id, past_receives=True)
        found = self.find_instance(instance_id)
        if found is not None and not found.status.is_final:
            raise errors.EagerModeStuck(instance_id, self._say_why(found))

    @contextmanager
    def _on(self) -> Iterator[None]:
        token = _is_on.set(True)
        try:
            yield
        finally:
            _is_on.reset(token)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Keep other threads out, which then do their own; of one thread the outermost signs off."""
        with self._lock:
            was, self._worker = self._worker, threading.get_ident()
            try:
                yield
            except BaseException:
                if was is None:  # what is left of it is nobody else's to do
                    self._forget()
                raise
            finally:
                self._worker = was
                if was is None:
                    self._sign_off()

    def _forget(self) -> None:
        self._deeds.clear()
        self._touched.clear()

    def _is_working_here(self) -> bool:
        return self._worker == threading.get_ident()

    def _run(self, instance_id: str, *, past_receives: bool) -> None:
        for _ in range(MOST_SKIPS):
            while self._deeds:
                self._deeds.popleft()()
            moment = self._find_next_moment(instance_id, past_receives=past_receives)
            if moment is None:
                return
            self._clock.skip_to(moment)
            self._do_what_is_due(instance_id)
        raise errors.EagerModeStuck(instance_id, f"after {MOST_SKIPS} timers it still goes on")

    def _find_next_moment(self, instance_id: str, *, past_receives: bool) -> datetime | None:
        with self.store.read("next-moment") as connection:
            moments = []
            for each in instances.list_family(connection, instance_id):
                if each.status.is_final or each.status is Status.BLOCKED:
                    continue
                if not past_receives and family.awaits_message(connection, each):
                    continue  # its message may be sent when the caller has its handle
                moments += [family.find_next_record_of(connection, each.id), each.pass_due_at, each.deadline_at]
        return min((moment for moment in moments if moment is not None), default=None)

    def _do_what_is_due(self, instance_id: str) -> None:
        now = self.clock()
        with self.store.read("due") as connection:
            members = instances.list_family(connection, instance_id)
            records = family.list_due_records_of(connection, [each.id for each in members], now)
        timers = Timers(self.coordinator)
        timers.fire_timers_of([each.id for each in members])
        timers.publish(self.dispatcher.publish_advance, self.settings.heartbeat_limit)
        publications = Publications(self.coordinator, self.dispatcher, AllEmpty())
        for record in records:
            publications.settle_due(record, now)
        for each in members:
            if each.pass_due_at is not None and each.pass_due_at <= now:
                self.dispatcher.publish_advance(each.id, each.generation, each.queue)
            if each.deadline_at is not None and each.deadline_at <= now:
                self.dispatcher.deliver(self.coordinator.pass_deadline(each.id, each.generation))

    def _say_why(self, found: Instance) -> str:
        if found.status is Status.BLOCKED:
            return f"it is BLOCKED: {found.blocked}"
        with self.store.read("say-why") as connection:
            rows = history.list_awaited_receives(connection, found)
        channels = ", ".join(repr(row.name) for row in rows)
        return f"it waits for a message on {channels}; send one before you wait for its result" if rows else "it waits"

    # --- what a worker would do ---------------------------------------------------------------------------------------

    def advance(self, instance_id: str, generation: str) -> None:
        self._keep_beating()
        self.dispatcher.deliver(self.coordinator.advance(instance_id, generation))

    def run_step(self, row: HistoryRow) -> None:
        """Run an attempt of a step as its message would have had it run."""
        self._keep_beating()
        task = self.app.tasks.get(row.name)
        if task is None:
            self.dispatcher.deliver(self.coordinator.pass_on(row.key, row.dispatch))
            return
        if not getattr(task.run, "runs_as_step", False):
            self._install()  # it was defined after the others, as tests do
        args, kwargs = codec.plain_arguments(row.arguments or codec.encode_arguments((), {}, ""))
        request = _request_of(task, row, args, kwargs)
        trace = build_tracer(task.name, task, eager=True, propagate=False, app=self.app)
        traced = trace(request["id"], args, kwargs, request)
        if traced.info is not None and traced.info.state == states.FAILURE:
            # its body may not have begun; if it has, the step is settled
            self.steps.fail_unbegun(task, SimpleNamespace(**request), traced.info.retval)

    def _sign_off(self) -> None:
        """End the incarnation with the work: nobody beats for it, and a test may do away with its store next."""
        incarnation = self.executing.incarnation
        if incarnation:
            self.executing.note_beat("")
            try:
                with self.store.begin("end-worker") as connection:
                    workers.mark_dead(connection, incarnation, None, self.clock())
            except (SQLAlchemyError, errors.StoreUnreachable) as error:  # not instead of what ended the work
                logger.warning("could not sign off: %r", error)

    def _keep_beating(self) -> None:
        if self.executing.seconds_since_beat > self.settings.heartbeat_limit / 2 or not self.executing.incarnation:
            self._heartbeat.beat()


def _request_of(task: Any, row: HistoryRow, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    options = row.message_options
    header = header_of(row)
    return {
        "id": task_id_of(row.key, row.dispatch),
        "task": task.name,
        "args": args,
        "kwargs": kwargs,
        "root_id": row.instance_id,
        "parent_id": row.instance_id,
        "retries": row.celery_retries,
        "hostname": socket.gethostname(),
        "headers": {**options.get("headers", {}), HEADER: header},
        HEADER: header,
        "callbacks": maybe_list(options.get("link")),
        "errbacks": maybe_list(options.get("link_error")),
        "ignore_result": options.get("ignore_result", task.ignore_result),
        "delivery_info": {"is_eager": True, "routing_key": options.get("queue"), "priority": options.get("priority")},
    }
