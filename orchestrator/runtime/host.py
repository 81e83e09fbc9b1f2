"""The core's host on Celery: reads signatures, encodes with the codec, decodes by annotation."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.app.task import Task
from celery.canvas import Signature, maybe_signature

from orchestrator import codec, errors
from orchestrator.core.host import Call
from orchestrator.core.records import Compensation, Delivery, Failure, Outcome, Payload
from orchestrator.core.retry import RetryPolicy
from orchestrator.runtime.dispatch import check_arguments
from orchestrator.runtime.inputs import check_instance_id, encode_input, is_workflow
from orchestrator.runtime.mail import find_receiver
from orchestrator.runtime.registry import Registry
from orchestrator.runtime.running import about_pass, asking_the_store
from orchestrator.runtime.settings import Settings
from orchestrator.store.engine import Store

if TYPE_CHECKING:
    from orchestrator.runtime.known import KnownTasks

logger = logging.getLogger("orchestrator.workflow")

#: Options of a signature that hold for a step's message; Celery's own bookkeeping of ids and canvas does not.
_NOT_OPTIONS = frozenset(
    ("task_id", "root_id", "parent_id", "group_id", "group_index", "chord", "chain", "reply_to", "stamped_headers")
)


#: Options that say when; they become columns of the record.
_MOMENTS = {"countdown", "eta", "expires"}


class CeleryHost:
    """What ``decide()`` asks; one for all passes of an app."""

    def __init__(self, app: Celery, registry: Registry, known: KnownTasks, settings: Settings, store: Store) -> None:
        self.app = app
        self.store = store
        self.registry = registry
        self.known = known
        self.settings = settings
        self._decoders: dict[str, tuple[object, Callable[[str], Any]]] = {}

    @cached_property
    def _tasks(self) -> Any:
        """The tasks of the app, which it tells only by way of a lock."""
        return self.app.tasks

    # --- signatures -----------------------------------------------------------------------------------------------

    def read_members(self, step: object) -> Sequence[object] | None:
        """Return the members of a group of plain signatures, ``None`` for anything else."""
        if isinstance(step, Signature) and step.subtask_type == "group":
            return list(step.tasks)
        return None

    def identify(self, step: object) -> tuple[str, bool] | None:
        """Return the name of the task that a signature or a bare task calls, and whether it is a workflow's here."""
        if isinstance(step, Signature):
            if step.get("subtask_type"):
                return None
            name = step["task"]
        elif isinstance(step, Task):
            name = step.name
        else:
            return None
        return name, is_workflow(self._tasks.get(name))

    def read_call(self, step: object, item: tuple[Any, ...] = ()) -> Call:
        """Read a signature or a bare task, ``item`` going before its arguments; refuse what cannot be a step."""
        signature = self._signature(step)
        name = signature.task
        args = (*item, *signature.args)
        self._check_arguments(name, args, signature.kwargs)
        defaults = self.registry.find_defaults(name)
        task = self.app.tasks.get(name)
        if is_workflow(task) or (task is None and self._is_workflow_elsewhere(name)):
            return self._read_child(signature, task, args)
        return Call(
            name,
            codec.encode_arguments(args, signature.kwargs, f"the arguments of {name}", self.settings.max_payload_bytes),
            self._options(signature),
            self.registry.find_plan(name),
            defaults.retry,
            defaults.timeout_seconds,
        )

    def _read_child(self, signature: Any, task: Any, args: tuple[Any, ...]) -> Call:
        name, limit = signature.task, self.settings.max_payload_bytes
        if task is not None:
            arguments = task.encode_input(args, signature.kwargs)
        else:
            arguments = codec.encode_arguments(args, signature.kwargs, f"the input of {name}", limit)
        child_id = signature.options.get("task_id")
        return Call(
            name,
            arguments,
            self._options(signature),
            self.registry.find_plan(name),
            is_workflow=True,
            child_id=None if child_id is None else check_instance_id(child_id),
        )

    def read_compensation(
        self, compensate: object, retry: RetryPolicy | None = None, *, of_step: bool = True
    ) -> Compensation:
        """Read what ``compensate=`` was given, or ``ctx.compensate``, which belongs to no step and gets no result."""
        signature = self._signature(compensate)
        name = signature.task
        if is_workflow(self.app.tasks.get(name)):
            raise errors.ContextMisused(f"{name} is a workflow; a compensation is a task")
        takes_result = of_step and not signature.immutable
        given = (None,) if takes_result else ()
        self._check_arguments(name, (*given, *signature.args), signature.kwargs)
        limit = self.settings.max_payload_bytes
        return Compensation(
            name,
            codec.encode_arguments(signature.args, signature.kwargs, f"the arguments of {name}", limit),
            "result" if takes_result else "nothing",
            self._options(signature),
            self.registry.compensation_retry(name, retry),
        )

    def _signature(self, step: object) -> Any:
        if isinstance(step, Task):
            step = step.s()
        signature = maybe_signature(step, app=self.app) if isinstance(step, dict) else None
        if signature is None:
            raise errors.ContextMisused(f"a step is a Celery signature (or a task without arguments), not {step!r}")
        if signature.subtask_type:
            raise errors.ContextMisused(f"a {signature.subtask_type} cannot be a step; run its tasks one by one")
        return signature

    def check_known(self, name: str) -> None:
        """Refuse a task that is registered neither here nor on a live worker."""
        if name not in self.app.tasks and not self.known.on_live_worker(name):
            raise errors.UnknownTask(name)

    def _check_arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        task = self.app.tasks.get(name)
        if task is not None and not is_workflow(task):
            check_arguments(task, args, kwargs)

    def _options(self, signature: Any) -> dict[str, Any]:
        options = {key: value for key, value in signature.options.items() if key not in _NOT_OPTIONS}
        expires = getattr(self.app.tasks.get(signature.task), "expires", None)
        if expires is not None:
            options.setdefault("expires", expires)
        for name in _MOMENTS & options.keys():
            _check_moment(name, options[name], signature.task)
        codec.encode(options, f"the options of {signature.task}", self.settings.max_payload_bytes)
        return options

    # --- values ---------------------------------------------------------------------------------------------------

    def encode(self, value: object, what: str) -> Payload:
        """Encode, or raise ``NotEncodable`` or ``PayloadTooLarge`` naming ``what``."""
        return codec.encode(value, what, self.settings.max_payload_bytes)

    def decode(self, payload: Payload, name: str, returns: object) -> Any:
        """Decode the result of ``name``, as ``returns`` unless that is ``None``."""
        if returns is not None:
            return codec.decode(payload, returns)
        task = self._tasks.get(name)
        known = self._decoders.get(name)
        if known is not None and known[0] is task:
            return known[1](payload)
        decoder, is_final = codec.result_decoder(getattr(task, "function", None) or getattr(task, "run", None))
        if is_final:
            self._decoders[name] = task, decoder
        return decoder(payload)

    def decode_message(self, payload: Payload, returns: object) -> Any:
        """Decode a message, as ``returns`` unless that is ``None``."""
        return codec.decode(payload) if returns is None else codec.decode(payload, returns)

    def encode_input(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
        """Encode the input of a workflow function, or refuse what does not fit its parameters."""
        return encode_input(function, function.__qualname__, args, kwargs, self.settings.max_payload_bytes)

    def find_receiver(self, instance_id: str) -> Delivery:
        """Tell whether an instance can be sent messages."""
        with asking_the_store(), self.store.read("find-receiver") as connection:
            return find_receiver(connection, instance_id)

    def _is_workflow_elsewhere(self, name: str) -> bool:
        with asking_the_store():
            return self.known.is_workflow(name)

    def perform(
        self, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Outcome, Payload | None, Failure | None]:
        """Run a ``ctx.local`` function."""
        name = getattr(function, "__qualname__", repr(function))
        return Outcome.SUCCEEDED, self.encode(function(*args), f"the result of {name}"), None

    def describe(self, error: BaseException) -> Failure:
        """Return what of an exception is recorded."""
        return codec.describe_error(error)

    def logger(self, is_replaying: Callable[[], bool]) -> logging.LoggerAdapter[logging.Logger]:
        """Return a logger that is silent while ``is_replaying()``."""
        return _QuietLogger(logger, is_replaying)


def _check_moment(name: str, value: object, task: str) -> None:
    """Refuse a countdown, eta or expiry from which no instant can be told."""
    if isinstance(value, datetime) and value.tzinfo is None:
        raise errors.NaiveDatetime(f"{name} of {task}", value)
    kinds = {"countdown": int | float, "eta": datetime, "expires": int | float | datetime}
    if value is not None and not isinstance(value, kinds[name]):
        raise errors.ContextMisused(f"{name} of {task} is {value!r}; give seconds, or for eta and expires a datetime")


class _QuietLogger(logging.LoggerAdapter[logging.Logger]):
    def __init__(self, own: logging.Logger, is_replaying: Callable[[], bool]) -> None:
        super().__init__(own)
        self._is_replaying = is_replaying

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the name is logging's
        return not self._is_replaying() and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Say in each record whose it is, beside what the workflow says."""
        return msg, {**kwargs, "extra": {**about_pass(), **(kwargs.get("extra") or {})}}
