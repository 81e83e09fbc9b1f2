"""A workflow as a Celery task."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

from celery.app.task import Task
from celery.exceptions import Ignore
from celery.result import EagerResult

from orchestrator import codec, errors
from orchestrator.runtime import softlimit
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.runtime.inputs import check_instance_id, encode_input
from orchestrator.runtime.marking import BackendOfStarts
from orchestrator.runtime.owner import orchestrator_of


class WorkflowTask(Task):
    """What ``@orchestrator.workflow`` makes of a function.

    ``delay`` and ``apply_async`` send a plain message, whose task records the instance; the instance id is the task id.
    ``orchestrator.start`` is durable from the call on.
    """

    abstract = True
    is_workflow = True
    acks_late = True
    # the instance may not be recorded yet when the process that took the message dies; and once it is recorded,
    # passes that end their process are counted
    reject_on_worker_lost = True
    max_retries = None  # while the store is away
    typing = False
    function: Callable[..., Any]
    parks = False
    deadline: timedelta | None = None

    @property
    def backend(self) -> Any:
        """The result backend, which the end of an instance tells of it, not that of its start task."""
        return BackendOfStarts(self._get_app(), super().backend)

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> WorkflowHandle:
        """Send the workflow's start task; arguments of any kind that the codec knows are refused or taken here."""
        if options.get("task_id") is not None:
            check_instance_id(options["task_id"])
        orchestrator = orchestrator_of(self._get_app())
        if orchestrator.is_eager:
            return orchestrator.eager.delay(self, args, kwargs, options)
        text = self.encode_input(tuple(args or ()), dict(kwargs or {}))
        plain_args, plain_kwargs = codec.plain_arguments(text)
        options = {**orchestrator.masks.representations(self.name, plain_args, plain_kwargs), **options}
        handle: WorkflowHandle = super().apply_async(plain_args, plain_kwargs, **options)
        return handle

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Call ``delay`` when Django's transaction has committed; needs Django."""
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(self, args: Any = None, kwargs: Any = None, **options: Any) -> None:
        """Call ``apply_async`` when Django's transaction has committed, as every Celery task does under Django.

        Bad input is refused at the call.  It is lost if the process ends between the commit and the message;
        ``orchestrator.start(…, session=connection)`` is not.
        """
        from django.db import transaction

        self.encode_input(tuple(args or ()), dict(kwargs or {}))
        transaction.on_commit(functools.partial(self.apply_async, args, kwargs, **options))

    def apply(self, args: Any = None, kwargs: Any = None, throw: bool | None = None, **options: Any) -> EagerResult:
        """Run an instance here and now, to its end: its steps in this process, its timers without waiting.

        Raises ``EagerModeStuck`` for one that waits for what nobody here can bring: a message, or an operator.
        """
        return orchestrator_of(self._get_app()).eager.apply(self, args, kwargs, throw, options)

    def map(self, it: Any) -> NoReturn:  # noqa: ARG002
        """Refuse, as ``starmap`` and ``chunks`` do, what would call the function inside of another task."""
        self._refuse("map")

    def starmap(self, it: Any) -> NoReturn:  # noqa: ARG002
        self._refuse("starmap")

    def chunks(self, it: Any, n: int) -> NoReturn:  # noqa: ARG002
        self._refuse("chunks")

    def _refuse(self, name: str) -> NoReturn:
        raise errors.InvalidOperation(
            f"{self.name} is a workflow, which {name}() would call inside of one other task; start one for each item, "
            "with a group, or have one workflow run them with ctx.map"
        )

    def encode_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the input as it is recorded: bound to the function's parameters, checked against its annotations."""
        limit = orchestrator_of(self._get_app()).settings.max_payload_bytes
        return encode_input(self.function, self.name, args, kwargs, limit)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> WorkflowHandle:  # noqa: N802 - the name is Celery's
        """Return the handle of an instance."""
        return WorkflowHandle(task_id, app=self._get_app(), task_name=self.name, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as Celery does; called like a function it says how a workflow is started."""
        if self.request.called_directly:
            raise errors.ContextMisused(f"{self.name} is a workflow: start it with .delay() or orchestrator.start()")
        return super().__call__(*args, **kwargs)


def make_run(function: Callable[..., Any]) -> Callable[..., None]:
    """Return the body of a workflow's Celery task: record the instance, and make its first pass."""

    @functools.wraps(function)
    def run(self: WorkflowTask, *args: Any, **kwargs: Any) -> None:
        orchestrator = orchestrator_of(self._get_app())
        # a time limit of the app's is not the workflow's: raised inside its function it would be a failure of its own
        with softlimit.deferred(in_pool_process=orchestrator.executing.is_child):
            orchestrator.starter.begin(self, args, kwargs)
        self.request.ignored = Ignore()  # its result is told when the instance has ended
        raise self.request.ignored

    return run


def drop_traceback(task: Any = None, **_kwargs: Any) -> None:
    """Part what was raised in a start task from where it was raised (Celery's ``task_postrun``).

    The two refer to each other, with all that billiard copies of the code, 130 KB: garbage that is collected late.
    """
    ignored = getattr(task.request, "ignored", None)
    if ignored is not None:
        ignored.__traceback__ = None


def workflow_options(
    function: Callable[..., Any], park: bool, deadline: object, options: dict[str, Any]
) -> dict[str, Any]:
    """Return what ``app.task`` is given to make a workflow of ``function``, or refuse it."""
    if not inspect.isfunction(function):
        raise errors.ContextMisused(f"a workflow is a function, not {function!r}")
    name = function.__qualname__
    if function.__name__ == "<lambda>":
        raise errors.ContextMisused(f"{name} has no name that its instances could be found by; define a function")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise errors.ContextMisused(f"{name} is async; a workflow is a plain function, its waits are calls of ctx")
    if inspect.isgeneratorfunction(function):
        raise errors.ContextMisused(
            f"{name} is a generator; a workflow is a plain function, its waits are calls of ctx"
        )
    if not inspect.signature(function).parameters:
        raise errors.ContextMisused(f"{name} takes no arguments; the first one of a workflow is its context")
    if deadline is not None and not (isinstance(deadline, timedelta) and deadline > timedelta()):
        raise errors.ConfigurationError(f"the deadline of {name} is {deadline!r}; give a positive timedelta")
    own = {"bind": True, "base": WorkflowTask, "function": staticmethod(function)}
    return {**options, **own, "parks": park, "deadline": deadline}
