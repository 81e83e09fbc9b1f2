"""From records to Celery messages.  Publishing happens after the commit, and only rings the bell: a lost message is
published again by the poller, a doubled one finds its dispatch claimed."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from celery import Celery
from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import codec
from orchestrator.core.records import Kind
from orchestrator.errors import StoreUnreachable
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.masking import Masks
from orchestrator.store.due import DueRecord
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Instance, OwedPass

if TYPE_CHECKING:
    from orchestrator.runtime.notices import Notice

logger = logging.getLogger("orchestrator")

HEADER = "orchestrator"
START_HEADER = "orchestrator_start"
ADVANCE = "orchestrator.advance"
FOREIGN_SUCCEEDED, FOREIGN_FAILED = "orchestrator.foreign_succeeded", "orchestrator.foreign_failed"

#: No number in it is too long for its column.
_TASK_ID = re.compile(r"(.+):(\d{1,9}):(-?\d{1,9}):(\d{1,9})", re.DOTALL)

#: For tasks of our own: a message outlives the process that took it, to be taken by another at once.
SURVIVING = {"acks_late": True, "reject_on_worker_lost": True}

#: Options that are columns of the record: the message itself goes out when it may be claimed.
_COLUMNS = ("countdown", "eta", "expires")


def task_id_of(key: StepKey, dispatch: int) -> str:
    """Return the id of the Celery task that is one dispatch of a step."""
    return f"{key.instance_id}:{key.run}:{key.seq}:{dispatch}"


def read_task_id(task_id: str) -> tuple[str, int, int, int] | None:
    """Return instance, run, seq and dispatch of what may be the id of a step's task; ``None``: it is none."""
    found = _TASK_ID.fullmatch(task_id)
    return None if found is None else (found[1], int(found[2]), int(found[3]), int(found[4]))


def header_of(row: HistoryRow) -> dict[str, Any]:
    """Return what a message says of the step that it is for; arguments come from the record."""
    return {
        "instance": row.instance_id,
        "generation": row.generation,
        "run": row.run,
        "seq": row.seq,
        "dispatch": row.dispatch,
    }


def read_header(header: Any) -> tuple[StepKey, int]:
    key = StepKey(header["instance"], header["generation"], int(header["run"]), int(header["seq"]))
    return key, int(header["dispatch"])


def begins_step(request: Any) -> bool:
    """Tell whether a task was called by a step's message, and not by the body that this message runs."""
    if request.called_directly or getattr(request, HEADER, None) is None:
        return False
    return not getattr(request, "is_inside_step", False)


class Follower(Protocol):
    """What follows a commit besides publishing; see ``aftermath``."""

    def on_ended(self, instance: Instance) -> None: ...

    def wake(self, instance_id: str) -> Outbox: ...

    def hand_out(self, channel: str) -> Outbox: ...

    def start_child(self, row: HistoryRow) -> Outbox: ...

    def tell(self, told: list[Notice]) -> None: ...


class Dispatcher:
    """Publishes what was committed."""

    def __init__(
        self, app: Celery, masks: Masks, follower: Callable[[], Follower], *, keeps_step_results: bool = True
    ) -> None:
        self.app = app
        self.masks = masks
        self.keeps_step_results = keeps_step_results
        self._follower = follower

    def deliver(self, outbox: Outbox) -> None:
        """Publish all of ``outbox``, and do what else follows from the commit.

        It is committed, so nothing here may fail the task that brought it about: the poller does again whatever does
        not succeed.
        """
        told = list(outbox.notices)
        try:
            self._deliver(outbox, told)
        finally:
            self._follower().tell(told)

    def _deliver(self, outbox: Outbox, told: list[Notice]) -> None:
        waiting = [outbox]
        while waiting:
            each = waiting.pop()
            for do in self._list_deeds(each):
                try:
                    following = do()
                except (OSError, KombuError, SQLAlchemyError, StoreUnreachable) as error:
                    logger.warning("could not publish, the poller will: %r", error)
                    return
                except Exception:
                    logger.exception("could not publish, the poller will try")
                else:
                    if following is not None:
                        waiting.append(following)
                        told += following.notices

    def _list_deeds(self, outbox: Outbox) -> Iterator[Callable[[], Outbox | None]]:
        follower = self._follower
        for row in outbox.steps:
            yield functools.partial(self.send_out, row)
        for owed in outbox.owes_pass:
            yield functools.partial(self.publish_advance, owed.id, owed.generation, owed.queue)
        if outbox.ended is not None:
            yield functools.partial(follower().on_ended, outbox.ended)
        for instance_id in dict.fromkeys(outbox.wakes):
            yield functools.partial(follower().wake, instance_id)
        for channel in dict.fromkeys(outbox.shared):
            yield functools.partial(follower().hand_out, channel)

    def send_out(self, row: HistoryRow) -> Outbox | None:
        """Publish the message of a step, or start the child that a record asks for."""
        if row.kind is Kind.CHILD:
            return self._follower().start_child(row)
        self.publish_step(row)
        return None

    def publish_start_of_child(self, row: HistoryRow, generation: str) -> None:
        """Publish the start task of a child instance that has been recorded."""
        args, kwargs = codec.plain_arguments(row.arguments or codec.encode_arguments((), {}, ""))
        options = {key: value for key, value in row.message_options.items() if key not in _COLUMNS}
        options |= {
            "task_id": row.child_id,
            "root_id": row.instance_id,
            "parent_id": row.instance_id,
            "headers": {**(options.get("headers") or {}), START_HEADER: {"generation": generation}},
            "expires": None,  # the record's matter: Celery would take the child for revoked
            "add_to_parent": False,
            **self.masks.representations(row.name, args, kwargs),
        }
        self._apply(row.name, args, kwargs, options)

    def publish_start(
        self, instance_id: str, generation: str, workflow: str, text: str, options: Mapping[str, Any]
    ) -> None:
        """Publish the start task of an instance that is recorded, with what else it was to begin with."""
        args, kwargs = codec.plain_arguments(text)
        headers = {**(options.get("headers") or {}), START_HEADER: {"generation": generation}}
        own = {"task_id": instance_id, "headers": headers, "expires": None}
        shown = self.masks.representations(workflow, args, kwargs)
        self._apply(workflow, args, kwargs, {**options, **own, **shown})

    def _apply(self, name: str, args: list[Any], kwargs: dict[str, Any], options: dict[str, Any]) -> None:
        task = self.app.tasks.get(name)
        if task is None:
            self.app.send_task(name, args, kwargs, **options)
        else:
            task.apply_async(args, kwargs, **options)

    def request_of(self, row: HistoryRow, hostname: str | None) -> dict[str, Any]:
        """Return what Celery's tracer is given of a step's message, for one that has none."""
        args, kwargs, options = self._message_of(row)
        priority, headers = options.get("priority"), options.pop("headers")
        queue = self._queue_name(row.name, row.message_options)
        ignored = options.pop("ignore_result", self.app.tasks[row.name].ignore_result)
        message = self.app.amqp.as_task_v2(name=row.name, args=args, kwargs=kwargs, ignore_result=ignored, **options)
        delivery = {"exchange": "", "routing_key": queue, "priority": priority, "redelivered": False}
        about = {"properties": message.properties, "reply_to": None, "correlation_id": options["task_id"]}
        own = {"args": args, "kwargs": kwargs, "hostname": hostname, "delivery_info": delivery, "is_eager": False}
        return {**message.headers, **headers, **about, **own}

    def publish_step(self, row: HistoryRow) -> None:
        args, kwargs, options = self._message_of(row)
        if row.is_foreign:
            options |= self._callbacks(row, options)
        task = self.app.tasks.get(row.name)
        if task is None or not _takes(task, args, kwargs):
            self.app.send_task(row.name, args, kwargs, **options)
        else:
            task.apply_async(args, kwargs, **options)

    def _message_of(self, row: HistoryRow) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """Return arguments and options of the message of a step."""
        args, kwargs = codec.plain_arguments(row.arguments or codec.encode_arguments((), {}, ""))
        options = {key: value for key, value in row.message_options.items() if key not in _COLUMNS}
        options |= {
            "task_id": task_id_of(row.key, row.dispatch),
            "root_id": row.instance_id,
            "parent_id": row.instance_id,
            "headers": {**(options.get("headers") or {}), **({} if row.is_foreign else {HEADER: header_of(row)})},
            "retries": row.celery_retries,
            # the record's matter: a worker drops every later message with an expired one's id
            "expires": (row.expires_at or row.message_options.get("expires")) if row.is_foreign else None,
            "add_to_parent": False,
            **self.masks.representations(row.name, args, kwargs),
        }
        if not row.is_foreign and not self.keeps_step_results:
            # what a step returned is in the store; a result backend takes two round trips a step to have it as well
            options.setdefault("ignore_result", True)
        return args, kwargs, options

    def _callbacks(self, row: HistoryRow, options: dict[str, Any]) -> dict[str, Any]:
        """Return the links by which a worker without this package settles a step."""

        def own(name: str) -> Any:
            return self.app.signature(name, kwargs={"step": header_of(row)}, queue=self._queue_name(name, {}))

        links = {"link": own(FOREIGN_SUCCEEDED), "link_error": own(FOREIGN_FAILED)}
        return {name: [*_as_list(options.get(name)), link] for name, link in links.items()}

    def publish_advance(self, instance_id: str, generation: str, queue: str | None) -> None:
        options: dict[str, Any] = {"queue": queue} if queue else {}
        self.app.send_task(
            ADVANCE,
            (instance_id, generation),
            root_id=instance_id,
            parent_id=instance_id,
            add_to_parent=False,
            ignore_result=True,
            **options,
        )

    def republish_pass(self, owed: OwedPass) -> None:
        self.publish_advance(owed.instance_id, owed.generation, owed.queue)

    def queue_of(self, row: HistoryRow | DueRecord) -> str | None:
        """Return the name of the queue that a step's message goes to, where routing says it."""
        return self._queue_name(row.name, row.message_options)

    def workflow_queue(self, workflow: str, options: dict[str, Any]) -> str | None:
        """Return the name of the queue that serves a workflow."""
        return self._queue_name(workflow, options)

    def queue_bound_to(self, delivery_info: dict[str, Any]) -> str | None:
        """Return the name of the queue that a message came by, where this worker knows how it is bound."""
        exchange, routing_key = delivery_info.get("exchange"), delivery_info.get("routing_key")
        for name, queue in self.app.amqp.queues.items():
            bound = (queue.exchange.name, queue.routing_key) if queue.exchange is not None else (None, None)
            if bound == (exchange, routing_key) or (not exchange and name == routing_key):
                return str(name)
        # one that the worker was told to consume while it ran: Celery gives it, its exchange and its key one name
        return str(routing_key) if routing_key and exchange in ("", routing_key) else None

    def _queue_name(self, name: str, options: dict[str, Any]) -> str | None:
        task = self.app.tasks.get(name)
        if task is not None:
            own = {key: value for key, value in task._get_exec_options().items() if value is not None}
            options = {**own, **options}
        queue = self.app.amqp.router.route(dict(options), name, (), {}, task).get("queue")
        found: str | None = getattr(queue, "name", queue)
        return found


def check_arguments(task: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise ``TypeError`` where Celery would; a task that is a class of its own is not checked."""
    header = getattr(task, "__header__", None)
    if task.typing and header is not None:
        header(*args, **kwargs)


def _takes(task: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether Celery lets the call pass; if not (a deploy changed the task), running it will say what is wrong."""
    try:
        check_arguments(task, args, kwargs)
    except TypeError:
        return False
    return True


def _as_list(links: Any) -> list[Any]:
    if links is None:
        return []
    return list(links) if isinstance(links, list | tuple) else [links]
