"""Cancelling, wherever it meets an instance: what has taken effect is undone, what has not begun never does."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from celery import shared_task
from celery.exceptions import TaskRevokedError

from orchestrator import Context, RetryPolicy, WorkflowCancelled, shared_workflow
from orchestrator.errors import InvalidOperation
from tests.runtime.cluster import Cluster
from tests.runtime.test_children import child_of
from tests.runtime.workflows import do, note, undo, wait_for_file
from tests.waiting import wait_until


@shared_workflow
def works(ctx: Context, path: str) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.run(wait_for_file.s(path, "b"), compensate=undo.s("b"))
    ctx.run(do.s("c"), compensate=undo.s("c"))
    return "done"


def test_one_that_no_worker_has_seen_ends_without_an_effect(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    cluster = Cluster(tmp_path, sqlite_url, broker_url, tasks=__name__)
    try:
        handle = cluster.start("works", "nowhere")
        handle.cancel("changed their mind")
        assert handle.instance_status == "PENDING"
        cluster.start_worker()
        cluster.wait_status(handle)
        assert handle.instance_status == "CANCELLED"
        assert cluster.effects.names(handle.id) == []
        assert [entry.outcome for entry in handle.history()] == ["withdrawn"]
        assert handle.describe().cancel_reason == "changed their mind"
    finally:
        cluster.close()


@shared_workflow
def waits_for_elsewhere(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.run(do.s("b").set(queue="nobody-serves-this"), compensate=undo.s("b"))


def test_a_step_that_was_not_claimed_is_withdrawn(cluster: Cluster) -> None:
    handle = cluster.start("waits_for_elsewhere")
    cluster.wait_history(handle, 2)
    handle.cancel()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert cluster.effects.names(handle.id) == ["do a", "undo a"]
    assert [entry.outcome for entry in handle.history()] == ["succeeded", "withdrawn", "succeeded"]


def test_a_step_under_way_is_left_to_end_and_then_undone(cluster: Cluster) -> None:
    go = cluster.folder / "under way"
    handle = cluster.start("works", str(go))
    cluster.wait_effect(handle, "do b")
    handle.cancel("enough")
    wait_until(lambda: handle.instance_status == "COMPENSATING", "it knowing")
    go.touch()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert handle.state == "REVOKED"
    assert cluster.effects.names(handle.id) == ["do a", "do b", "undo b", "undo a"]
    assert cluster.effects.names(handle.id, "released") == ["do b"]
    with pytest.raises(TaskRevokedError):
        handle.get(timeout=1)


def test_with_terminate_the_process_of_a_step_under_way_is_ended(cluster: Cluster) -> None:
    handle = cluster.start("works", str(cluster.folder / "never made"))
    cluster.wait_effect(handle, "do b")
    handle.cancel(terminate=True)
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert cluster.effects.names(handle.id) == ["do a", "do b", "undo b", "undo a"]
    assert cluster.effects.names(handle.id, "released") == []
    step = handle.history()[1]
    assert (step.outcome, step.attempts) == ("unknown", 1)


@shared_workflow
def sleeps(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.sleep(3600)


@shared_workflow
def receives(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.receive("never", timeout=3600)


@shared_workflow
def waits_for_several(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.wait(ctx.message("x"), ctx.message("y"), ctx.timer(3600), timeout=timedelta(days=3))


@pytest.mark.parametrize(("workflow", "records"), [("sleeps", 2), ("receives", 3), ("waits_for_several", 5)])
def test_a_wait_is_interrupted_and_withdraws_what_it_waited_for(cluster: Cluster, workflow: str, records: int) -> None:
    handle = cluster.start(workflow)
    cluster.wait_history(handle, records)
    handle.cancel()
    handle.cancel("twice is once")
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert [e.outcome for e in handle.history()] == ["succeeded", *["withdrawn"] * (records - 1), "succeeded"]
    assert cluster.effects.names(handle.id) == ["do a", "undo a"]
    assert [row.seq for row in cluster.list_rows(handle) if row.due_at is not None] == []
    handle.cancel("and after its end too")


@shared_workflow
def gathers(ctx: Context, path: str) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.gather(
        ctx.start(do.s("quick"), compensate=undo.s("quick")),
        ctx.start(wait_for_file.s(path, "slow"), compensate=undo.s("slow")),
        ctx.start(do.s("elsewhere").set(queue="nobody-serves-this"), compensate=undo.s("elsewhere")),
    )


def test_a_gather_is_drained_before_it_is_undone(cluster: Cluster) -> None:
    go = cluster.folder / "gather"
    handle = cluster.start("gathers", str(go))
    cluster.wait_effect(handle, "do slow")
    cluster.wait_effect(handle, "do quick", "end")
    handle.cancel()
    wait_until(lambda: handle.history()[3].outcome == "withdrawn", "the step that has not begun being withdrawn")
    assert "undo quick" not in cluster.effects.names(handle.id)
    go.touch()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    undone = [name for name in cluster.effects.names(handle.id) if name.startswith("undo")]
    assert undone == ["undo slow", "undo quick", "undo a"]


@shared_workflow
def is_child(ctx: Context, depth: int) -> None:
    ctx.run(do.s(f"depth {depth}"), compensate=undo.s(f"depth {depth}"))
    if depth == 0:
        ctx.sleep(3600)
    ctx.run(is_child.s(depth - 1))


def test_children_and_theirs_are_cancelled_with_their_parent(cluster: Cluster) -> None:
    handle = cluster.start("is_child", 2)
    middle = child_of(cluster, handle, 1)
    deepest = child_of(cluster, middle, 1)
    cluster.wait_history(deepest, 2)
    handle.cancel()
    cluster.wait_status(handle)
    assert [each.instance_status for each in (handle, middle, deepest)] == ["CANCELLED"] * 3
    assert [cluster.effects.names(each.id) for each in (handle, middle, deepest)] == [
        [f"do depth {depth}", f"undo depth {depth}"] for depth in (2, 1, 0)
    ]


@shared_task
def undo_when_there(_result: str, path: str) -> None:
    note("undo slowly", "effect")
    wait_until(lambda: Path(path).exists(), path, 60)


@shared_workflow
def undoes_slowly(ctx: Context, path: str) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.run(do.s("b"), compensate=undo_when_there.s(path))
    raise LookupError("out of stock")


def test_what_is_being_undone_goes_on_and_stays_a_failure(cluster: Cluster) -> None:
    go = cluster.folder / "undo"
    handle = cluster.start("undoes_slowly", str(go))
    cluster.wait_effect(handle, "undo slowly")
    handle.cancel()
    go.touch()
    cluster.wait_status(handle)
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["do a", "do b", "undo slowly", "undo a"]
    with pytest.raises(InvalidOperation, match="is COMPENSATED"):
        handle.cancel()


@shared_workflow
def tries_two_ways(ctx: Context, path: str) -> str:
    try:
        with ctx.saga():
            ctx.run(do.s("first way"), compensate=undo_when_there.s(path))
            raise LookupError("no way")
    except LookupError:
        ctx.run(do.s("second way"), compensate=undo.s("second way"))
    return "second way"


def test_an_inner_undo_is_finished_before_the_cancellation_is_raised(cluster: Cluster) -> None:
    go = cluster.folder / "inner undo"
    handle = cluster.start("tries_two_ways", str(go))
    cluster.wait_effect(handle, "undo slowly")
    handle.cancel()
    go.touch()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert cluster.effects.names(handle.id) == ["do first way", "undo slowly"]


@shared_workflow
def quick(ctx: Context) -> str:
    return str(ctx.run(do.s("a"), compensate=undo.s("a")))


def test_what_has_just_ended_is_not_cancelled(cluster: Cluster) -> None:
    handle = cluster.run("quick")
    with pytest.raises(InvalidOperation, match="is COMPLETED"):
        handle.cancel()
    assert (handle.instance_status, cluster.effects.names(handle.id)) == ("COMPLETED", ["do a"])


def test_a_race_with_the_end_is_won_by_one_of_the_two(cluster: Cluster) -> None:
    handles = [cluster.start("quick") for _ in range(10)]
    refused: set[str] = set()

    def cancel(handle: object) -> None:
        for each in handles:
            if each is handle:
                wait_until(lambda: cluster.effects.names(each.id, "end"), "its step ending")  # noqa: B023
                try:
                    each.cancel()
                except InvalidOperation:
                    refused.add(each.id)

    threads = [threading.Thread(target=cancel, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        cluster.wait_status(handle)
        expected = ("COMPLETED", ["do a"]) if handle.id in refused else ("CANCELLED", ["do a", "undo a"])
        is_declined = handle.id not in refused and handle.instance_status == "COMPLETED"
        assert is_declined or (handle.instance_status, cluster.effects.names(handle.id)) == expected


@shared_workflow
def cleans_up(ctx: Context, declines: bool) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    try:
        ctx.sleep(3600)
    except WorkflowCancelled as cancelled:
        ctx.run(do.s("clean up"), compensate=undo.s("clean up"))
        ctx.sleep(0.1)
        if not declines:
            raise
        return f"declined: {cancelled.reason}"
    return "slept"


def test_code_that_catches_it_may_clean_up(cluster: Cluster) -> None:
    handle = cluster.start("cleans_up", False)
    cluster.wait_history(handle, 2)
    handle.cancel()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert cluster.effects.names(handle.id) == ["do a", "do clean up", "undo clean up", "undo a"]


def test_code_that_catches_it_may_decline(cluster: Cluster) -> None:
    handle = cluster.start("cleans_up", True)
    cluster.wait_history(handle, 2)
    handle.cancel("no longer wanted")
    assert handle.get(timeout=20) == "declined: no longer wanted"
    assert handle.instance_status == "COMPLETED"
    assert cluster.effects.names(handle.id) == ["do a", "do clean up"]


@shared_workflow(deadline=timedelta(seconds=60))
def has_time(ctx: Context) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    return str(ctx.receive("go on"))


def test_what_ends_before_its_deadline_has_none_any_more(cluster: Cluster) -> None:
    handle = cluster.start("has_time")
    cluster.wait_history(handle, 2)
    described = handle.describe()
    assert described.deadline_at == described.created_at + timedelta(seconds=60)
    handle.send("go on", "in time")
    assert handle.get(timeout=20) == "in time"
    assert handle.describe().deadline_at is None


@shared_workflow(deadline=timedelta(seconds=2.5))
def has_a_deadline(ctx: Context) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    try:
        ctx.sleep(3600)
    except WorkflowCancelled as cancelled:
        assert cancelled.is_deadline
        ctx.run(do.s("is late"))
        raise
    return "in time"


def test_what_has_not_ended_by_its_deadline_is_cancelled(cluster: Cluster) -> None:
    late = cluster.start("has_a_deadline")
    cluster.wait_status(late)
    assert late.instance_status == "CANCELLED"
    assert cluster.effects.names(late.id) == ["do a", "do is late", "undo a"]
    described = late.describe()
    assert described.ended_at is not None
    assert (described.ended_at - described.created_at).total_seconds() >= 2.5


# --- terminating --------------------------------------------------------------------------------------------------


@shared_task
def fails_when_there(path: str) -> None:
    note("try", "effect")
    wait_until(lambda: Path(path).exists(), path, 60)
    raise ConnectionError("try again")


@shared_workflow
def retries(ctx: Context, path: str, timeout: float | None) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    policy = RetryPolicy(max_attempts=5, initial_interval=timedelta(0))
    ctx.run(fails_when_there.s(path), retry=policy, timeout=timeout)


def test_a_terminated_instance_undoes_nothing_and_tries_nothing_again(cluster: Cluster) -> None:
    go = cluster.folder / "terminate"
    handle = cluster.start("retries", str(go), None)
    cluster.wait_effect(handle, "try")
    handle.terminate("enough")
    handle.terminate("twice is once")
    assert handle.instance_status == "TERMINATED"
    assert handle.state == "REVOKED"
    go.touch()
    wait_until(lambda: handle.history()[1].state == "settled", "the attempt that was under way having ended")
    assert cluster.effects.names(handle.id) == ["do a", "try"]
    assert handle.history()[1].outcome == "failed"
    with pytest.raises(InvalidOperation, match="is TERMINATED"):
        handle.cancel()


def test_the_timeout_of_a_step_is_nothing_to_a_terminated_instance(cluster: Cluster) -> None:
    go = cluster.folder / "terminate in time"
    handle = cluster.start("retries", str(go), 2.0)
    cluster.wait_effect(handle, "try")
    handle.terminate()
    wait_until(lambda: cluster.list_rows(handle)[1].due_at is None, "nothing being due")
    go.touch()
    wait_until(lambda: handle.history()[1].state == "settled", "the attempt that was under way having ended")
    assert cluster.effects.names(handle.id) == ["do a", "try"]


def test_one_that_no_worker_has_seen_is_terminated_at_once(cluster: Cluster) -> None:
    handle = cluster.start("works", "nowhere")
    handle.terminate()
    assert handle.instance_status == "TERMINATED"
    with pytest.raises(InvalidOperation, match="is TERMINATED"):
        handle.undo()


@shared_workflow
def waits_to_try_again(ctx: Context, path: str) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    policy = RetryPolicy(max_attempts=5, initial_interval=timedelta(hours=1))
    ctx.run(fails_when_there.s(path), retry=policy, compensate=undo.s("tried"))


def test_a_step_that_waits_for_its_next_attempt_is_withdrawn(cluster: Cluster) -> None:
    go = cluster.folder / "tries again"
    go.touch()
    handle = cluster.start("waits_to_try_again", str(go))
    wait_until(lambda: [(e.attempts, e.state) for e in handle.history()][1:] == [(1, "scheduled")], "its first attempt")
    handle.cancel()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert cluster.effects.names(handle.id) == ["do a", "try", "undo a"]
    assert handle.history()[1].outcome == "failed"
