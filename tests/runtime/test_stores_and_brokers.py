"""The same sagas on every store and broker, with a worker killed in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime import crashing
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until


@pytest.fixture(params=["valkey", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue("broker_url" if request.param == "valkey" else "rabbitmq_url")
    return url


@pytest.fixture
def cluster(tmp_path: Path, store_url: str, broker: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, store_url, broker, settings={"publish_grace": 1.0, "max_lost": 20})
    yield cluster
    cluster.close()


def test_sagas_survive_workers_that_are_killed(cluster: Cluster) -> None:
    points = ["claim:after-commit", "body:after-effect", "settle:after-commit"]
    for number, point in enumerate(points):
        cluster.plan_crash(f"undoes-{number}", "worker" if number == 1 else "child", point, 5)
    completing = [cluster.start("completes", instance_id=f"completes-{number}") for number in range(3)]
    undoing = [cluster.start("undoes", instance_id=f"undoes-{number}") for number in range(3)]
    cluster.start_worker(concurrency=2)
    wait_until(
        lambda: cluster.supervise() and all(handle.ready() for handle in completing + undoing),
        "all of them ending",
        seconds=60,
    )
    for handle in completing:
        assert handle.get(timeout=0) == ["a", "b", "c"]
    for number, handle in enumerate(undoing):
        assert crashing.was_reached(cluster.crashes, f"undoes-{number}")
        assert handle.instance_status == "COMPENSATED"
        effects = list(dict.fromkeys(cluster.effects.names(handle.id)))
        assert effects == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]


def test_a_start_task_survives_the_worker_that_took_it(tmp_path: Path, sqlite_url: str, rabbitmq_url: str) -> None:
    cluster = Cluster(tmp_path, sqlite_url, rabbitmq_url)
    try:
        cluster.plan_crash("from-delay", "worker", "start:before-commit", None)
        handle = cluster.app.tasks["tests.runtime.workflows.completes"].apply_async(task_id="from-delay")
        first = cluster.start_worker()
        wait_until(lambda: not first.is_running, "the worker dying before anything was recorded")
        assert cluster.orchestrator.find_instance("from-delay") is None
        cluster.start_worker()
        assert handle.get(timeout=30) == ["a", "b", "c"]
    finally:
        cluster.close()


def test_a_start_task_survives_the_pool_process_that_took_it(cluster: Cluster) -> None:
    cluster.plan_crash("from-delay", "child", "start:before-commit", None)
    handle = cluster.app.tasks["tests.runtime.workflows.completes"].apply_async(task_id="from-delay")
    cluster.start_worker()
    assert handle.get(timeout=30) == ["a", "b", "c"]
    assert crashing.was_reached(cluster.crashes, "from-delay")
