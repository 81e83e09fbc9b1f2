"""A task's own Celery retries hold when it runs as a step: they are recorded, and counted across dispatches."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from celery import Task, shared_task
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry

from orchestrator import (
    Context,
    OutcomeUnknown,
    RetryPolicy,
    WorkflowFailed,
    WorkflowHandle,
    current_step,
    shared_workflow,
)
from orchestrator.runtime.descriptions import HistoryEntry
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note


class GatewayTimeout(Exception):
    """What a payment provider's client raises."""


@shared_task(bind=True, autoretry_for=(GatewayTimeout,), max_retries=5, default_retry_delay=0)
def charge(self: Task, times: int) -> int:
    """Time out a few times."""
    note(f"retries {self.request.retries}", "effect")
    if self.request.retries < times:
        raise GatewayTimeout(f"timeout {self.request.retries}")
    return int(self.request.retries)


@shared_task(bind=True, autoretry_for=(GatewayTimeout,), retry_backoff=True, retry_jitter=False)
def backs_off(self: Task) -> None:
    note("called", "effect")
    if self.request.retries == 0:
        raise GatewayTimeout


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


@shared_task(bind=True)
def moves(self: Task, queue: str) -> str:
    if self.request.retries == 0:
        raise self.retry(countdown=0, queue=queue)
    return str(self.request.delivery_info["routing_key"])


@shared_task
def retries_by_hand() -> None:
    note("called", "effect")
    raise Retry("later, perhaps")


@shared_task
def rejects(requeue: bool) -> str:
    step = current_step()
    assert step is not None
    note("called", "effect")
    if step.attempt > 1:
        return "taken"
    raise Reject("not me", requeue=requeue)


@shared_task
def ignores() -> None:
    raise Ignore


@shared_task(bind=True)
def retries_with(self: Task, what: Any) -> None:
    note("called", "effect")
    raise self.retry(args=(object(),), countdown=0)


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
    return ctx.run(globals()[name].s(*args), compensate=undo.s(name))


@shared_workflow
def runs_with_policy(ctx: Context) -> None:
    policy = RetryPolicy(max_attempts=2, initial_interval=timedelta(0))
    ctx.run(gives_up.s("called"), retry=policy)


def only_step(handle: WorkflowHandle) -> HistoryEntry:
    return handle.history()[0]


def test_autoretry_is_counted_across_dispatches(cluster: Cluster) -> None:
    handle = cluster.run("runs", "charge", [3])
    assert handle.get(timeout=1) == 3
    assert cluster.effects.names(handle.id) == ["retries 0", "retries 1", "retries 2", "retries 3"]
    assert (only_step(handle).attempts, only_step(handle).lost) == (4, 0)


def test_autoretry_backs_off(cluster: Cluster) -> None:
    handle = cluster.run("runs", "backs_off", [])
    first, second = cluster.effects.list_effects(handle.id)
    assert second.at - first.at >= 1


def test_exhausted_autoretry_fails_the_step_with_the_tasks_own_exception(cluster: Cluster) -> None:
    handle = cluster.run("runs", "charge", [9])
    assert len(cluster.effects.names(handle.id)) == 6  # and nothing is undone: every attempt failed for certain
    with pytest.raises(GatewayTimeout, match="timeout 5"):
        handle.get(timeout=1)


def test_exhausted_retries_fail_the_step(cluster: Cluster) -> None:
    handle = cluster.run("runs", "gives_up", ["called"])
    assert cluster.effects.names(handle.id) == ["called"] * 3
    with pytest.raises(WorkflowFailed, match="MaxRetriesExceeded") as failure:
        handle.get(timeout=1)
    assert isinstance(failure.value, MaxRetriesExceededError)


def test_a_retry_with_other_arguments_is_recorded_with_them(cluster: Cluster) -> None:
    handle = cluster.run("runs", "counts_down", [3])
    assert handle.get(timeout=1) == "done at 0"
    assert cluster.effects.names(handle.id) == ["3 by 1", "2 by 1", "1 by 1", "0 by 1"]
    assert (only_step(handle).args, only_step(handle).kwargs) == ([0], {"by": 1})


def test_a_retry_with_a_countdown_waits_in_the_store_and_not_in_a_worker(cluster: Cluster) -> None:
    handle = cluster.start("runs", "waits_between", [])
    wait_until(lambda: [(e.state, e.attempts) for e in handle.history()] == [("scheduled", 1)], "the retry recorded")
    reply = cluster.app.control.inspect(timeout=0.3).scheduled() or {}
    assert [held for worker in reply.values() for held in worker] == []
    cluster.wait_status(handle)
    first, second = cluster.effects.list_effects(handle.id)
    assert second.at - first.at >= 1
    assert handle.get(timeout=1) == 1.0


def test_a_retry_that_was_asked_for_without_raising_it_holds(cluster: Cluster) -> None:
    handle = cluster.run("runs", "retries_quietly", [])
    assert handle.get(timeout=1) == "now"
    assert cluster.effects.names(handle.id) == ["retries 0", "retries 1"]


def test_a_retry_may_move_to_another_queue(cluster: Cluster) -> None:
    other = f"{cluster.queue}-other"
    cluster.app.control.add_consumer(other, reply=True, timeout=2)
    assert cluster.run("runs", "moves", [other]).get(timeout=1) == other


def test_a_retry_that_is_raised_by_hand_fails_the_step(cluster: Cluster) -> None:
    handle = cluster.run("runs", "retries_by_hand", [])
    assert only_step(handle).outcome == "failed"
    assert cluster.effects.names(handle.id) == ["called"]


def test_a_retry_with_arguments_that_cannot_be_recorded_fails_the_step(cluster: Cluster) -> None:
    handle = cluster.run("runs", "retries_with", [1])
    error = only_step(handle).error
    assert error is not None
    assert error.type == "orchestrator.errors.NotEncodable"
    assert "retries_with" in error.message
    assert (only_step(handle).outcome, cluster.effects.names(handle.id)) == ("failed", ["called"])


def test_a_step_stays_in_doubt_when_its_task_retried_after_an_unknown_outcome(cluster: Cluster) -> None:
    handle = cluster.run("runs", "retries_in_doubt", [])
    assert only_step(handle).outcome == "unknown"
    assert cluster.effects.names(handle.id) == ["undo retries_in_doubt of None"]


def test_a_rejected_message_that_is_requeued_is_another_attempt(cluster: Cluster) -> None:
    handle = cluster.run("runs", "rejects", [True])
    assert handle.get(timeout=1) == "taken"
    assert (only_step(handle).attempts, only_step(handle).lost) == (2, 0)


def test_a_rejected_message_that_is_not_requeued_fails_the_step(cluster: Cluster) -> None:
    handle = cluster.run("runs", "rejects", [False])
    assert only_step(handle).outcome == "failed"
    with pytest.raises(WorkflowFailed, match="not me"):
        handle.get(timeout=1)


def test_a_task_that_ignores_itself_is_unknown_and_undone(cluster: Cluster) -> None:
    handle = cluster.run("runs", "ignores", [])
    assert only_step(handle).outcome == "unknown"
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["undo ignores of None"]


def test_replacing_a_step_by_another_task_is_refused(cluster: Cluster) -> None:
    handle = cluster.run("runs", "replaces", [])
    assert only_step(handle).outcome == "failed"
    with pytest.raises(WorkflowFailed, match=r"replaces called replace\(\) while running as a step"):
        handle.get(timeout=1)


def test_a_retry_policy_gives_the_task_its_celery_retries_again(cluster: Cluster) -> None:
    handle = cluster.run("runs_with_policy")
    assert cluster.effects.names(handle.id) == ["called"] * 6
