"""A task's own Celery retries hold when it runs as a step: they are recorded, and counted across dispatches."""

from __future__ import annotations

from typing import Any

from celery import Task, shared_task
from celery.exceptions import Ignore, Reject, Retry

from orchestrator import Context, OutcomeUnknown, RetryPolicy, StepFailed, StepUnknown, shared_workflow
from tests.runtime.cluster import Cluster, WorkflowHandle, wait_until
from tests.runtime.workflows import note


class GatewayTimeout(Exception):
    """What a payment provider's client raises."""


@shared_task(bind=True, autoretry_for=(GatewayTimeout,), max_retries=5, retry_backoff=0.01, retry_jitter=False)
def charge(self: Task, times: int) -> int:
    """Time out a few times."""
    note(f"retries {self.request.retries}", "effect")
    if self.request.retries < times:
        raise GatewayTimeout(f"timeout {self.request.retries}")
    return int(self.request.retries)


@shared_task(bind=True, max_retries=2, default_retry_delay=0)
def gives_up(self: Task, name: str) -> None:
    note(name, "effect")
    raise self.retry()


@shared_task(bind=True, max_retries=1)
def counts_down(self: Task, number: int, by: int = 1) -> str:
    """Call itself with other arguments, until none is left."""
    note(f"{number} by {by}", "effect")
    if number > 0:
        raise self.retry(args=(number - by,), kwargs={"by": by}, countdown=0, max_retries=10)
    return f"done at {number}"


@shared_task(bind=True)
def waits_between(self: Task) -> float:
    note("called", "effect")
    if self.request.retries == 0:
        raise self.retry(countdown=1)
    return float(self.request.retries)


@shared_task(bind=True)
def retries_quietly(self: Task) -> str:
    """Ask for a retry without raising it, and go on."""
    note(f"retries {self.request.retries}", "effect")
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
        return "not yet"
    return "now"


@shared_task(bind=True, queue=None)
def moves(self: Task, queue: str) -> str:
    if self.request.retries == 0:
        raise self.retry(countdown=0, queue=queue)
    return str(self.request.delivery_info["routing_key"])


@shared_task
def retries_by_hand() -> None:
    note("called", "effect")
    raise Retry("later, perhaps")


@shared_task(bind=True)
def rejects(self: Task, requeue: bool) -> str:
    note("called", "effect")
    if len(note_count(self)) > 1:
        return "taken"
    raise Reject("not me", requeue=requeue)


def note_count(task: Task) -> list[str]:
    import os

    from orchestrator import current_step
    from tests.runtime.effects import Effects

    step = current_step()
    assert step is not None
    return Effects(os.environ["TEST_EFFECTS"]).names(step.instance_id)


@shared_task
def ignores() -> None:
    raise Ignore


@shared_task(bind=True)
def replaces(self: Task) -> Any:
    return self.replace(ignores.si())


@shared_task(bind=True, max_retries=1, default_retry_delay=0)
def retries_in_doubt(self: Task) -> None:
    """Nobody can say what the first attempt did; the second one fails for certain."""
    if self.request.retries == 0:
        raise self.retry(exc=OutcomeUnknown("the answer was lost"))
    raise ValueError("refused")


@shared_task
def undo(result: Any, name: str) -> None:
    note(f"undo {name} of {result!r}", "effect")


@shared_workflow
def runs(ctx: Context, name: str, args: list[Any]) -> Any:
    task = globals()[name]
    return ctx.run(task.s(*args), compensate=undo.s(name))


@shared_workflow
def runs_with_policy(ctx: Context) -> str:
    policy = RetryPolicy(max_attempts=2)
    try:
        ctx.run(gives_up.s("x"), retry=policy)
    except StepFailed as error:
        return error.error_type
    return "no error"


@shared_workflow
def sees_failure(ctx: Context, name: str) -> list[str]:
    try:
        ctx.run(globals()[name].s())
    except StepFailed as error:
        return [error.outcome, error.error_type, type(error).__name__, str(isinstance(error, StepUnknown))]
    return []
