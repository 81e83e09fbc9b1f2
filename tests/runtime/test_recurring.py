"""``recur``: the next run begins with fresh history under the same id, and loses nothing that came meanwhile."""

from __future__ import annotations

from typing import Any

from orchestrator import Context, WorkflowCancelled, shared_workflow
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do, undo, wait_for_file


@shared_workflow
def counts(ctx: Context, number: int, last: int) -> int:
    ctx.run(do.s(f"run {number}"), compensate=undo.s(f"run {number}"))
    ctx.commit()
    if number < last:
        ctx.recur(number + 1, last=last)
    return number


def test_runs_follow_one_another_and_are_kept(cluster: Cluster) -> None:
    handle = cluster.run("counts", 0, 4)
    assert handle.get(timeout=1) == 4
    assert cluster.effects.names(handle.id) == [f"do run {number}" for number in range(5)]
    assert [(run.run, run.args + list(run.kwargs.values())) for run in handle.runs()] == [(n, [n, 4]) for n in range(4)]
    assert handle.describe().run == 4
    assert [[entry.args for entry in handle.history(run)] for run in range(5)] == [[[f"run {n}"]] for n in range(5)]
    ended = [run.ended_at for run in handle.runs()]
    assert ended == sorted(ended)


@shared_workflow
def consumes(ctx: Context, received: list[Any], count: int) -> list[Any]:
    """One message a run, as a worker on a stream of them does."""
    received = [*received, ctx.receive("in")]
    if len(received) < count:
        ctx.recur(received, count)
    return received


def test_messages_between_runs_are_received_once_and_in_order(cluster: Cluster) -> None:
    handle = cluster.start("consumes", [], 8)
    for number in range(8):
        handle.send("in", number, message_id=str(number))
        handle.send("in", number, message_id=str(number), missing="ignore")  # with the last one it may have ended
    assert handle.get(timeout=30) == list(range(8))
    assert handle.describe().run == 7


@shared_workflow
def keeps_its_subscription(ctx: Context, received: list[Any]) -> list[Any]:
    if not received:
        ctx.subscribe("stream")
    received = [*received, ctx.receive("stream")]
    if len(received) < 3:
        ctx.recur(received)
    return received


def test_a_subscription_holds_in_the_next_run(cluster: Cluster) -> None:
    handle = cluster.start("keeps_its_subscription", [])
    cluster.wait_history(handle, 2)
    for number in range(3):
        cluster.orchestrator.publish("stream", number)
    assert handle.get(timeout=20) == [0, 1, 2]


@shared_workflow
def works_in_runs(ctx: Context, run: int, path: str) -> str:
    name = f"run {run}"
    try:
        ctx.run(wait_for_file.s(path, name) if run == 0 else do.s(name), compensate=undo.s(name))
        ctx.commit()
    except WorkflowCancelled:
        ctx.run(do.s(f"clean up in run {run}"))
        raise
    if run < 50:
        ctx.recur(run + 1, path)
    return "never stopped"


def test_a_cancellation_stops_whichever_run_it_meets(cluster: Cluster) -> None:
    go = cluster.folder / "go"
    handle = cluster.start("works_in_runs", 0, str(go))
    cluster.wait_effect(handle, "do run 0")
    handle.cancel()
    go.touch()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    run = handle.describe().run
    assert cluster.effects.names(handle.id).count(f"do clean up in run {run}") == 1


@shared_workflow
def waits_for_what_is_open(ctx: Context, run: int) -> int:
    if run == 0:
        ctx.start(do.s("left open"), compensate=False)
        ctx.timer(3600)
        ctx.message("nothing")
        ctx.recur(1)
    return run


def test_a_run_ends_when_what_it_started_has_settled(cluster: Cluster) -> None:
    handle = cluster.run("waits_for_what_is_open", 0)
    assert handle.get(timeout=1) == 1
    assert cluster.effects.names(handle.id) == ["do left open"]
    assert [entry.outcome for entry in handle.history(0)] == ["succeeded", "withdrawn", "withdrawn"]


@shared_workflow
def forgets_compensations(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.recur()


def test_a_run_that_would_forget_compensations_blocks(cluster: Cluster) -> None:
    handle = cluster.run("forgets_compensations")
    assert handle.instance_status == "BLOCKED"
    assert "ctx.recur would forget 1 compensation(s), the first for step 0" in (handle.describe().blocked or "")
    assert cluster.effects.names(handle.id) == ["do a"]


@shared_workflow
def fails_in_a_later_run(ctx: Context, run: int) -> None:
    ctx.run(do.s(f"run {run}"), compensate=undo.s(f"run {run}"))
    if run == 0:
        ctx.commit()
        ctx.recur(1)
    raise LookupError("nothing left")


def test_a_failure_undoes_the_run_it_happens_in(cluster: Cluster) -> None:
    handle = cluster.run("fails_in_a_later_run", 0)
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["do run 0", "do run 1", "undo run 1"]
