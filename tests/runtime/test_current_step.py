"""What a task is told of the step that it runs as, while it runs."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from celery import shared_task

from orchestrator import Context, current_step, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note


@shared_task
def work_until_unwanted() -> str:
    step = current_step()
    assert step is not None
    assert not step.cancel_requested
    note("work", "begin")
    deadline = time.monotonic() + 20
    while not step.cancel_requested:
        if time.monotonic() > deadline:
            return "was wanted all the time"
        time.sleep(0.05)
    note("work", "end")
    return "ended early"


@shared_workflow
def works(ctx: Context) -> str:
    result: str = ctx.run(work_until_unwanted)
    return result


@shared_workflow
def works_in_time(ctx: Context) -> str:
    result: str = ctx.run(work_until_unwanted, timeout=timedelta(seconds=1))
    return result


@pytest.mark.parametrize("how", ["cancel", "terminate"])
def test_a_task_learns_that_its_instance_is_ended_from_outside(cluster: Cluster, how: str) -> None:
    handle = cluster.start("works")
    wait_until(lambda: cluster.effects.list_effects(handle.id), "the task being under way")
    getattr(handle, how)("not needed any more")
    wait_until(
        lambda: any(effect.what == "end" for effect in cluster.effects.list_effects(handle.id)), "the task ending early"
    )
    cluster.wait_status(handle, "CANCELLED" if how == "cancel" else "TERMINATED")


def test_a_task_learns_that_its_time_is_over(cluster: Cluster) -> None:
    handle = cluster.start("works_in_time")
    cluster.wait_status(handle, "FAILED")
    assert [effect.what for effect in cluster.effects.list_effects(handle.id)] == ["begin", "end"]
