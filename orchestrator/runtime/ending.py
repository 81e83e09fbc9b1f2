"""What the end of an instance means to Celery: callbacks, the rest of a chain, the chord, the result backend.

All of it is what a worker does when the body of a plain task has ended, in the same order.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from celery import Celery, states
from celery.app.task import Context as CeleryRequest
from celery.backends.base import BaseKeyValueStoreBackend, DisabledBackend
from celery.canvas import Signature, maybe_signature
from celery.exceptions import BackendError, TaskRevokedError
from celery.result import GroupResult
from kombu.exceptions import KombuError
from kombu.exceptions import SerializationError as NotSerializable

from orchestrator import codec, errors
from orchestrator.core.records import Failure, Kind
from orchestrator.runtime import kept
from orchestrator.runtime.dispatch import task_id_of
from orchestrator.store.engine import is_transient
from orchestrator.store.history import Part
from orchestrator.store.instances import Instance, Status

logger = logging.getLogger("orchestrator")

REVOKED = (Status.CANCELLED, Status.TERMINATED)


class ChordHeld(BackendError):
    """Somebody began to fire the chord, and may have died before it did: its part has to be returned again."""


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


def is_passing(backend: Any, error: Exception) -> bool:
    """Tell whether an error is one of a broker, result backend or store that may be there again later."""
    if isinstance(error, NotSerializable):
        return False
    kinds = (OSError, KombuError, BackendError, errors.StoreUnreachable)
    return isinstance(error, kinds) or is_transient(error) or backend.exception_safe_to_retry(error)


class Ending:
    """The end of an instance, as the end of its Celery task."""

    def __init__(
        self, app: Celery, instance: Instance, parts: Sequence[Part], is_repeated: bool, keeps_results: bool
    ) -> None:
        self.app = app
        self.instance = instance
        self.backend = app.backend
        self.is_repeated = is_repeated
        self.kept = kept.read(instance.request)
        self.keeps_trail = getattr(app.tasks.get(instance.workflow), "trail", True)
        self.request = self._make_request(parts)
        self.has_backend = keeps_results and not isinstance(self.backend, DisabledBackend)
        self.is_stored = self.has_backend and not self.request.ignore_result

    def _make_request(self, parts: Sequence[Part]) -> Any:
        """Return the request of the start task, as it would be if its body had run until now."""
        instance = self.instance
        args, kwargs = codec.plain_arguments(instance.input)
        of_task = {
            "id": instance.id,
            "task": instance.workflow,
            "args": args,
            "kwargs": kwargs,
            "delivery_info": {"routing_key": instance.queue, "priority": self.kept.priority},
        }
        # as a worker has them: all together, and each by its name where that is not one of Celery's own
        headers = self.kept.request.get("headers") or {}
        request = CeleryRequest({**headers, **of_task, **self.kept.request})
        if self.keeps_trail:
            own = (part.child_id if part.kind is Kind.CHILD else task_id_of(part.key, part.dispatch) for part in parts)
            request.children.extend(self.app.AsyncResult(each) for each in own)
        return request

    def list_deeds(self) -> list[Callable[[], None]]:
        """Return what is to be told, in order; how much of it was told is kept by its number."""
        instance = self.instance
        # one that is being undone, or was, had completed: that is the end that is owed
        if instance.status is Status.COMPLETED or instance.undo_order is not None:
            return self._after_success(codec.decode(instance.result or "null"))
        error = failure_of(instance)
        if instance.status in REVOKED:
            return self._after_failure(TaskRevokedError(error.message or str(instance.status)), None, states.REVOKED)
        return self._after_failure(error, error.traceback, states.FAILURE)

    def _after_success(self, result: Any) -> list[Callable[[], None]]:
        request = self.request
        links = [functools.partial(self._send, link, result, []) for link in request.callbacks or ()]
        if request.chain:
            links.append(functools.partial(self._send, request.chain[-1], result, list(request.chain[:-1])))
        without_chord = self._part_of_request(chord=None)
        store = functools.partial(self.backend.mark_as_done, self.instance.id, result, without_chord, self.is_stored)
        return [*links, store, *self._chord_part(states.SUCCESS, result)]

    def _after_failure(self, error: Exception, traceback: str | None, state: str) -> list[Callable[[], None]]:
        fail = functools.partial(self.backend.mark_as_failure, self.instance.id, error, traceback, state=state)
        # the chain fails with it, also where Celery, which revokes a plain task, leaves its chain waiting for ever
        chain = self.request.chain if self.has_backend else None
        is_stored = self.has_backend and (self.is_stored or self.app.conf.task_store_errors_even_if_ignored)
        without_chord = self._part_of_request(chord=None, chain=chain)
        store = functools.partial(fail, without_chord, is_stored, call_errbacks=False)
        call_errbacks = functools.partial(fail, self._part_of_request(chord=None, chain=None), store_result=False)
        errbacks = [call_errbacks] if self.request.errbacks else []
        return [store, *self._chord_part(state, error), *self._chord_parts_of_chain(state, error), *errbacks]

    def _part_of_request(self, **changed: Any) -> Any:
        # its children among the rest, in the list to which those are added that are sent before it is told
        return CeleryRequest({**vars(self.request), "_children": self.request.children, **changed})

    # --- what follows it ------------------------------------------------------------------------------------------

    def _send(self, link: Any, result: Any, chain: list[Any]) -> None:
        """Publish what follows a success; what cannot be sent at all has failed."""
        following = maybe_signature(link, app=self.app)
        options: dict[str, Any] = {"parent_id": self.instance.id, "root_id": self.request.root_id or self.instance.id}
        if self.app.conf.task_inherit_parent_priority and self.kept.priority is not None:
            options["priority"] = self.kept.priority
        if chain:
            options["chain"] = chain
        try:
            sent = following.apply_async((result,), **options)
        except Exception as error:
            if is_passing(self.backend, error):
                raise
            logger.exception("%s, which follows %s, cannot be sent", following.task, self.instance.id)
            self._fail_what_follows(following, chain, error)
        else:
            if self.keeps_trail:
                self.request.children.append(sent)

    def _fail_what_follows(self, following: Signature, chain: list[Any], error: Exception) -> None:
        """Have Celery take a task for failed that could not be sent, and all that would have followed it."""
        options = following.options
        group = {"chord": options.get("chord"), "group": options.get("group_id")}
        errbacks = [*(options.get("link_error") or ()), *(self.request.errbacks or () if chain else ())]
        chain = chain if self.has_backend else []
        of_task = {"id": options.get("task_id") or self.instance.id, "task": following.task, "delivery_info": {}}
        request = CeleryRequest({**of_task, **group, "chain": chain, "errbacks": errbacks})
        self.backend.mark_as_failure(request.id, error, None, request, self.has_backend)

    @contextmanager
    def outside_of_the_trail(self) -> Iterator[None]:
        """Keep what is sent here from counting as sent by the task that this process happens to run."""
        task = self.app.current_worker_task
        trail = list(task.request.children) if task else []
        try:
            yield
        finally:
            if task:
                task.request.children[:] = trail

    # --- its chord ------------------------------------------------------------------------------------------------

    def _chord_part(self, state: str, result: Any) -> list[Callable[[], None]]:
        if not self.request.chord or not self.has_backend:
            return []
        return [functools.partial(self._return_chord_part, self.request, state, result)]

    def _chord_parts_of_chain(self, state: str, error: Exception) -> list[Callable[[], None]]:
        """Return the parts of what fails with the instance again, where Celery would take them for returned.

        It stores the failure of a chord's member before it returns its part, and a process may have died in between.
        """
        if not self.is_repeated or not self.has_backend:
            return []
        waiting = [maybe_signature(each, app=self.app) for each in self.request.chain or ()]
        # a chord that was to run has ended when its body has
        bodies = [each.body if each.subtask_type == "chord" else each for each in waiting]
        members = [each.options for each in bodies if each.options.get("chord")]
        requests = [
            CeleryRequest({**each, "id": each.get("task_id"), "group": each.get("group_id")}) for each in members
        ]
        return [functools.partial(self._return_chord_part, each, state, error) for each in requests]

    def _return_chord_part(self, request: Any, state: str, result: Any) -> None:
        if self.is_repeated and _counts_blindly(self.backend):
            self._watch_chord(request)
            return
        self.backend.on_chord_part_return(request, state, result)
        if self.is_repeated and self._is_chord_held(request):
            raise ChordHeld(f"the chord of {self.instance.id} is being fired, or was when its process died")

    def _watch_chord(self, request: Any) -> None:
        """Have the members of the chord looked at until all have ended: this one may have been counted, or not.

        Counted twice it would fire the chord while another one still runs.
        """
        header = GroupResult.restore(request.group, backend=self.backend, app=self.app)
        if header is not None:  # else it was fired
            self.backend.fallback_chord_unlock(header, maybe_signature(request.chord, app=self.app))

    def _is_chord_held(self, request: Any) -> bool:
        """Tell whether a process has taken it on to fire the chord, on Redis, and has not said that it did.

        While its claim lasts, nobody else fires the chord; when it has run out, whoever returns a part does.
        """
        if not hasattr(self.backend, "_chord_part_return_script"):  # or an older Celery, which knows no claims
            return False
        claim = self.backend.client.get(self.backend.get_key_for_group(request.group, ".c"))
        return claim not in (None, b"done", "done")


def _counts_blindly(backend: Any) -> bool:
    """Tell whether a result backend counts the parts of a chord without knowing which they are."""
    own = type(backend).on_chord_part_return
    if own is BaseKeyValueStoreBackend.on_chord_part_return:
        return bool(getattr(backend, "implements_incr", False))
    # Redis before Celery 5.7 pushes each part onto a list, where chords are not ordered
    return hasattr(backend, "_chord_zset") and not (
        backend._chord_zset or hasattr(backend, "_chord_part_return_script")
    )
