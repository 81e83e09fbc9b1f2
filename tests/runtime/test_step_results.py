"""Where results of steps are kept besides the store."""

from __future__ import annotations

from celery import shared_task
from celery.result import AsyncResult

from orchestrator import Context, shared_workflow
from tests.runtime.cluster import Cluster, wait_until

#: The workers that keep results of steps are those of ``test_as_a_task``.
SETTINGS, KEEPS_RESULTS = {"step_results": False}, True


@shared_task
def double(number: int) -> int:
    return 2 * number


@shared_workflow
def doubles(ctx: Context, number: int) -> int:
    return int(ctx.run(double.s(number)))


def test_a_result_backend_is_spared_the_results_of_steps_and_still_told_of_instances(cluster: Cluster) -> None:
    handle = cluster.run("doubles", 4)
    (step,) = handle.children
    assert step.get(timeout=1) == 8  # from the store
    told = AsyncResult(handle.id, app=cluster.app)
    wait_until(told.ready, "the result backend being told")
    assert told.get(timeout=1) == 8
    assert AsyncResult(step.id, app=cluster.app).state == "PENDING"
