"""Celery's revoke, as a dashboard's button sends it: an instance is undone, a step is settled, no undo is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import Task, shared_task
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult

from orchestrator import Context, RetryPolicy, WorkflowCancelled, WorkflowHandle, current_step, shared_workflow
from orchestrator.errors import InvalidOperation, StepWithdrawn
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do, note, undo, wait_for_file
from tests.waiting import wait_until

KEEPS_RESULTS = True
#: The other worker is told of every revoke as well, and finds done what this one has done.
OTHERS = 1
NEVER = "never-made"
#: Since 5.7 Celery does not wait for the message to be dropped.
MARKS_AT_ONCE = tuple(map(int, celery.__version__.split(".")[:2])) >= (5, 7)
PROMPTLY = RetryPolicy(max_attempts=3, initial_interval=timedelta(0))


@pytest.fixture(scope="module", autouse=True)
def other_workers(cluster: Cluster) -> None:
    for _ in range(OTHERS):
        cluster.start_worker(concurrency=1).wait_ready()


@pytest.fixture
def closed_queue(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[], None]]]:
    """A queue that no worker serves until it is opened."""
    name = f"{cluster.queue}-{request.node.name[-40:]}"

    def open_it() -> None:
        replies = cluster.app.control.add_consumer(name, reply=True, timeout=10, limit=1 + OTHERS)
        assert len(replies) == 1 + OTHERS

    yield name, open_it
    cluster.app.control.cancel_consumer(name, reply=True, timeout=10, limit=1 + OTHERS)


def revoke(cluster: Cluster, *task_ids: str, **options: Any) -> None:
    """Revoke as Flower does, and wait until both workers have heard of it."""
    replies = cluster.app.control.revoke(list(task_ids), reply=True, timeout=10, limit=1 + OTHERS, **options)
    assert len(replies) == 1 + OTHERS


def wait_state(cluster: Cluster, handle: WorkflowHandle, state: str) -> None:
    """Wait until the result backend says so, which one without this package asks."""
    wait_until(lambda: AsyncResult(handle.id, app=cluster.app).state == state, f"{state} in the result backend")


# --- instances ----------------------------------------------------------------------------------------------------


@shared_workflow
def works(ctx: Context, path: str) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.receive("go", returns=str)
    return "done"


def start_waiting(cluster: Cluster, **options: Any) -> WorkflowHandle:
    handle = cluster.start("works", NEVER, **options)
    cluster.wait_history(handle, 2)
    return handle


def test_revoked_instances_are_cancelled_and_undone(cluster: Cluster) -> None:
    first, second = start_waiting(cluster), start_waiting(cluster)
    revoke(cluster, first.id, "no-id-of-ours", "nor:this:one", f"{second.id}-x:0:0:1", second.id)
    for handle in (first, second):
        assert cluster.wait_status(handle) == "CANCELLED"
        assert handle.describe().cancel_reason == "revoked"
        assert cluster.effects.names(handle.id) == ["do a", "undo a"]
        with pytest.raises(TaskRevokedError):
            handle.get(timeout=5)
        wait_state(cluster, handle, "REVOKED")


@pytest.mark.parametrize("command", ["revoke", "terminate"])
def test_a_terminated_instance_is_left_as_it_stands(cluster: Cluster, command: str) -> None:
    handle = start_waiting(cluster)
    if command == "revoke":
        revoke(cluster, handle.id, terminate=True)
    else:
        cluster.app.control.terminate(handle.id, signal="SIGTERM")
    assert cluster.wait_status(handle) == "TERMINATED"
    assert cluster.effects.names(handle.id) == ["do a"]


def test_an_instance_whose_start_message_is_dropped_is_cancelled(
    cluster: Cluster, closed_queue: tuple[str, Callable[[], None]]
) -> None:
    queue, open_it = closed_queue
    handle = cluster.orchestrator.start(cluster.task("works").s(NEVER).set(queue=queue))
    revoke(cluster, handle.id)
    open_it()
    assert cluster.wait_status(handle) == "CANCELLED"
    assert cluster.effects.names(handle.id) == []


def test_one_that_no_worker_has_recorded_never_begins_and_says_so(
    cluster: Cluster, closed_queue: tuple[str, Callable[[], None]]
) -> None:
    queue, open_it = closed_queue
    handle = cluster.task("works").apply_async((NEVER,), queue=queue)
    revoke(cluster, handle.id)
    assert handle.instance_status == "PENDING"
    open_it()
    with pytest.raises(TaskRevokedError):
        handle.get(timeout=20)
    cluster.wait_status(handle, "CANCELLED")  # the result backend may have told it before
    assert handle.history() == []
    assert handle.describe().args == [NEVER]


def test_an_id_that_was_revoked_in_an_earlier_life_can_be_used_again(cluster: Cluster) -> None:
    handle = start_waiting(cluster, instance_id="reused")
    # of its second life: nobody has them yet, and both workers will drop their messages
    revoke(cluster, "reused", "reused:0:0:1", "reused:0:2:1")
    cluster.wait_status(handle)
    wait_until(lambda: cluster.orchestrator.purge(older_than=timedelta(0)) and not find(cluster, "reused"), "the purge")
    again = cluster.start("works", NEVER, instance_id="reused")
    again.send("go", "on")
    assert again.get(timeout=20) == "done"


def find(cluster: Cluster, instance_id: str) -> bool:
    return cluster.orchestrator.find_instance(instance_id) is not None


@shared_task
def follow(result: str) -> None:
    Path(result).touch()


@shared_workflow
def declines(ctx: Context, path: str) -> str:
    with suppress(WorkflowCancelled):
        ctx.receive("never")
    return path


def test_what_follows_an_instance_that_declines_follows_it_all_the_same(cluster: Cluster, tmp_path: Path) -> None:
    followed = tmp_path / "followed"
    start = cluster.task("declines").s(str(followed)).set(link=cluster.task("follow").s())
    handle = cluster.orchestrator.start(start)
    cluster.wait_history(handle, 1)
    revoke(cluster, handle.id)
    assert handle.get(timeout=20) == str(followed)
    wait_until(followed.exists, "the callback")
    wait_state(cluster, handle, "SUCCESS")


# --- what the result backend says -----------------------------------------------------------------------------------


@shared_task
def undo_when_told(_result: str, path: str) -> None:
    wait_for_file.run(path, "undo when told")


@shared_workflow
def undone_when_told(ctx: Context, path: str) -> None:
    ctx.run(do.s("a"), compensate=undo_when_told.s(path))
    ctx.receive("never")


def plain(cluster: Cluster, handle: WorkflowHandle) -> AsyncResult:
    """Return what somebody has of an instance who waits for its result in the result backend."""
    return AsyncResult(handle.id, app=cluster.app)


def test_the_result_backend_says_that_it_is_revoked_when_it_has_been_undone(cluster: Cluster, tmp_path: Path) -> None:
    handle = cluster.start("undone_when_told", str(tmp_path / "go"))
    cluster.wait_history(handle, 2)
    revoke(cluster, handle.id)
    cluster.wait_effect(handle, "do undo when told")
    with pytest.raises(CeleryTimeoutError):
        plain(cluster, handle).get(timeout=1)
    assert plain(cluster, handle).state in ("PENDING", "STARTED")
    (tmp_path / "go").touch()
    with pytest.raises(TaskRevokedError):
        plain(cluster, handle).get(timeout=20)
    assert handle.instance_status == "CANCELLED"


def test_whoever_waits_for_an_instance_that_declines_gets_its_result(cluster: Cluster) -> None:
    handle = cluster.start("declines", "declined")
    cluster.wait_history(handle, 1)
    revoke(cluster, handle.id)
    assert plain(cluster, handle).get(timeout=20) == "declined"


def test_one_whose_start_message_is_dropped_may_decline(
    cluster: Cluster, closed_queue: tuple[str, Callable[[], None]]
) -> None:
    queue, open_it = closed_queue
    handle = cluster.orchestrator.start(cluster.task("declines").s("declined").set(queue=queue))
    revoke(cluster, handle.id)
    open_it()
    assert plain(cluster, handle).get(timeout=20) == "declined"
    assert handle.instance_status == "COMPLETED"


@pytest.mark.parametrize("name", ["works", "follow"])
def test_what_no_worker_has_taken_is_told_to_be_revoked(
    cluster: Cluster, name: str, closed_queue: tuple[str, Callable[[], None]]
) -> None:
    queue, open_it = closed_queue
    sent = cluster.task(name).apply_async((NEVER,), queue=queue)
    shown = AsyncResult(sent.id, app=cluster.app)
    revoke(cluster, sent.id)
    if MARKS_AT_ONCE:
        wait_until(lambda: shown.state == "REVOKED", "REVOKED in the result backend")
    open_it()
    with pytest.raises(TaskRevokedError):
        shown.get(timeout=20)
    if name == "works":
        cluster.wait_status(cluster.task(name).AsyncResult(sent.id), "CANCELLED")
    assert shown.state == "REVOKED"


@shared_workflow
def past_pivot(ctx: Context) -> str:
    ctx.run(do.s("pay"), pivot=True)
    return str(ctx.receive("go", returns=str))


def test_an_instance_past_its_pivot_goes_on(cluster: Cluster) -> None:
    handle = cluster.start("past_pivot")
    cluster.wait_history(handle, 2)
    revoke(cluster, handle.id)
    wait_until(lambda: "a revoke changes nothing" in cluster.logs(), "the warning")
    with pytest.raises(InvalidOperation, match="past its pivot"):
        handle.revoke()
    handle.send("go", "on")
    assert handle.get(timeout=20) == "on"


def test_the_handles_own_revoke_needs_no_worker(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    cluster = Cluster(tmp_path, sqlite_url, broker_url, tasks=__name__)
    try:
        first, second = cluster.start("works", NEVER), cluster.start("works", NEVER)
        first.revoke()
        assert first.describe().cancel_reason == "revoked"
        second.revoke(terminate=True)
        assert second.instance_status == "TERMINATED"
        second.revoke()  # what has ended is left alone, as Celery does
        cluster.task("works").AsyncResult("not-recorded").revoke()
    finally:
        cluster.close()


# --- steps --------------------------------------------------------------------------------------------------------


@shared_workflow
def waits_for_queue(ctx: Context, queue: str, catches: bool) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    try:
        ctx.run(do.s("b").set(queue=queue), compensate=undo.s("b"))
    except StepWithdrawn:
        if not catches:
            raise
    return "done"


@pytest.mark.parametrize("catches", [True, False])
def test_a_revoked_step_that_has_not_begun_is_withdrawn(
    cluster: Cluster, catches: bool, closed_queue: tuple[str, Callable[[], None]]
) -> None:
    queue, _ = closed_queue
    handle = cluster.start("waits_for_queue", queue, catches)
    cluster.wait_history(handle, 2)
    revoke(cluster, f"{handle.id}:0:1:1")
    assert cluster.wait_status(handle) == ("COMPLETED" if catches else "COMPENSATED")
    assert handle.history()[1].outcome == "withdrawn"
    assert cluster.effects.names(handle.id) == (["do a"] if catches else ["do a", "undo a"])


@shared_task
def fails_late(path: str) -> None:
    wait_for_file.run(path, "late")
    step = current_step()
    assert step is not None
    note(f"requested {step.cancel_requested}", "effect")
    raise ValueError("refused")


@shared_task(bind=True, max_retries=3, default_retry_delay=600)
def retries_late(self: Task) -> None:
    note("tried", "effect")
    raise self.retry(exc=ValueError("refused"))


@shared_workflow
def runs(ctx: Context, name: str, *args: Any) -> Any:
    return ctx.run(globals()[name].s(*args), compensate=undo.s(name), retry=PROMPTLY)


def test_a_revoked_step_that_runs_is_left_to_succeed(cluster: Cluster, tmp_path: Path) -> None:
    handle = cluster.start("runs", "wait_for_file", str(tmp_path / "go"), "b")
    cluster.wait_effect(handle, "do b")
    revoke(cluster, f"{handle.id}:0:0:1")
    (tmp_path / "go").touch()
    assert handle.get(timeout=20) == "b"


def is_revoked(cluster: Cluster, handle: WorkflowHandle) -> bool:
    return cluster.list_rows(handle)[0].is_revoked


def test_a_revoked_step_that_runs_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    handle = cluster.start("runs", "fails_late", str(tmp_path / "go"))
    cluster.wait_effect(handle, "do late")
    revoke(cluster, f"{handle.id}:0:0:1")
    wait_until(lambda: is_revoked(cluster, handle), "the revoke being recorded")
    (tmp_path / "go").touch()
    cluster.wait_status(handle)
    step = handle.history()[0]
    assert (step.outcome, step.attempts) == ("failed", 1)
    assert cluster.effects.names(handle.id) == ["do late", "requested True"]


def test_a_revoked_step_does_not_wait_for_its_next_attempt(cluster: Cluster) -> None:
    handle = cluster.start("runs", "retries_late")
    wait_until(lambda: any(row.dispatch == 2 for row in cluster.list_rows(handle)), "the retry being scheduled")
    revoke(cluster, f"{handle.id}:0:0:1")  # the id that is shown: of the attempt that asked for it
    cluster.wait_status(handle)
    step = handle.history()[0]
    assert step.error is not None
    assert (step.outcome, step.attempts, step.error.message) == ("failed", 1, "refused")
    assert cluster.effects.names(handle.id) == ["tried"]


def test_a_revoked_step_whose_process_is_killed_is_not_tried_again(cluster: Cluster) -> None:
    handle = cluster.start("runs", "wait_for_file", NEVER, "b")
    cluster.wait_effect(handle, "do b")
    revoke(cluster, f"{handle.id}:0:0:1", terminate=True)
    cluster.wait_status(handle)
    step = handle.history()[0]
    assert (step.outcome, step.attempts) == ("unknown", 1)
    assert cluster.effects.names(handle.id) == ["do b", "undo wait_for_file"]


# --- compensations ------------------------------------------------------------------------------------------------


@shared_workflow
def undone_elsewhere(ctx: Context, queue: str) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a").set(queue=queue))
    raise ValueError("no")


def test_a_revoked_compensation_is_run_under_another_id(
    cluster: Cluster, closed_queue: tuple[str, Callable[[], None]]
) -> None:
    queue, open_it = closed_queue
    handle = cluster.start("undone_elsewhere", queue)
    cluster.wait_history(handle, 2)
    revoke(cluster, f"{handle.id}:0:1:1")
    wait_until(lambda: cluster.list_rows(handle)[1].dispatch == 2, "the compensation having another id")
    open_it()
    assert cluster.wait_status(handle) == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["do a", "undo a"]
    assert (handle.history()[1].attempts, cluster.list_rows(handle)[1].dispatch) == (1, 2)
    assert "cannot be revoked" in cluster.logs()


@shared_task
def undo_late(result: str | None, path: str) -> None:
    wait_for_file.run(path, "undo late")


@shared_workflow
def undone_late(ctx: Context, path: str) -> None:
    ctx.run(do.s("a"), compensate=undo_late.s(path))
    raise ValueError("no")


def test_a_compensation_whose_process_is_killed_is_run_again(cluster: Cluster, tmp_path: Path) -> None:
    handle = cluster.start("undone_late", str(tmp_path / "go"))
    cluster.wait_effect(handle, "do undo late")
    revoke(cluster, f"{handle.id}:0:1:1", terminate=True)
    (tmp_path / "go").touch()
    assert cluster.wait_status(handle) == "COMPENSATED"
    assert handle.history()[1].attempts == 2
