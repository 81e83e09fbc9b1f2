"""From records to Celery messages.  Publishing happens after the commit, and only rings the bell: a lost message is
published again by the poller, a doubled one finds its dispatch claimed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import codec
from orchestrator.runtime.change import Outbox
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Instance, OwedPass

logger = logging.getLogger("orchestrator")

HEADER = "orchestrator"
ADVANCE = "orchestrator.advance"

#: Options that are columns of the record: the message itself goes out when it may be claimed.
_COLUMNS = ("countdown", "eta", "expires")


def task_id_of(row: HistoryRow) -> str:
    """Return the id of the Celery task that is one dispatch of a step."""
    return f"{row.instance_id}:{row.run}:{row.seq}:{row.dispatch}"


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


class Dispatcher:
    """Publishes what was committed."""

    def __init__(self, app: Celery, on_ended: Callable[[Instance], None]) -> None:
        self.app = app
        self._on_ended = on_ended

    def deliver(self, outbox: Outbox) -> None:
        """Publish all of ``outbox``.

        It is committed, so nothing here may fail the task that brought it about: the poller does again whatever does
        not succeed.
        """
        try:
            for row in outbox.steps:
                self.publish_step(row)
            if outbox.owes_pass is not None:
                owed = outbox.owes_pass
                self.publish_advance(owed.id, owed.generation, owed.queue)
            if outbox.ended is not None:
                self._on_ended(outbox.ended)
        except (OSError, KombuError, SQLAlchemyError) as error:
            logger.warning("could not publish, the poller will: %r", error)
        except Exception:
            logger.exception("could not publish, the poller will try")

    def publish_step(self, row: HistoryRow) -> None:
        args, kwargs = codec.plain_arguments(row.arguments or codec.encode_arguments((), {}, ""))
        task = self.app.tasks.get(row.name)
        options = {key: value for key, value in row.message_options.items() if key not in _COLUMNS}
        options |= {
            "task_id": task_id_of(row),
            "root_id": row.instance_id,
            "parent_id": row.instance_id,
            "headers": {**options.get("headers", {}), HEADER: header_of(row)},
            "retries": row.celery_retries,
            "add_to_parent": False,
        }
        if task is None:
            self.app.send_task(row.name, args, kwargs, **options)
        else:
            task.apply_async(args, kwargs, **options)

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

    def queue_of(self, row: HistoryRow) -> str | None:
        """Return the name of the queue that a step's message goes to, where routing says it."""
        return self._queue_name(row.name, row.message_options)

    def workflow_queue(self, workflow: str, options: dict[str, Any]) -> str | None:
        """Return the name of the queue that serves a workflow."""
        return self._queue_name(workflow, options)

    def _queue_name(self, name: str, options: dict[str, Any]) -> str | None:
        task = self.app.tasks.get(name)
        if task is not None:
            own = {key: value for key, value in task._get_exec_options().items() if value is not None}
            options = {**own, **options}
        queue = self.app.amqp.router.route(dict(options), name, (), {}, task).get("queue")
        found: str | None = getattr(queue, "name", queue)
        return found
