"""Rows for instances in Flower and whatever else listens to Celery's events.

Steps are Celery tasks and send their own.  An instance's start task ends long before the instance does, so what follows
is sent here, under the instance's id.  Events may be lost, as Celery's own may.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery, current_task, states
from celery.app.trace import TraceInfo
from celery.utils.saferepr import saferepr
from kombu.exceptions import KombuError

from orchestrator import codec
from orchestrator.core.records import Failure
from orchestrator.runtime import kept
from orchestrator.runtime.executing import Executing
from orchestrator.runtime.logs import about
from orchestrator.runtime.masking import Masks
from orchestrator.runtime.notices import Notice
from orchestrator.store.instances import Instance, Status

logger = logging.getLogger("orchestrator")


class Monitor:
    """Sends events of instances, when a monitor asked for events.

    ``find_hostname`` returns the name of any live worker: what is done by a process that is none is told in its name.
    """

    def __init__(
        self, app: Celery, masks: Masks, executing: Executing, find_hostname: Callable[[], str | None]
    ) -> None:
        self.app = app
        self.masks = masks
        self.executing = executing
        self.find_hostname = find_hostname
        self.hostname: str | None = None

    @property
    def is_listening(self) -> bool:
        """Whether anybody asked for events; of processes outside of workers nobody can know."""
        return self.executing.sends_events or not self.executing.incarnation

    def begin(self, worker: Any) -> None:
        """Take over from a worker what it is called, and whether it was started with events."""
        self.hostname = worker.hostname
        self.executing.sends_events = bool(worker.task_events)

    def look(self, worker: Any) -> None:
        """Take over from a worker whether its events are on: monitors switch them on while it runs."""
        dispatcher = getattr(worker.consumer, "event_dispatcher", None)
        if dispatcher is not None:
            is_for_tasks = not dispatcher.groups or "task" in dispatcher.groups
            self.executing.sends_events = bool(dispatcher.enabled and is_for_tasks)

    def tell(self, notice: Notice) -> None:
        """Send the events of a notice, if it has any."""
        if not self.is_listening:
            return
        events = self._list_events(notice)
        hostname = self._hostname() if events else None
        if hostname is not None:
            self._send(hostname, notice.instance_id, events)

    def _send(self, hostname: str, instance_id: str, events: list[tuple[str, dict[str, Any]]]) -> None:
        try:
            with self.app.events.default_dispatcher(hostname=hostname) as dispatcher:
                for kind, fields in events:
                    dispatcher.send(kind, retry=False, **fields)
        except (OSError, KombuError) as error:
            logger.debug("monitors are not told of %s: %r", instance_id, error, extra=about(instance_id))

    def tell_taken(self, request: dict[str, Any]) -> None:
        """Send the events of a task that begins without a message; of others a worker's main process sends them."""
        names = ("retries", "eta", "expires", "root_id", "parent_id")
        received = {name: request[name] for name in names} | {"name": request["task"]}
        received |= {"args": request["argsrepr"], "kwargs": request["kwargsrepr"]}
        self._tell_of_task(request, ("task-received", received), ("task-started", {}))

    def tell_done(self, request: dict[str, Any], info: TraceInfo | None, runtime: float | None, shown: str) -> None:
        """Send the event of how it ended."""
        if info is None:
            self._tell_of_task(request, ("task-succeeded", {"result": shown, "runtime": runtime}))
        elif info.state in (states.FAILURE, states.RETRY):
            kind = "task-failed" if info.state == states.FAILURE else "task-retried"
            told = {"exception": saferepr(info.retval), "traceback": None}
            self._tell_of_task(request, (kind, told))

    def _tell_of_task(self, request: dict[str, Any], *events: tuple[str, dict[str, Any]]) -> None:
        if not self.executing.sends_events:
            return
        every = [(kind, {"uuid": request["id"], **fields}) for kind, fields in events]
        try:
            self._send(self.hostname or request["hostname"], request["root_id"], every)
        except Exception:  # the task must not fail for it
            logger.exception("monitors are not told of %s", request["id"], extra=about(request["root_id"]))

    def _hostname(self) -> str | None:
        request = getattr(current_task, "request", None)
        return self.hostname or getattr(request, "hostname", None) or self.find_hostname()

    def _list_events(self, notice: Notice) -> list[tuple[str, dict[str, Any]]]:
        if notice.signal == "step_lost":
            # nobody else tells of it: its worker is gone
            lost = {"uuid": notice.arguments["task_id"], "name": notice.sender, "state": "FAILURE"}
            return [("task-failed", {**lost, "exception": f"lost: {notice.arguments['message']}", "traceback": None})]
        instance = notice.instance
        if instance is None:
            return []
        about = self._about(instance)
        match notice.signal:
            case "instance_started":
                own = getattr(getattr(current_task, "request", None), "id", None)
                if own == instance.id:
                    return []  # Celery has told it: this is the start task
                return [("task-received", about), ("task-started", {**about, "state": "STARTED"})]
            case "instance_resumed":
                return [("task-started", {**about, "state": "STARTED", "exception": None})]
            case "instance_compensating":
                return [("task-compensating", {**about, "state": "COMPENSATING"})]
            case "instance_blocked":
                reason = (instance.blocked or "").partition("\n")[0]
                return [("task-blocked", {**about, "state": "BLOCKED", "exception": reason})]
            case "instance_ended":
                return [self._ended(instance, about)]
        return []

    def _about(self, instance: Instance) -> dict[str, Any]:
        """Return what every event says: a monitor that was started late knows nothing yet.

        ``state`` is said besides by each: of states that are not its own Celery thinks that they come last.
        """
        args, kwargs = self.masks.arguments(instance.workflow, *codec.plain_arguments(instance.input))
        request = kept.read(instance.request).request
        return {
            "uuid": instance.id,
            "name": instance.workflow,
            "args": saferepr(tuple(args)),
            "kwargs": saferepr(kwargs),
            "root_id": request.get("root_id") or instance.root_id or instance.id,
            "parent_id": request.get("parent_id") or instance.parent_id,
            "retries": 0,
            "eta": None,
            "expires": None,
        }

    def _ended(self, instance: Instance, about: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        assert instance.ended_at is not None
        runtime = (instance.ended_at - (instance.started_at or instance.created_at)).total_seconds()
        if instance.status is Status.COMPLETED:
            result = self.masks.result(instance.workflow, codec.decode(instance.result or "null"))
            told = {"state": "SUCCESS", "result": saferepr(result), "runtime": runtime}
            return "task-succeeded", {**about, **told}
        failure = codec.load(Failure, instance.failure) if instance.failure else None
        what = str(instance.status) if failure is None else f"{instance.status}: {failure.type}({failure.message!r})"
        told = {"exception": what, "traceback": None if failure is None else failure.traceback, "runtime": runtime}
        if instance.status in (Status.CANCELLED, Status.TERMINATED):
            revoked = {**about, **told, "state": "REVOKED", "terminated": False, "expired": False}
            return "task-revoked", {**revoked, "signum": None}
        return "task-failed", {**about, **told, "state": "FAILURE"}
