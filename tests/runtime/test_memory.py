"""A worker's process does not grow with what it has done."""

from __future__ import annotations

import re
from pathlib import Path

from celery import shared_task

from orchestrator import Context, shared_workflow
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until


@shared_task
def tell_kilobytes() -> int:
    """Return how much memory this process has to itself (told by Linux's ``/proc``)."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found is not None else 0


@shared_workflow
def works(ctx: Context) -> int:
    for _ in range(4):
        ctx.run(tell_kilobytes.s())
    return int(ctx.run(tell_kilobytes.s()))


def run_many(cluster: Cluster, count: int) -> int:
    handles = [cluster.start("works") for _ in range(count)]
    wait_until(lambda: all(handle.ready() for handle in handles), "all of them", seconds=60)
    return int(handles[-1].get(timeout=1))


def test_instances_that_have_ended_leave_nothing_behind_in_memory(cluster: Cluster) -> None:
    cluster.workers[-1].stop()
    cluster.start_worker(concurrency=1).wait_ready()
    run_many(cluster, 30)  # what is made once
    before = run_many(cluster, 10)
    after = run_many(cluster, 60)
    assert after - before < 60 * 8  # what Celery keeps of what a start task raises would be 25 KB for each
