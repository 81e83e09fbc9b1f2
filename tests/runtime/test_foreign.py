"""Steps whose task runs in a worker without this package: it cannot even be imported there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task, signature

from orchestrator import Context, shared_workflow
from orchestrator.runtime.dispatch import FOREIGN_FAILED, FOREIGN_SUCCEEDED
from tests.runtime.cluster import Cluster, wait_until

#: What waits for a callback that comes is patient; what nobody tells of times out soon, but after the grace.
PATIENT, SOON = 30.0, 2.0


@shared_task
def undo(_result: Any) -> None: ...


@shared_workflow
def asks(ctx: Context, task: str, args: list[Any], timeout: float, options: dict[str, Any]) -> Any:
    question = signature(task, args=args).set(**options)
    return ctx.run(question, foreign=True, timeout=timeout, compensate=undo.s())


@shared_workflow
def asks_and_goes_on(ctx: Context, queue: str) -> str:
    answer = ctx.run(signature("elsewhere.answer", args=["why"], queue=queue), foreign=True, timeout=PATIENT)
    return f"{answer} {ctx.receive('go on')}"


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp(request.param)
    broker = request.getfixturevalue("valkey_url" if request.param == "redis" else "rabbitmq_url")
    settings = {"publish_grace": 1.0}
    cluster = Cluster(folder, f"sqlite:///{folder}/store.db", broker, tasks=__name__, settings=settings)
    try:
        cluster.start_worker()
        cluster.start_worker(
            f"--queues={theirs(cluster)}",
            module="tests.runtime.elsewhere",
            environment={"TEST_ELSEWHERE": theirs(cluster)},
        )
        for worker in cluster.workers:
            worker.wait_ready()
        yield cluster
    finally:
        with cluster.app.connection_for_write() as connection, connection.channel() as channel:
            for queue in (theirs(cluster), unserved(cluster)):
                channel.queue_delete(queue)
        cluster.close()


def theirs(cluster: Cluster) -> str:
    return f"{cluster.queue}-elsewhere"


def unserved(cluster: Cluster) -> str:
    return f"{cluster.queue}-nobody"


def ask(cluster: Cluster, task: str, *args: Any, timeout: float = PATIENT, **options: Any) -> Any:
    options = {"queue": theirs(cluster), **options}
    return cluster.start("asks", f"elsewhere.{task}", list(args), timeout, options)


def outcomes(handle: Any) -> list[tuple[str, str | None, int]]:
    return [(entry.kind, entry.outcome, entry.attempts) for entry in handle.history()]


UNKNOWN = [("step", "unknown", 0), ("compensation", "succeeded", 1)]


def test_it_is_settled_with_its_result(cluster: Cluster) -> None:
    asked = ask(cluster, "answer", "why")
    assert asked.get(timeout=PATIENT) == "why? 42"
    assert outcomes(asked) == [("step", "succeeded", 0)]


def test_its_own_retries_are_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    assert ask(cluster, "tries", str(tmp_path / "one"), True).get(timeout=PATIENT) == "after 2 retries"
    exhausted = ask(cluster, "tries", str(tmp_path / "other"), False)
    with pytest.raises(Exception, match="failed in a worker that does not tell how"):
        exhausted.get(timeout=PATIENT)
    assert len((tmp_path / "other").read_text().splitlines()) == 3
    assert outcomes(exhausted) == UNKNOWN


@pytest.mark.parametrize("task", ["refuse", "dies", "makes_something"])
def test_a_failure_that_is_told_is_unknown_and_undone(cluster: Cluster, task: str, tmp_path: Path) -> None:
    args = [str(tmp_path / "made")] if task == "makes_something" else []
    asked = ask(cluster, task, *args)
    with pytest.raises(Exception, match="failed in a worker that does not tell how"):
        asked.get(timeout=PATIENT)
    assert outcomes(asked) == UNKNOWN


def test_what_a_time_limit_kills_is_told_twice_and_counts_once(cluster: Cluster, tmp_path: Path) -> None:
    asked = ask(cluster, "takes_its_time", str(tmp_path / "begun"), time_limit=0.5)
    with pytest.raises(Exception, match="failed in a worker that does not tell how"):
        asked.get(timeout=PATIENT)
    assert outcomes(asked) == UNKNOWN


def test_callbacks_that_come_again_do_nothing(cluster: Cluster) -> None:
    asked = cluster.start("asks_and_goes_on", theirs(cluster))
    wait_until(lambda: [entry.outcome for entry in asked.history()][:1] == ["succeeded"], "the answer")
    (row,) = [row for row in cluster.list_rows(asked) if row.is_foreign]
    step = {"instance": asked.id, "generation": row.generation, "run": 0, "seq": row.seq, "dispatch": row.dispatch}
    for name, told in ((FOREIGN_SUCCEEDED, "another answer"), (FOREIGN_FAILED, "some-id"), (FOREIGN_SUCCEEDED, 7)):
        cluster.app.send_task(name, (told,), {"step": step})
    asked.send("go on", "and on")
    assert asked.get(timeout=PATIENT) == "why? 42 and on"
    assert [(entry.kind, entry.outcome) for entry in asked.history()] == [
        ("step", "succeeded"),
        ("receive", "succeeded"),
    ]


# --- what nobody tells of ---------------------------------------------------------------------------------------------


def assert_timed_out(asked: Any) -> None:
    with pytest.raises(TimeoutError):
        asked.get(timeout=PATIENT)
    assert outcomes(asked) == UNKNOWN


def test_what_is_revoked_there_times_out(cluster: Cluster, tmp_path: Path) -> None:
    asked = ask(cluster, "takes_its_time", str(tmp_path / "begun"), timeout=2 * SOON)
    wait_until((tmp_path / "begun").exists, "its body")
    cluster.app.control.revoke(f"{asked.id}:0:0:1", terminate=True)
    assert_timed_out(asked)


def test_what_expires_there_times_out_and_never_runs(cluster: Cluster) -> None:
    # in a queue that is served only when it has expired; it may have begun elsewhere, as far as anybody here can tell
    asked = ask(cluster, "answer", "why", timeout=SOON, expires=0.2, queue=unserved(cluster))
    assert_timed_out(asked)


def test_what_nobody_runs_is_sent_once_and_times_out(cluster: Cluster) -> None:
    asked = ask(cluster, "answer", "nobody", timeout=2 * SOON, queue=(queue := f"{unserved(cluster)}-else"))
    assert_timed_out(asked)
    with cluster.app.connection_for_write() as connection, connection.channel() as channel:
        assert channel.queue_declare(queue, passive=True).message_count == 1
        channel.queue_delete(queue)


def test_what_is_lost_with_its_worker_times_out(cluster: Cluster, tmp_path: Path) -> None:
    asked = ask(cluster, "takes_its_time", str(tmp_path / "begun"), timeout=2 * SOON)
    wait_until((tmp_path / "begun").exists, "its body")
    cluster.workers[1].kill()  # the last test of the module
    assert_timed_out(asked)
