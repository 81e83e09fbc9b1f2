"""Messages that are lost, doubled or late: the database is the truth, the broker only a doorbell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from orchestrator import WorkflowHandle
from orchestrator.runtime.dispatch import ADVANCE
from orchestrator.store import history
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until


@pytest.fixture
def cluster(tmp_path: Path, sqlite_url: str, broker_url: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, sqlite_url, broker_url, settings={"publish_grace": 1.0})
    yield cluster
    cluster.close()


def flush(cluster: Cluster) -> None:
    with redis.Redis.from_url(cluster.environment["TEST_BROKER"]) as client:
        client.flushall()


def deliver_again(cluster: Cluster, handle: WorkflowHandle, seq: int, times: int) -> None:
    """Publish the message of a step as it was published before."""
    with cluster.orchestrator.store.read("test") as connection:
        row = next(row for row in history.load_rows(connection, handle.id, 0) if row.seq == seq)
    for _ in range(times):
        cluster.orchestrator.dispatcher.publish_step(row)


def test_a_flushed_broker_loses_no_step(cluster: Cluster) -> None:
    handles = [cluster.start("completes") for _ in range(5)]
    flush(cluster)
    cluster.start_worker()
    for handle in handles:
        assert handle.get(timeout=30) == ["a", "b", "c"]
        assert cluster.effects.names(handle.id) == ["do a", "do b", "do c"]


def test_a_broker_flushed_while_a_step_runs_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker()
    go = tmp_path / "go"
    handle = cluster.start("waits", str(go))
    wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the second step running")
    flush(cluster)
    go.touch()
    assert handle.get(timeout=30) == ["a", "b", "c"]
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do c"]


def test_a_message_delivered_many_times_runs_its_step_once(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker(concurrency=4)
    go = tmp_path / "go"
    handle = cluster.start("waits", str(go))
    wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the second step running")
    deliver_again(cluster, handle, 1, times=6)  # its attempt is alive
    deliver_again(cluster, handle, 0, times=6)  # it has settled
    # another instance's whole life goes through the same queue after them
    assert cluster.start("completes").get(timeout=30) == ["a", "b", "c"]
    go.touch()
    assert handle.get(timeout=30) == ["a", "b", "c"]
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do c"]
    assert [entry.attempts for entry in handle.history()] == [1, 1, 1]


def test_many_coordinators_on_one_instance_make_one_pass(cluster: Cluster) -> None:
    handle = cluster.start("completes")
    instance = cluster.orchestrator.find_instance(handle.id)
    assert instance is not None
    for _ in range(10):
        cluster.app.send_task(ADVANCE, (handle.id, instance.generation))
    cluster.start_worker(concurrency=4)
    assert handle.get(timeout=30) == ["a", "b", "c"]
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do c"]
    assert [entry.seq for entry in handle.history()] == [0, 1, 2]


def test_a_step_longer_than_the_visibility_timeout_runs_once(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    settings = {"visibility_timeout": 3, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    cluster = Cluster(
        tmp_path, sqlite_url, broker_url, celery={"task_acks_late": True, "broker_transport_options": settings}
    )
    try:
        cluster.start_worker(concurrency=2)
        handle = cluster.start("takes_seconds", 8)
        assert handle.get(timeout=40) == "done"
        assert cluster.effects.names(handle.id) == ["do long"]
        assert [entry.attempts for entry in handle.history()] == [1]
        deliveries = cluster.logs().count(f"[{handle.id}:0:0:1] received")
        assert deliveries > 1, "the broker delivered the message once only: the test shows nothing"
    finally:
        cluster.close()


def test_a_message_of_an_older_dispatch_claims_nothing(cluster: Cluster, tmp_path: Path) -> None:
    worker = cluster.start_worker()
    go = tmp_path / "go"
    handle = cluster.start("waits", str(go))
    wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the second step running")
    with cluster.orchestrator.store.read("test") as connection:
        first = history.load_rows(connection, handle.id, 0)[1]
    worker.kill()
    cluster.start_worker()
    wait_until(lambda: cluster.effects.names(handle.id).count("do b") == 2, "its second attempt")
    for _ in range(3):
        cluster.orchestrator.dispatcher.publish_step(first)
    assert cluster.start("completes").get(timeout=30) == ["a", "b", "c"]
    go.touch()
    assert handle.get(timeout=30) == ["a", "b", "c"]
    assert [entry.attempts for entry in handle.history()] == [1, 2, 1]
    assert handle.history()[1].lost == 1
