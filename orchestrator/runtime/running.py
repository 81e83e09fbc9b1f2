"""Running the workflow functions that are registered in this process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import Celery
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import codec, errors
from orchestrator.core.host import Host
from orchestrator.core.live import LivePass
from orchestrator.core.records import Broken, Decision, Event, Failed, History, Record
from orchestrator.core.replay import decide
from orchestrator.runtime.passes import WorkflowOptions
from orchestrator.store.instances import Instance

_in_pass: ContextVar[bool] = ContextVar("orchestrator_in_pass", default=False)
#: Of what instance a pass is made, for lines of its log.
_about: ContextVar[dict[str, Any]] = ContextVar("orchestrator_pass_about")
#: What went wrong while the present pass asked the store for something.
_trouble: ContextVar[list[BaseException]] = ContextVar("orchestrator_trouble")


class RegisteredWorkflows:
    """The workflows of an app."""

    def __init__(self, app: Celery, host: Host, *, keeps_live: bool = False) -> None:
        self.app = app
        self.host = host
        self.keeps_live = keeps_live

    def find(self, workflow: str) -> Any | None:
        """Return the workflow's task, ``None`` where it is not registered here."""
        task = self.app.tasks.get(workflow)
        return task if getattr(task, "is_workflow", False) else None

    def knows(self, workflow: str) -> bool:
        return self.find(workflow) is not None

    def names(self) -> list[str]:
        return sorted(name for name, task in self.app.tasks.items() if getattr(task, "is_workflow", False))

    def options(self, workflow: str) -> WorkflowOptions:
        """Return what the workflow was declared with."""
        task = self.find(workflow)
        return WorkflowOptions() if task is None else WorkflowOptions(task.parks, task.deadline)

    def decide(self, instance: Instance, history: History) -> tuple[Decision, LivePass | None]:
        """Make a pass of an instance over its history; return what can go on from where it ended, if that is kept."""
        task = self.find(instance.workflow)
        if task is None:
            raise errors.UnknownWorkflow(instance.workflow)
        try:
            args, kwargs = codec.decode_arguments(instance.input, codec.annotations_of(task.function), 1, strict=True)
            inspect.signature(task.function).bind(None, *args, **kwargs)
        except TypeError as error:  # ResultMismatch, too, is one
            failure = codec.describe_error(error)
            # before the first step it is the input that is wrong; later on it is the deploy that no longer takes it
            return Decision(Broken(failure) if history.records else Failed(failure, undone=False)), None
        if not self.keeps_live:
            with _inside_pass(instance):
                return decide(task.function, tuple(args), kwargs, history, self.host), None
        live = LivePass(task.function, tuple(args), kwargs, history, self.host)
        with _inside_pass(instance):
            return live.decide(), live

    def go_on(self, live: LivePass, instance: Instance, records: Sequence[Record], events: Sequence[Event]) -> Decision:
        """Make the next pass of an instance from where ``live`` stands, with what it does not know, or not as it is.

        Raises ``CannotGoOn`` where that does not fit.
        """
        with _inside_pass(instance):
            return live.go_on(records, events, passed_order=instance.passed_order)


@contextmanager
def _inside_pass(instance: Instance) -> Iterator[None]:
    token, trouble = _in_pass.set(True), _trouble.set([])
    about = _about.set({"instance_id": instance.id, "workflow": instance.workflow, "run": instance.run})
    try:
        try:
            yield
        finally:
            if found := _trouble.get():
                # whatever the function made of it: what was decided on an answer that never came is void
                raise found[0]
    finally:
        _about.reset(about)
        _in_pass.reset(token)
        _trouble.reset(trouble)


def about_pass() -> dict[str, Any]:
    """Return what a line of the log is about that is written in a pass."""
    return _about.get({})


class PassInterrupted(BaseException):
    """The store could not be asked during a pass.

    Not an ``Exception``: it must not be taken for the workflow's own failure, and undo it.
    """


@contextmanager
def asking_the_store() -> Iterator[None]:
    """Void the pass that is being made, if the store cannot be asked: it is rolled back, and made again."""
    try:
        yield
    except (SQLAlchemyError, errors.StoreUnreachable) as error:
        _trouble.get().append(error)
        raise PassInterrupted from error


def check_outside_of_passes(name: str) -> None:
    """Refuse to send ``name`` while a workflow function runs."""
    if _in_pass.get():
        raise errors.SentInsideWorkflow(name)


def refuse_inside_passes(call: str, instead: str = "do it in an activity") -> None:
    """Refuse a call that changes an instance while a workflow function runs."""
    if _in_pass.get():
        raise errors.ContextMisused(f"a workflow function called {call}; it runs again on every replay: {instead}")


def refuse_sending_inside_passes(app: Celery) -> None:
    """Make every way of sending a task raise while a workflow function runs: a replay would send it again."""
    send_task = app.send_task

    def send_outside_of_passes(name: str, *args: Any, **kwargs: Any) -> Any:
        check_outside_of_passes(name)
        return send_task(name, *args, **kwargs)

    app.send_task = send_outside_of_passes
