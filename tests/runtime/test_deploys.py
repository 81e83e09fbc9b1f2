"""Deploys, with several versions of the code on live workers: each instance goes on with the code that fits it.

What fits on none of them waits, blocked, for a worker on which it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import WorkflowHandle
from tests.runtime import deployed
from tests.runtime.cluster import Cluster, WorkerProcess
from tests.waiting import wait_until


@pytest.fixture
def cluster(tmp_path: Path, sqlite_url: str, broker_url: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, sqlite_url, broker_url, tasks=deployed.__name__, settings={"publish_grace": 1.0})
    yield cluster
    cluster.close()


def deploy(cluster: Cluster, version: str, *queues: str) -> WorkerProcess:
    served = ",".join([cluster.queue, *queues])
    worker = cluster.start_worker("-Q", served, concurrency=1, environment={"TEST_VERSION": version})
    return worker.wait_ready()


def change(cluster: Cluster, count: int) -> list[WorkflowHandle]:
    """Start instances with the code that is live, and wait until they are in their middle."""
    handles = [cluster.start("changes", cluster.queue, newest(cluster)) for _ in range(count)]
    for handle in handles:
        cluster.wait_history(handle, 2)
    return handles


def newest(cluster: Cluster) -> str:
    return f"{cluster.queue}-newest"


def refused_by(cluster: Cluster, handle: WorkflowHandle) -> int:
    instance = cluster.orchestrator.find_instance(handle.id)
    assert instance is not None
    return len(json.loads(instance.refused or "[]"))


def test_in_a_rolling_deploy_instances_go_on_with_the_code_that_began_them(cluster: Cluster) -> None:
    deploy(cluster, "first")
    handles = change(cluster, 3)
    deploy(cluster, "second", newest(cluster))  # which runs some of the steps, and so would go on after them
    for handle in handles:
        handle.send("go on", "now")
    seen: set[str] = set()

    def are_over() -> bool:
        statuses = [handle.instance_status for handle in handles]
        seen.update(statuses)
        return all(status == "COMPLETED" for status in statuses)

    wait_until(are_over, "all of them completing", 60)
    assert "BLOCKED" not in seen
    for handle in handles:
        assert handle.get(timeout=0) == ["a", "c", "d", "e", "now"]
        assert cluster.effects.names(handle.id) == ["do a", "do c", "do d", "do e"]


def test_what_no_version_fits_is_blocked_until_one_is_deployed_that_does(cluster: Cluster) -> None:
    first = deploy(cluster, "first")
    (handle,) = change(cluster, 1)
    first.stop()
    deploy(cluster, "second")
    deploy(cluster, "third")
    handle.send("go on", "now")
    cluster.wait_status(handle, "BLOCKED")
    assert refused_by(cluster, handle) == 2
    blocked = handle.describe().blocked or ""
    assert "step 1: history has 'receive go on', the workflow asked for 'step tests.runtime.workflows.do'" in blocked
    assert cluster.effects.names(handle.id) == ["do a"]

    deploy(cluster, "first", newest(cluster))
    assert handle.get(timeout=40) == ["a", "c", "d", "e", "now"]
    assert cluster.effects.names(handle.id) == ["do a", "do c", "do d", "do e"]
    assert handle.describe().blocked is None


def test_a_typo_on_every_worker_is_mended_by_a_deploy_beside_them(cluster: Cluster) -> None:
    deploy(cluster, "second")
    deploy(cluster, "third")
    handle, cancelled = cluster.start("has_a_typo"), cluster.start("has_a_typo")
    for each in (handle, cancelled):
        cluster.wait_history(each, 2)
        each.send("go on", None)
        cluster.wait_status(each, "BLOCKED")
        assert refused_by(cluster, each) == 2
        assert "name 'undefind' is not defined" in (each.describe().blocked or "")
    cancelled.cancel("while it was blocked")
    handle.resume()  # nothing has changed
    wait_until(lambda: handle.instance_status == "BLOCKED" and refused_by(cluster, handle) == 2, "both refusing again")

    deploy(cluster, "fourth")
    assert handle.get(timeout=40) == "b"
    assert cluster.effects.names(handle.id) == ["do a", "do b"]
    cluster.wait_status(cancelled)
    assert cancelled.instance_status == "CANCELLED"
    assert cluster.effects.names(cancelled.id) == ["do a", "undo a"]


def test_a_workflow_that_no_worker_has_waits_for_one_that_does(cluster: Cluster) -> None:
    deploy(cluster, "second")
    handle = cluster.start("is_new")
    cluster.wait_status(handle, "BLOCKED")
    assert "no live worker has the workflow tests.runtime.deployed.is_new" in (handle.describe().blocked or "")
    deploy(cluster, "third")
    assert handle.get(timeout=40) == "a"
    assert cluster.effects.names(handle.id) == ["do a"]
