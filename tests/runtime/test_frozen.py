"""A worker that is stopped (SIGSTOP) for longer than the heartbeat limit, and one that is killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.store import workers
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until

LIMIT_SECONDS = 1.5


@pytest.fixture
def cluster(tmp_path: Path, store_url: str, broker_url: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, store_url, broker_url, settings={"heartbeat_limit": LIMIT_SECONDS})
    yield cluster
    cluster.close()


def test_what_a_stopped_worker_brings_late_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    frozen = cluster.start_worker(concurrency=1)
    go = tmp_path / "go"
    handle = cluster.start("waits", str(go))
    wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the second step running")
    frozen.signal(signal.SIGSTOP)
    cluster.start_worker(concurrency=1)
    wait_until(lambda: cluster.effects.names(handle.id).count("do b") == 2, "its second attempt, elsewhere")
    go.touch()
    assert handle.get(timeout=30) == ["a", "b", "c"]
    before = handle.history()

    frozen.signal(signal.SIGCONT)
    wait_until(lambda: "had been given up" in frozen.log.read_text(), "the stopped worker noticing")
    after = handle.history()
    assert [(e.seq, e.outcome, e.result, e.attempts) for e in after] == [
        (e.seq, e.outcome, e.result, e.attempts) for e in before
    ]
    assert [entry.attempts for entry in after] == [1, 2, 1]
    assert [stray["attempt"] for stray in after[1].strays] == [1]
    assert handle.instance_status == "COMPLETED"

    # it begins a new incarnation, and works on
    def list_incarnations() -> int:
        with cluster.orchestrator.store.read("test") as connection:
            return len(workers.list_workers(connection))

    wait_until(lambda: list_incarnations() == 2, "both workers being alive")
    cluster.workers[1].kill()
    assert cluster.start("completes").get(timeout=30) == ["a", "b", "c"]


def test_recovery_after_a_killed_worker_begins_within_the_heartbeat_limit(cluster: Cluster, tmp_path: Path) -> None:
    killed = cluster.start_worker(concurrency=1)
    go = tmp_path / "go"
    go_on = cluster.start("waits", str(go))
    wait_until(lambda: "do b" in cluster.effects.names(go_on.id), "the second step running")
    cluster.start_worker(concurrency=1).wait_ready()

    def sees_both() -> bool:
        with cluster.orchestrator.store.read("test") as connection:
            return len(workers.list_workers(connection)) == 2

    wait_until(sees_both, "the other worker being up")
    killed.kill()
    killed_at = time.monotonic()
    again = wait_until(
        lambda: [
            e.at for e in cluster.effects.list_effects(go_on.id) if (e.name, e.attempt, e.what) == ("do b", 2, "begin")
        ],
        "the step's second attempt",
    )
    # the limit, a beat that had just been made, and the poll that finds it; twice that for a busy machine
    assert again[0] - killed_at < 2 * (LIMIT_SECONDS + LIMIT_SECONDS / 5 + 0.2)
    go.touch()
    assert go_on.get(timeout=30) == ["a", "b", "c"]
