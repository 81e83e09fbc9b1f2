"""Celery's time limits on steps: nobody can say what the body did, so the step is unknown, and undone."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Task, shared_task
from celery.exceptions import SoftTimeLimitExceeded

from orchestrator import Context, RetryPolicy, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note


def take_long() -> None:
    note("called", "effect")
    time.sleep(30)  # what a call to somebody who does not answer does


@shared_task(soft_time_limit=0.3)
def soft_limited() -> None:
    take_long()


@shared_task(soft_time_limit=0.3)
def tidies_up() -> str:
    try:
        take_long()
    except SoftTimeLimitExceeded:
        return "tidied up"
    return "slept"


@shared_task(bind=True, soft_time_limit=0.3, autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def retries_limited(self: Task) -> None:
    if self.request.retries == 0:
        take_long()
    raise ValueError("refused")


@shared_task(time_limit=0.5)
def hard_limited() -> None:
    take_long()


@shared_task(time_limit=0.5, acks_late=True, acks_on_failure_or_timeout=False)
def hard_limited_late() -> None:
    take_long()


@shared_task
def unlimited() -> None:
    take_long()


@shared_task
def undo(result: Any) -> None:
    note("undone", "effect")


@shared_workflow
def runs(ctx: Context, name: str, options: dict[str, Any]) -> Any:
    return ctx.run(globals()[name].s().set(**options), compensate=undo.s())


@shared_workflow
def runs_twice(ctx: Context) -> Any:
    policy = RetryPolicy(max_attempts=2, initial_interval=timedelta(0))
    return ctx.run(hard_limited.s(), compensate=undo.s(), retry=policy)


@pytest.mark.parametrize(
    ("task", "options", "error"),
    [
        ("soft_limited", {}, "SoftTimeLimitExceeded"),
        ("unlimited", {"soft_time_limit": 0.3}, "SoftTimeLimitExceeded"),
        ("hard_limited", {}, "TimeLimitExceeded"),
        ("hard_limited_late", {}, "TimeLimitExceeded"),
        ("unlimited", {"time_limit": 0.5}, "TimeLimitExceeded"),
    ],
)
def test_a_step_that_exceeds_its_limit_is_unknown_and_undone(
    cluster: Cluster, task: str, options: dict[str, Any], error: str
) -> None:
    handle = cluster.run("runs", task, options)
    step = handle.history()[0]
    assert (step.outcome, step.attempts, step.lost) == ("unknown", 1, 0)
    assert step.error is not None
    assert step.error.type == f"billiard.exceptions.{error}"
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["called", "undone"]


def test_a_body_may_handle_its_soft_limit(cluster: Cluster) -> None:
    assert cluster.run("runs", "tidies_up", {}).get(timeout=1) == "tidied up"


def test_a_step_stays_in_doubt_when_it_is_retried_after_its_soft_limit(cluster: Cluster) -> None:
    handle = cluster.run("runs", "retries_limited", {})
    step = handle.history()[0]
    assert step.error is not None
    assert (step.outcome, step.error.message) == ("unknown", "refused")
    assert cluster.effects.names(handle.id) == ["called", "undone"]


def test_a_retry_policy_holds_for_attempts_that_were_killed_for_their_limit(cluster: Cluster) -> None:
    handle = cluster.run("runs_twice")
    step = handle.history()[0]
    assert (step.outcome, step.attempts, step.lost) == ("unknown", 2, 0)
    assert cluster.effects.names(handle.id) == ["called", "called", "undone"]


def test_a_revoked_step_that_is_terminated_is_unknown_and_not_run_again(cluster: Cluster) -> None:
    handle = cluster.start("runs", "unlimited", {})
    wait_until(lambda: cluster.effects.names(handle.id), "the body running")
    cluster.app.control.revoke(f"{handle.id}:0:0:1", terminate=True)
    cluster.wait_status(handle)
    step = handle.history()[0]
    assert step.error is not None
    assert (step.outcome, step.attempts, step.error.type) == ("unknown", 1, "billiard.exceptions.Terminated")
    assert cluster.effects.names(handle.id) == ["called", "undone"]


def test_a_pool_process_that_is_told_to_end_loses_its_attempt(cluster: Cluster) -> None:
    handle = cluster.start("runs", "soft_limited", {"soft_time_limit": 1})
    begun = wait_until(lambda: cluster.effects.list_effects(handle.id), "the body running")
    os.kill(begun[0].process, signal.SIGTERM)
    cluster.wait_status(handle)
    step = handle.history()[0]
    assert (step.outcome, step.attempts, step.lost) == ("unknown", 2, 1)
    assert cluster.effects.names(handle.id) == ["called", "called", "undone"]


def test_a_soft_limit_of_the_whole_app_holds_for_steps(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    cluster = Cluster(tmp_path, sqlite_url, broker_url, tasks=__name__, celery={"task_soft_time_limit": 1})
    try:
        cluster.start_worker()
        handle = cluster.run("runs", "unlimited", {})
        assert handle.history()[0].outcome == "unknown"
        assert cluster.effects.names(handle.id) == ["called", "undone"]
    finally:
        cluster.close()
