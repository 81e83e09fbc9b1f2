"""Children: instances of their own, whose end is a step's outcome in their parent, and which are undone with it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import group, shared_task

from orchestrator import Context, Orchestrator, RetryPolicy, StepFailed, StepTimedOut, WorkflowHandle, shared_workflow
from orchestrator.store import mailbox
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do, note, undo, wait_for_file
from tests.waiting import wait_until


def child_of(cluster: Cluster, parent: WorkflowHandle, seq: int = 0) -> WorkflowHandle:
    """Return the child that a record of ``parent`` starts, once it is recorded."""

    def find() -> str:
        ids = [entry.child_id for entry in parent.history() if entry.seq == seq]
        return ids[0] if ids and ids[0] and cluster.orchestrator.find_instance(ids[0]) else ""

    return cluster.orchestrator.get(wait_until(find, f"the child {seq} of {parent.id}"))


@shared_task
def cannot_undo(_result: Any) -> None:
    note("cannot undo", "effect")
    if not Path(os.environ["TEST_CRASHES"], "mended").exists():
        raise ValueError("no way back")


def register(orchestrator: Orchestrator) -> None:
    orchestrator.activity(retry=RetryPolicy(max_attempts=1, initial_interval=timedelta(0)))(cannot_undo)


@shared_workflow
def child(ctx: Context, name: str) -> str:
    ctx.run(do.s(name), compensate=undo.s(name))
    return f"{name} done"


@shared_workflow
def parent(ctx: Context, name: str) -> str:
    return str(ctx.run(child.s(name)))


def test_a_child_returns_its_result(cluster: Cluster) -> None:
    handle = cluster.run("parent", "a")
    assert handle.get(timeout=1) == "a done"
    (entry,) = handle.history()
    assert (entry.kind, entry.outcome, entry.attempts) == ("child", "succeeded", 1)
    found = child_of(cluster, handle)
    assert found.describe().parent_id == handle.id
    assert found.get(timeout=1) == "a done"
    assert cluster.effects.names(found.id) == ["do a"]


@shared_workflow
def is_deep(ctx: Context, depth: int) -> None:
    ctx.run(do.s(f"depth {depth}"), compensate=undo.s(f"depth {depth}"))
    if depth < 2:
        ctx.run(is_deep.s(depth + 1))
    if depth == 0:
        raise LookupError("too late")


def test_a_failing_parent_undoes_its_children_and_theirs(cluster: Cluster) -> None:
    handle = cluster.run("is_deep", 0)
    assert handle.instance_status == "COMPENSATED"
    middle = child_of(cluster, handle, 1)
    deepest = child_of(cluster, middle, 1)
    assert [middle.instance_status, deepest.instance_status] == ["COMPENSATED", "COMPENSATED"]
    names = [effect.name for effect in cluster.effects.list_effects(what="effect") if "depth" in effect.name]
    assert names == [f"do depth {n}" for n in (0, 1, 2)] + [f"undo depth {n}" for n in (2, 1, 0)]
    assert [entry.kind for entry in handle.history()] == ["step", "child", "undo", "compensation"]


@shared_workflow
def failing(ctx: Context, how: str) -> None:
    ctx.run(do.s("own"), compensate=cannot_undo.s() if how == "not undone" else undo.s("own"))
    raise LookupError(how)


@shared_workflow
def tries_a_child(ctx: Context, how: str) -> str:
    try:
        ctx.run(failing.s(how))
    except StepFailed as error:
        return f"{error.outcome} {isinstance(error, LookupError)} {error.message}"
    return "never"


def test_a_failed_child_has_undone_itself_and_raises_in_its_parent(cluster: Cluster) -> None:
    handle = cluster.run("tries_a_child", "out of stock")
    assert handle.get(timeout=1) == "failed True out of stock"
    found = child_of(cluster, handle)
    assert found.instance_status == "COMPENSATED"
    assert cluster.effects.names(found.id) == ["do own", "undo own"]


@shared_workflow
def needs_a_child(ctx: Context, how: str) -> None:
    ctx.run(do.s("first"), compensate=undo.s("first"))
    ctx.run(failing.s(how))


def test_a_child_that_could_not_be_undone_is_named_by_its_parent(cluster: Cluster) -> None:
    handle = cluster.run("needs_a_child", "not undone")
    assert handle.instance_status == "COMPENSATION_FAILED"
    assert cluster.effects.names(handle.id) == ["do first", "undo first"]
    found = child_of(cluster, handle, 1)
    assert found.instance_status == "COMPENSATION_FAILED"
    (entry,) = handle.describe().not_undone
    assert entry.undoes == 1
    assert found.id in entry.message

    mended = cluster.crashes / "mended"
    mended.touch()
    try:
        found.retry_compensation(0)
        cluster.wait_status(found, "COMPENSATED")
        handle.retry_compensation(1)
        cluster.wait_status(handle, "COMPENSATED")
    finally:
        mended.unlink()
    assert handle.describe().not_undone == []


@shared_workflow
def has_many(ctx: Context, fails: bool) -> list[Any]:
    together = ctx.run(group(child.s("g1"), child.s("g2")))
    mapped = ctx.map(child.s(), ["m1", "m2", "m3"], concurrency=2)
    first, step = ctx.gather(child.s("a"), do.s("b"))
    if fails:
        raise LookupError("after all")
    return [*together, *mapped, first, step]


def test_children_run_together_and_one_by_one(cluster: Cluster) -> None:
    handle = cluster.run("has_many", False)
    assert handle.get(timeout=1) == ["g1 done", "g2 done", "m1 done", "m2 done", "m3 done", "a done", "b"]
    undone = cluster.run("has_many", True)
    assert undone.instance_status == "COMPENSATED"
    children = [entry.child_id for entry in undone.history() if entry.kind == "child"]
    assert len(set(children)) == 6
    for each in children:
        assert each is not None
        assert cluster.orchestrator.get(each).instance_status == "COMPENSATED"
        assert [name.split()[0] for name in cluster.effects.names(each)] == ["do", "undo"]


@shared_workflow
def slow_child(ctx: Context, path: str) -> str:
    ctx.run(wait_for_file.s(path, "slow"), compensate=undo.s("slow"))
    ctx.receive("go on", timeout=60)
    return "slow done"


@shared_workflow
def leaves_a_child(ctx: Context, path: str, timeout: float | None) -> str:
    handle = ctx.start(slow_child.s(path), on_parent_end="leave", timeout=timeout)
    return str(handle.instance_id)


def test_a_child_that_is_left_alone_outlives_its_parent(cluster: Cluster) -> None:
    go = cluster.folder / "leaves"
    handle = cluster.run("leaves_a_child", str(go), None)
    found = child_of(cluster, handle)
    assert handle.get(timeout=1) == found.id
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    go.touch()
    found.send("go on", None)
    assert found.get(timeout=20) == "slow done"
    wait_until(lambda: handle.history()[0].outcome == "succeeded", "the record of the parent")
    assert cluster.effects.names(found.id) == ["do slow"]


def test_a_timeout_that_nobody_waits_for_any_more_leaves_nothing_due(cluster: Cluster) -> None:
    go = cluster.folder / "leaves in time"
    handle = cluster.run("leaves_a_child", str(go), 1.0)
    found = child_of(cluster, handle)
    wait_until(lambda: cluster.list_rows(handle)[0].due_at is None, "nothing being due")
    assert found.instance_status == "RUNNING"
    go.touch()
    found.send("go on", None)
    assert found.get(timeout=20) == "slow done"


@shared_workflow
def waits_for_a_child(ctx: Context, path: str, timeout: float | None, catches: bool) -> str:
    ctx.run(do.s("first"), compensate=undo.s("first"))
    try:
        return str(ctx.run(slow_child.s(path), timeout=timeout))
    except StepTimedOut:
        if not catches:
            raise
        return "too slow"
    except StepFailed as error:
        return f"{error.outcome}: {error.error_type}"


def test_a_child_that_takes_too_long_is_cancelled_and_undone(cluster: Cluster) -> None:
    go = cluster.folder / "too long"
    go.touch()
    handle = cluster.run("waits_for_a_child", str(go), 2.5, False)
    assert handle.instance_status == "COMPENSATED"
    found = child_of(cluster, handle, 1)
    assert found.instance_status == "CANCELLED"
    assert cluster.effects.names(found.id) == ["do slow", "undo slow"]
    assert cluster.effects.names(handle.id) == ["do first", "undo first"]


def test_a_child_in_doubt_is_undone_before_its_parent_ends_well(cluster: Cluster) -> None:
    go = cluster.folder / "too long, caught"
    go.touch()
    handle = cluster.run("waits_for_a_child", str(go), 2.5, True)
    assert handle.get(timeout=1) == "too slow"
    found = child_of(cluster, handle, 1)
    assert found.instance_status == "CANCELLED"
    assert cluster.effects.names(handle.id) == ["do first"]


def test_a_cancelled_child_raises_in_its_parent(cluster: Cluster) -> None:
    go = cluster.folder / "cancelled child"
    go.touch()
    handle = cluster.start("waits_for_a_child", str(go), None, True)
    found = child_of(cluster, handle, 1)
    cluster.wait_history(found, 3)
    found.cancel("by its operator")
    cluster.wait_status(handle)
    assert handle.get(timeout=1) == "failed: orchestrator.errors.WorkflowCancelled"
    assert found.instance_status == "CANCELLED"
    assert cluster.effects.names(found.id) == ["do slow", "undo slow"]


def test_a_terminated_parent_terminates_its_child(cluster: Cluster) -> None:
    go = cluster.folder / "terminated parent"
    go.touch()
    handle = cluster.start("waits_for_a_child", str(go), None, True)
    found = child_of(cluster, handle, 1)
    cluster.wait_history(found, 3)
    handle.terminate("enough")
    assert handle.instance_status == "TERMINATED"
    cluster.wait_status(found, "TERMINATED")
    assert cluster.effects.names(handle.id) == ["do first"]
    assert cluster.effects.names(found.id) == ["do slow"]


def test_a_terminated_child_leaves_its_parent_in_doubt(cluster: Cluster) -> None:
    go = cluster.folder / "terminated child"
    go.touch()
    handle = cluster.start("waits_for_a_child", str(go), None, False)
    found = child_of(cluster, handle, 1)
    cluster.wait_history(found, 3)
    found.terminate()
    # caught, and in doubt: at its end the parent has it undone, which nobody can
    cluster.wait_status(handle)
    assert handle.history()[1].outcome == "unknown"
    (entry,) = handle.describe().not_undone
    assert entry.undoes == 1
    assert "is TERMINATED" in entry.message


def test_a_child_that_is_terminated_and_sent_something_at_once_owes_nothing(cluster: Cluster) -> None:
    handle = cluster.start("listener")
    cluster.wait_history(handle, 1)
    # one batch of mail for it: whoever finds the first finds the second
    with cluster.orchestrator.store.begin("test") as connection:
        now = cluster.orchestrator.coordinator.clock()
        mailbox.insert_mail(connection, mailbox.NewMail(handle.id, kind=mailbox.MailKind.TERMINATE), now)
        mailbox.insert_mail(connection, mailbox.NewMail(handle.id, "in", '"too late"'), now)
    cluster.wait_status(handle, "TERMINATED")
    instance = cluster.orchestrator.find_instance(handle.id)
    assert instance is not None
    assert (instance.waiting, instance.pass_due_at) == (0, None)


@shared_workflow
def names_its_child(ctx: Context, child_id: str) -> str:
    ctx.run(do.s("first"), compensate=undo.s("first"))
    return str(ctx.run(child.s("named").set(task_id=child_id)))


def test_a_child_has_the_id_it_is_given_once(cluster: Cluster) -> None:
    first = cluster.run("names_its_child", "the-child")
    assert first.get(timeout=1) == "named done"
    assert cluster.orchestrator.get("the-child").get(timeout=1) == "named done"
    second = cluster.run("names_its_child", "the-child")
    assert second.instance_status == "COMPENSATED"
    assert second.history()[1].outcome == "failed"
    assert "InstanceExists" in str(second.history()[1].error)
    assert cluster.orchestrator.get("the-child").instance_status == "COMPLETED"
    assert cluster.effects.names("the-child") == ["do named"]


@shared_workflow
def maps_children(ctx: Context, path: str) -> list[str]:
    ctx.run(do.s("first"), compensate=undo.s("first"))
    return list(ctx.map(slow_child.s(), [path, path, path], concurrency=1))


def test_children_that_a_map_holds_back_never_begin_when_it_is_cancelled(cluster: Cluster) -> None:
    go = cluster.folder / "map"
    handle = cluster.start("maps_children", str(go))
    found = child_of(cluster, handle, 1)
    cluster.wait_effect(found, "do slow")
    handle.cancel()
    wait_until(lambda: [e.outcome for e in handle.history()][2:4] == ["withdrawn"] * 2, "those that are held back")
    go.touch()
    cluster.wait_status(handle)
    assert [handle.instance_status, found.instance_status] == ["CANCELLED", "CANCELLED"]
    assert cluster.effects.names(found.id) == ["do slow", "undo slow"]
    assert cluster.effects.names(handle.id) == ["do first", "undo first"]


@shared_workflow
def talks_to_its_child(ctx: Context) -> list[Any]:
    handle = ctx.start(listener.s())
    ctx.send(handle.instance_id, "in", "sent in the pass that started it")
    first = ctx.gather(handle)
    return list(first)


@shared_workflow
def listener(ctx: Context) -> Any:
    return ctx.receive("in")


def test_a_message_to_a_child_may_come_before_the_child(cluster: Cluster) -> None:
    assert cluster.run("talks_to_its_child").get(timeout=1) == ["sent in the pass that started it"]
