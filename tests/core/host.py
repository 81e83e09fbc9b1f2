"""A host in plain Python: the little of Celery that the core can see, with nothing of Celery in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator import errors
from orchestrator.core.host import Call
from orchestrator.core.records import Compensation, Delivery, Failure, Outcome, Payload
from orchestrator.core.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class Signature:
    """One call of a task; ``immutable`` as Celery means it."""

    task: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    immutable: bool = False

    def set(self, **options: Any) -> Signature:
        return replace(self, options={**self.options, **options})


@dataclass(frozen=True, slots=True)
class Group:
    """Signatures that run side by side."""

    members: tuple[Signature, ...]


def group(*members: Signature) -> Group:
    return Group(members)


@dataclass(slots=True)
class Task:
    """A registered task, with the defaults registered for it."""

    name: str
    compensation: Compensation | None = None
    retry: RetryPolicy | None = None
    timeout_seconds: float | None = None
    is_workflow: bool = False

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        return Signature(self.name, args, kwargs)

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        return Signature(self.name, args, kwargs, immutable=True)


class Log:
    """What a workflow has logged while it was not replaying."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def bind(self, is_silent: Callable[[], bool]) -> BoundLog:
        return BoundLog(self.lines, is_silent)


@dataclass(frozen=True, slots=True)
class BoundLog:
    lines: list[str]
    is_silent: Callable[[], bool]

    def info(self, line: str) -> None:
        if not self.is_silent():
            self.lines.append(line)


class FakeHost:
    """Implements ``orchestrator.core.host.Host`` over JSON and the tasks it was told of."""

    def __init__(self, max_payload_bytes: int = 10_000) -> None:
        self.tasks: dict[str, Task] = {}
        self.performed: list[str] = []
        self.receivers: dict[str, Delivery] = {}
        self.log = Log()
        self.max_payload_bytes = max_payload_bytes

    def task(self, name: str, **defaults: Any) -> Task:
        self.tasks[name] = Task(name, **defaults)
        return self.tasks[name]

    def read_members(self, step: object) -> Sequence[object] | None:
        return step.members if isinstance(step, Group) else None

    def identify(self, step: object) -> tuple[str, bool] | None:
        if not isinstance(step, Signature | Task):
            return None
        name = step.name if isinstance(step, Task) else step.task
        task = self.tasks.get(name)
        return name, task is not None and task.is_workflow

    def read_call(self, step: object, item: tuple[Any, ...] = ()) -> Call:
        signature = self._signature(step)
        task = self.tasks.get(signature.task) or Task(signature.task)
        return Call(
            task.name,
            self._arguments(signature, item),
            signature.options,
            task.compensation,
            task.retry,
            task.timeout_seconds,
            is_workflow=task.is_workflow,
            child_id=signature.options.get("task_id"),
        )

    def read_compensation(
        self, compensate: object, retry: RetryPolicy | None = None, *, of_step: bool = True
    ) -> Compensation:
        signature = self._signature(compensate)
        passes: Literal["result", "nothing"] = "result" if of_step and not signature.immutable else "nothing"
        return Compensation(signature.task, self._arguments(signature, ()), passes, signature.options, retry)

    def _signature(self, step: object) -> Signature:
        signature = step.s() if isinstance(step, Task) else step
        if not isinstance(signature, Signature):
            raise errors.ContextMisused(f"{step!r} is no signature")
        return signature

    def check_known(self, name: str) -> None:
        if name not in self.tasks:
            raise errors.UnknownTask(name)

    def _arguments(self, signature: Signature, item: tuple[Any, ...]) -> Payload:
        given = {"args": [*item, *signature.args], "kwargs": signature.kwargs}
        return self.encode(given, f"the arguments of {signature.task}")

    def encode(self, value: object, what: str) -> Payload:
        try:
            payload = json.dumps(value, separators=(",", ":"))
        except TypeError as error:
            raise errors.NotEncodable(what, str(error)) from None
        if len(payload) > self.max_payload_bytes:
            raise errors.PayloadTooLarge(what, len(payload), self.max_payload_bytes)
        return payload

    def decode(self, payload: Payload, name: str, returns: object) -> Any:
        value = json.loads(payload)
        if isinstance(returns, type) and not isinstance(value, returns):
            raise errors.ResultMismatch(f"{name} returned {value!r}")
        return value

    def decode_message(self, payload: Payload, returns: object) -> Any:
        return self.decode(payload, "the message", returns)

    def encode_input(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
        return self.encode({"args": list(args), "kwargs": kwargs}, f"the input of {function.__qualname__}")

    def find_receiver(self, instance_id: str) -> Delivery:
        return self.receivers.get(instance_id, Delivery.UNKNOWN)

    def perform(
        self, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Outcome, Payload | None, Failure | None]:
        self.performed.append(function.__qualname__)
        return Outcome.SUCCEEDED, self.encode(function(*args), "the result of a local"), None

    def describe(self, error: BaseException) -> Failure:
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__[:-1]]
        return Failure(names[0], tuple(names[1:]), str(error))

    def logger(self, is_replaying: Callable[[], bool]) -> BoundLog:
        return self.log.bind(is_replaying)


def failure(cls: type[BaseException], message: str = "no") -> Failure:
    """Return what is recorded of an exception of ``cls`` that an activity raised."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__[:-1]]
    return Failure(names[0], tuple(names[1:]), message)
