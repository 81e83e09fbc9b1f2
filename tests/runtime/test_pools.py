"""Sagas run alike in every kind of pool, survive its end, and lose nothing when a worker is stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, wait_until

OpenCluster = Callable[..., Cluster]


@pytest.fixture
def open_cluster(tmp_path: Path) -> Iterator[OpenCluster]:
    """Make clusters that are closed in the end."""
    opened: list[Cluster] = []

    def open_one(store: str, broker: str, **options: Any) -> Cluster:
        opened.append(Cluster(tmp_path, store, broker, **options))
        return opened[-1]

    yield open_one
    for cluster in opened:
        cluster.close()


def check_sagas(cluster: Cluster) -> None:
    """Run a saga that completes and one that is undone, side by side."""
    done, undone = cluster.start("completes"), cluster.start("undoes")
    assert done.get(timeout=20) == ["a", "b", "c"]
    cluster.wait_status(undone, "COMPENSATED")
    assert cluster.effects.names(done.id) == ["do a", "do b", "do c"]
    assert cluster.effects.names(undone.id) == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_sagas_run_in_a_pool_without_processes_and_survive_its_worker(
    open_cluster: OpenCluster, sqlite_url: str, broker_url: str, pool: str
) -> None:
    cluster = open_cluster(sqlite_url, broker_url)
    worker = cluster.start_worker(pool=pool)
    check_sagas(cluster)
    cluster.plan_crash("killed", "child", "body:after-effect", 1)
    handle = cluster.start("completes", instance_id="killed")
    wait_until(lambda: not worker.is_running, "the worker being killed")
    cluster.start_worker(pool=pool)
    assert handle.get(timeout=20) == ["a", "b", "c"]
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do b", "do c"]
    assert [(entry.attempts, entry.lost) for entry in handle.history()] == [(1, 0), (2, 1), (1, 0)]


def test_a_step_is_lost_when_its_worker_is_stopped_cold(
    open_cluster: OpenCluster, sqlite_url: str, broker_url: str, tmp_path: Path
) -> None:
    cluster = open_cluster(sqlite_url, broker_url)
    worker = cluster.start_worker()
    go = tmp_path / "go"
    handle = cluster.start("waits", str(go))
    wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the step running")
    os.kill(worker.pid, signal.SIGQUIT)
    worker.process.wait(timeout=20)
    go.touch()
    cluster.start_worker()
    assert handle.get(timeout=20) == ["a", "b", "c"]
    assert [(entry.attempts, entry.lost) for entry in handle.history()] == [(1, 0), (2, 1), (1, 0)]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_that_is_stopped_finishes_its_step(
    open_cluster: OpenCluster, sqlite_url: str, broker_url: str, tmp_path: Path, pool: str
) -> None:
    cluster = open_cluster(sqlite_url, broker_url)
    worker = cluster.start_worker(pool=pool)
    go = tmp_path / "go"
    handle = cluster.start("waits", str(go))
    wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the step running")
    os.kill(worker.pid, signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in worker.log.read_text(), "the shutdown beginning")
    go.touch()
    worker.process.wait(timeout=20)
    assert [(entry.outcome, entry.attempts) for entry in handle.history()][:2] == [("succeeded", 1), ("succeeded", 1)]
    cluster.start_worker(pool=pool)
    assert handle.get(timeout=20) == ["a", "b", "c"]
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do c"]
    assert sum(entry.lost for entry in handle.history()) == 0


def test_a_process_for_each_task_is_enough(open_cluster: OpenCluster, sqlite_url: str, broker_url: str) -> None:
    cluster = open_cluster(sqlite_url, broker_url)
    cluster.start_worker("--max-tasks-per-child=1")
    check_sagas(cluster)
    assert len({effect.process for effect in cluster.effects.list_effects(what="effect")}) == 9


@pytest.mark.parametrize("store", ["postgresql", "mysql"])
def test_sagas_run_in_threads_that_share_a_servers_connections(
    request: pytest.FixtureRequest, open_cluster: OpenCluster, rabbitmq_url: str, store: str
) -> None:
    cluster = open_cluster(request.getfixturevalue(f"{store}_url"), rabbitmq_url)
    cluster.start_worker(pool="threads", concurrency=4)
    check_sagas(cluster)
