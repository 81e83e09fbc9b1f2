"""Workers that are stopped, in every way that Celery knows: nothing is lost, and nothing waits to be noticed.

The heartbeat limit and the grace of publications are longer than any test waits.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery.worker.consumer import Consumer

from orchestrator import Context, WorkflowHandle, shared_workflow
from orchestrator.store import workers
from tests.runtime.cluster import Cluster, WorkerProcess
from tests.runtime.workflows import do, fail, undo, wait_for_file
from tests.waiting import wait_until

SETTINGS = {"heartbeat_limit": 120, "publish_grace": 90}


@pytest.fixture
def victim(cluster: Cluster) -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker that gets all messages until ``let_others`` is called."""
    started: list[WorkerProcess] = []

    def start(*arguments: str, pool: str = "prefork", **celery: object) -> WorkerProcess:
        cluster.app.control.cancel_consumer(cluster.queue, destination=[name_of(cluster.workers[0])], reply=True)
        own = {"TEST_CELERY": json.dumps({"worker_pool_restarts": True, **celery})}
        started.append(cluster.start_worker(*arguments, pool=pool, environment=own).wait_ready())
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


def let_others(cluster: Cluster) -> None:
    """Let the other worker take messages, too."""
    destination = [name_of(cluster.workers[0])]
    assert cluster.app.control.add_consumer(cluster.queue, destination=destination, reply=True, timeout=10)


def name_of(worker: WorkerProcess) -> str:
    found = re.search(r"(\S+@test) ready", worker.log.read_text())
    assert found is not None
    return found[1]


def send_signals(worker: WorkerProcess, *signals: signal.Signals) -> None:
    """Send signals to the worker alone, each when it has taken notice of the one before."""
    told = {signal.SIGTERM: "Warm shutdown", signal.SIGQUIT: "terminate all running tasks", signal.SIGINT: "Ctrl+C"}
    for count, number in enumerate(signals, 1):
        os.kill(worker.pid, number)
        times = signals[:count].count(number)
        _wait_said(worker, told[number], times)


def _wait_said(worker: WorkerProcess, text: str, times: int = 1) -> None:
    wait_until(lambda: worker.log.read_text().count(text) >= times, f"{text} ({worker.log})")


def wait_gone(cluster: Cluster, worker: WorkerProcess) -> None:
    """Wait until a worker has ended, and see that it has signed off."""
    wait_until(lambda: not worker.is_running, f"the worker ending\n{worker.log.read_text()[-3000:]}")
    with cluster.orchestrator.store.read("live") as connection:
        assert worker.pid not in [each.process for each in workers.list_workers(connection)]


@shared_workflow
def works(ctx: Context, path: str) -> list[str]:
    first = ctx.run(do.s("a"), compensate=undo.s("a"))
    second = ctx.run(wait_for_file.s(path, "b"), compensate=undo.s("b"))
    return [first, second, ctx.run(do.s("c"))]


def start_holding(cluster: Cluster, path: Path) -> WorkflowHandle:
    """Start an instance, and wait until its second step runs, which goes on until the file is there."""
    handle = cluster.start("works", str(path))
    cluster.wait_effect(handle, "do b")
    return handle


# --- steps in flight ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "signals"),
    [
        pytest.param("prefork", [signal.SIGQUIT], marks=pytest.mark.storm),
        ("prefork", [signal.SIGTERM, signal.SIGQUIT]),
        pytest.param("prefork", [signal.SIGINT, signal.SIGINT], marks=pytest.mark.storm),
        ("solo", [signal.SIGQUIT]),
        pytest.param("solo", [signal.SIGTERM, signal.SIGQUIT], marks=pytest.mark.storm),
    ],
)
def test_a_step_that_a_cold_shutdown_interrupts_is_repeated_at_once(
    cluster: Cluster,
    victim: Callable[..., WorkerProcess],
    tmp_path: Path,
    pool: str,
    signals: list[signal.Signals],
) -> None:
    if pool == "solo" and not hasattr(Consumer, "cancel_active_requests"):
        pytest.skip("this version of Celery lets the body of a solo worker end")
    worker = victim(pool=pool)
    handle = start_holding(cluster, tmp_path / "go")
    let_others(cluster)
    send_signals(worker, *signals)
    wait_gone(cluster, worker)
    (tmp_path / "go").touch()
    assert handle.get(timeout=20) == ["a", "b", "c"]
    assert [(entry.attempts, entry.lost) for entry in handle.history()] == [(1, 0), (2, 1), (1, 0)]


def test_threads_that_a_cold_shutdown_cannot_end_keep_their_step(
    cluster: Cluster, victim: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    worker = victim(pool="threads")
    handle = start_holding(cluster, tmp_path / "go")
    let_others(cluster)
    send_signals(worker, signal.SIGQUIT)
    _wait_said(worker, "does not implement kill_job")
    assert worker.is_running  # for as long as the body runs
    (tmp_path / "go").touch()
    assert handle.get(timeout=20) == ["a", "b", "c"]
    wait_gone(cluster, worker)
    assert [(entry.attempts, entry.lost) for entry in handle.history()] == [(1, 0), (1, 0), (1, 0)]


def test_a_soft_shutdown_gives_steps_their_time(
    cluster: Cluster, victim: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    worker = victim(worker_soft_shutdown_timeout=2)
    quick, slow = start_holding(cluster, tmp_path / "quick"), start_holding(cluster, tmp_path / "slow")
    let_others(cluster)
    os.kill(worker.pid, signal.SIGQUIT)
    _wait_said(worker, "Initiating Soft Shutdown")
    (tmp_path / "quick").touch()
    wait_gone(cluster, worker)
    (tmp_path / "slow").touch()
    assert (quick.get(timeout=20), slow.get(timeout=20)) == (["a", "b", "c"], ["a", "b", "c"])
    assert [handle.history()[1].attempts for handle in (quick, slow)] == [1, 2]


def restart_pool(cluster: Cluster, worker: WorkerProcess) -> None:
    cluster.app.control.broadcast("pool_restart", arguments={"reload": False}, reply=True, timeout=10, limit=1)


@pytest.mark.storm
def test_a_step_whose_pool_is_restarted_is_not_lost(
    cluster: Cluster, victim: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    worker = victim()
    handle = start_holding(cluster, tmp_path / "go")
    restart_pool(cluster, worker)
    (tmp_path / "go").touch()
    assert handle.get(timeout=20) == ["a", "b", "c"]


# --- what has not begun -------------------------------------------------------------------------------------------


def shut_down(cluster: Cluster, worker: WorkerProcess) -> None:
    """As ``celery control shutdown`` does."""
    cluster.app.control.shutdown(destination=[name_of(worker)])


def hang_up(_cluster: Cluster, worker: WorkerProcess) -> None:
    os.kill(worker.pid, signal.SIGHUP)
    _wait_said(worker, "Restarting celery worker")


def end(_cluster: Cluster, worker: WorkerProcess) -> None:
    send_signals(worker, signal.SIGTERM)


def check_handing_over(
    cluster: Cluster, worker: WorkerProcess, path: Path, stop: Callable[[Cluster, WorkerProcess], None]
) -> None:
    """Stop a worker while it holds messages that it cannot begin; they go on before it has ended."""
    holding = start_holding(cluster, path)
    go = path.with_name("done")
    go.touch()
    task = cluster.task("works")
    # known to nobody but the broker
    waiting = [task.delay(str(go)), task.delay(str(go)), task.apply_async((str(go),), countdown=1)]
    for handle in waiting:
        _wait_said(worker, f"[{handle.id}] received")
    let_others(cluster)
    stop(cluster, worker)
    for handle in waiting:
        assert handle.get(timeout=20) == ["a", "b", "c"]
    assert holding.history()[1].state == "running"
    path.touch()
    assert holding.get(timeout=20) == ["a", "b", "c"]
    assert [(entry.attempts, entry.lost) for entry in holding.history()] == [(1, 0)] * 3


@pytest.mark.parametrize(
    "stop", [end, *(pytest.param(other, marks=pytest.mark.storm) for other in (shut_down, hang_up))]
)
def test_what_a_stopping_worker_has_not_begun_goes_on_elsewhere_before_it_ends(
    cluster: Cluster,
    victim: Callable[..., WorkerProcess],
    tmp_path: Path,
    stop: Callable[[Cluster, WorkerProcess], None],
) -> None:
    worker = victim("--concurrency=1")
    check_handing_over(cluster, worker, tmp_path / "go", stop)
    wait_gone(cluster, worker)


@pytest.mark.storm
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_rabbitmq_too_is_given_back_what_has_not_begun(
    tmp_path: Path, sqlite_url: str, rabbitmq_url: str, pool: str
) -> None:
    cluster = Cluster(tmp_path, sqlite_url, rabbitmq_url, tasks=__name__, settings=SETTINGS)
    try:
        worker = cluster.start_worker(pool=pool, concurrency=1).wait_ready()

        def stop(_cluster: Cluster, _worker: WorkerProcess) -> None:
            cluster.start_worker().wait_ready()
            send_signals(worker, signal.SIGTERM)

        check_handing_over(cluster, worker, tmp_path / "go", stop)
        wait_gone(cluster, worker)
    finally:
        cluster.close()


# --- passes -------------------------------------------------------------------------------------------------------


@shared_workflow
def stands_still(ctx: Context, path: str) -> str:
    """A pass that takes until the file is there, which the process that makes it says."""
    ctx.sleep(0.1)
    Path(path).with_suffix(f".{os.getpid()}").touch()
    while not Path(path).exists():
        time.sleep(0.02)
    return str(ctx.run(do.s("a")))


def test_a_pass_that_a_cold_shutdown_interrupts_is_made_by_another_worker(
    cluster: Cluster, victim: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    worker = victim()
    handle = cluster.start("stands_still", str(tmp_path / "go"))
    wait_until(lambda: len(list(tmp_path.glob("go.*"))) == 1, "the pass")
    let_others(cluster)
    send_signals(worker, signal.SIGQUIT)
    wait_until(lambda: len(list(tmp_path.glob("go.*"))) == 2, "the pass being made again")
    (tmp_path / "go").touch()
    assert handle.get(timeout=20) == "a"
    wait_gone(cluster, worker)
    # by the very message that was taken from the other: no poller had to notice that a pass was missing
    received = re.findall(r"orchestrator.advance\[(\S+)\] received", cluster.logs())
    assert received.count(re.findall(r"orchestrator.advance\[(\S+)\] received", worker.log.read_text())[-1]) == 2


# --- beginnings and ends ------------------------------------------------------------------------------------------


def test_a_worker_that_is_stopped_as_it_starts_leaves_nothing_behind(cluster: Cluster) -> None:
    worker = cluster.start_worker()
    _wait_said(worker, "[tasks]")
    os.kill(worker.pid, signal.SIGTERM)
    wait_gone(cluster, worker)


@shared_workflow
def goes_on(ctx: Context, fails: bool) -> int:
    for number in range(6):
        ctx.run(do.s(f"step {number}"), compensate=undo.s(f"step {number}"))
    if fails:
        ctx.run(fail.s("last"))
    return 6


@pytest.mark.storm
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize("broker", ["valkey", "rabbitmq"])
def test_workers_that_are_restarted_in_turn_under_load_lose_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, sqlite_url: str, broker: str, how: signal.Signals
) -> None:
    url = request.getfixturevalue(f"{broker}_url")
    cluster = Cluster(tmp_path, sqlite_url, url, tasks=__name__, settings=SETTINGS)
    try:
        running = [cluster.start_worker().wait_ready() for _ in range(2)]
        handles = [cluster.start("goes_on", number % 3 == 0) for number in range(60)]
        while any(handle.instance_status in ("PENDING", "RUNNING", "COMPENSATING") for handle in handles):
            oldest = running.pop(0)
            os.kill(oldest.pid, how)
            running.append(cluster.start_worker().wait_ready())
            oldest.process.wait(timeout=30)
        assert len(cluster.workers) > 3
        statuses = [handle.instance_status for handle in handles]
        assert statuses == [("COMPENSATED" if number % 3 == 0 else "COMPLETED") for number in range(60)]
        if how is signal.SIGTERM:
            assert sum(entry.lost for handle in handles for entry in handle.history()) == 0
    finally:
        cluster.close()
