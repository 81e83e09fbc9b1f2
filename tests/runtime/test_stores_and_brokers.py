"""The same sagas on every store and broker, with a worker killed in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import WorkflowHandle
from orchestrator.errors import InvalidOperation
from tests.runtime import crashing, lifecycles
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


#: By default each store with one broker, and each broker with a store at least; the storm does the rest.
PAIRS = [("sqlite", "rabbitmq"), ("postgresql", "valkey"), ("mysql", "rabbitmq")]
OTHER_PAIRS = [("sqlite", "valkey"), ("postgresql", "rabbitmq"), ("mysql", "valkey")]


@pytest.fixture(
    params=[*PAIRS, *(pytest.param(pair, marks=pytest.mark.storm) for pair in OTHER_PAIRS)],
    ids=lambda pair: "-".join(pair),
)
def lifecycle_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    store, broker = request.param
    store_url = request.getfixturevalue(f"{store}_url")
    broker_url = request.getfixturevalue("broker_url" if broker == "valkey" else "rabbitmq_url")
    settings = {"publish_grace": 1.0, "max_lost": 20}
    cluster = Cluster(tmp_path, store_url, broker_url, settings=settings, tasks=lifecycles.__name__)
    yield cluster
    cluster.close()


def test_one_workflow_waits_for_everything_in_a_row(lifecycle_cluster: Cluster) -> None:
    cluster = lifecycle_cluster
    cluster.plan_crash("all-child", "worker", "settle:after-commit", 1)
    cluster.plan_crash("all", "child", "wake:after-commit", None)
    handle = cluster.start("waits_for_everything", "all", 0, instance_id="all")
    cluster.start_worker(concurrency=2)
    wait_until(lambda: handle.describe().run == 1, "the second run", 60)
    for number in range(2):  # the second time it is known by its id
        cluster.orchestrator.publish("all-news", "news", message_id="one")
        cluster.orchestrator.publish("all-work", "work", message_id="one")
        handle.send("paid", 5, message_id=f"paid {number}")

    def is_blocked() -> bool:
        return cluster.supervise() and handle.instance_status == "BLOCKED"

    wait_until(is_blocked, "the last step failing after the pivot", 60)
    assert crashing.was_reached(cluster.crashes, "all-child")
    with pytest.raises(InvalidOperation, match="past its pivot"):
        handle.cancel()
    handle.resume()
    assert handle.get(timeout=60) == ["news", "work", 5, "from the parent", "b"]
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED", seconds=60)
    child = cluster.orchestrator.get("all-child")
    assert child.instance_status == "COMPENSATED"
    own = list(dict.fromkeys(cluster.effects.names("all")))
    assert own == ["do first run", "do a", "do pivot", "do b", "undo b"]
    assert list(dict.fromkeys(cluster.effects.names("all-child"))) == ["do c", "undo c"]
    fork = handle.fork(11, "all-fork")
    wait_until(lambda: fork.instance_status == "BLOCKED", "the fork running the last step", 60)
    fork.resume()
    assert fork.get(timeout=60) == ["news", "work", 5, "from the parent", "b"]
    assert list(dict.fromkeys(cluster.effects.names("all-fork"))) == ["do b"]


def test_instances_are_stopped_wherever_they_are(lifecycle_cluster: Cluster) -> None:
    cluster = lifecycle_cluster
    sleeping = cluster.start("sleeps")
    parents = [cluster.start("has_child", f"child-{number}", True) for number in range(2)]
    children = [WorkflowHandle(f"child-{number}", app=cluster.app) for number in range(2)]
    cluster.start_worker(concurrency=2)
    cluster.wait_history(sleeping, 2)
    for child in children:
        wait_until(lambda: child.instance_status == "RUNNING" and len(child.history()) == 2, child.id)  # noqa: B023
    late = cluster.start("is_late")
    sleeping.cancel()
    parents[0].cancel()
    parents[1].terminate()
    for handle in (sleeping, late, parents[0], children[0]):
        cluster.wait_status(handle, seconds=60)
        assert handle.instance_status == "CANCELLED"
        names = cluster.effects.names(handle.id)
        is_withdrawn = handle is late and not names  # its deadline has passed before its first step began
        assert is_withdrawn or [name.split()[0] for name in names] == ["do", "undo"]
    cluster.wait_status(children[1], seconds=60)
    assert (parents[1].instance_status, children[1].instance_status) == ("TERMINATED", "TERMINATED")
    assert cluster.effects.names(parents[1].id) == ["do a"]
    assert cluster.effects.names(children[1].id) == ["do c"]
