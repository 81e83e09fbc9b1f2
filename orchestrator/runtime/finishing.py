"""What follows the end of an instance: callbacks, the rest of a chain, the chord, the result backend.

A final status commits with a ``finish`` row, which is deleted when all of this has been done; until then the poller
repeats it, with the same task ids.
"""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from celery import Celery, states
from celery.app.task import Context as CeleryRequest
from celery.backends.base import DisabledBackend
from celery.canvas import maybe_signature
from celery.exceptions import BackendError
from kombu.exceptions import KombuError

from orchestrator import codec, errors
from orchestrator.core.records import Failure
from orchestrator.store import instances
from orchestrator.store.engine import Store
from orchestrator.store.instances import Instance, Status

logger = logging.getLogger("orchestrator")

#: What of a Celery request has to be kept until the instance has ended.
_KEPT = (
    "root_id",
    "parent_id",
    "callbacks",
    "errbacks",
    "chain",
    "chord",
    "group",
    "group_index",
    "ignore_result",
    "reply_to",
    "correlation_id",
)

REVOKED = (Status.CANCELLED, Status.TERMINATED)


def request_of(request: Any) -> str:
    """Return what of the start task's request is recorded with the instance."""
    kept = {name: getattr(request, name, None) for name in _KEPT}
    return codec.encode({name: value for name, value in kept.items() if value}, "the request")


def failure_of(instance: Instance) -> Any:
    """Return the exception that an instance which did not complete ended with."""
    failure = codec.load(Failure, instance.failure) if instance.failure else Failure("builtins.Exception", (), "")
    return errors.in_class_of(
        errors.WorkflowFailed,
        failure.type,
        failure.bases,
        instance_id=instance.id,
        status=str(instance.status),
        message=failure.message,
        traceback=failure.traceback,
    )


class Finisher:
    """Tells Celery how an instance ended."""

    def __init__(self, app: Celery, store: Store) -> None:
        self.app = app
        self.store = store

    def on_ended(self, instance: Instance) -> None:
        """Pay at once what the end of ``instance`` owes; the poller does what fails here."""
        self.finish(instance.id, instance.generation)

    def finish(self, instance_id: str, generation: str) -> None:
        with self.store.read("finishing") as connection:
            instance = instances.find_instance(connection, instance_id)
        if instance is not None and instance.generation == generation:
            try:
                self._tell(instance)
            except (OSError, KombuError, BackendError) as error:
                logger.warning("what follows %s could not be told yet: %r", instance_id, error)
                return
        with self.store.begin("finished") as connection:
            instances.delete_finish(connection, instance_id, generation)

    def _tell(self, instance: Instance) -> None:
        kept = json.loads(instance.request) if instance.request else {}
        request = CeleryRequest({"id": instance.id, "task": instance.workflow, "args": (), "kwargs": {}, **kept})
        backend = self.app.backend
        has_backend = not isinstance(backend, DisabledBackend)
        if has_backend and backend.get_state(instance.id) in states.READY_STATES:
            return  # told before: a chord's part must not count twice
        stores = has_backend and not kept.get("ignore_result")
        # one that is being undone, or was, had completed: that is the end that is owed
        if instance.status is Status.COMPLETED or instance.undo_order is not None:
            result = codec.decode(instance.result or "null")
            self._go_on(instance, request, result)
            backend.mark_as_done(instance.id, result, request, stores)
        elif instance.status in REVOKED:
            backend.mark_as_revoked(instance.id, str(instance.status), request, stores)
        else:
            error = failure_of(instance)
            backend.mark_as_failure(instance.id, error, error.traceback, request, stores)

    def _go_on(self, instance: Instance, request: Any, result: Any) -> None:
        ids = {"parent_id": instance.id, "root_id": request.root_id or instance.id}
        for index, callback in enumerate(request.callbacks or ()):
            self._send(callback, instance, f"callback:{index}", result, ids)
        if request.chain:
            self._send(request.chain[-1], instance, "chain", result, {**ids, "chain": request.chain[:-1]})

    def _send(self, signature: Any, instance: Instance, role: str, result: Any, options: dict[str, Any]) -> None:
        following = maybe_signature(signature, app=self.app)
        if not following.options.get("task_id"):
            # the same id whenever it is repeated, so that a double can be told
            name = f"{instance.id}:{instance.generation}:{role}"
            options = {**options, "task_id": str(uuid.uuid5(uuid.NAMESPACE_URL, name))}
        following.apply_async((result,), **options)
