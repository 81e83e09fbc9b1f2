"""Forks: a new instance goes on from the middle of another one's history, and undoes only what is its own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator import Context, shared_workflow
from orchestrator.errors import InstanceExists, InvalidOperation
from tests.runtime.cluster import Cluster
from tests.runtime.test_children import child_of
from tests.runtime.workflows import do, fail, undo, wait_for_file
from tests.waiting import wait_until


@shared_workflow
def orders(ctx: Context) -> list[Any]:
    drawn = [str(ctx.uuid4()), ctx.random()]
    first = ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.sleep(0.05)
    paid = ctx.receive("paid")
    second = ctx.run(do.s("b"), compensate=undo.s("b"))
    if paid == "fails":
        raise LookupError("after b")
    return [*drawn, first, paid, second]


def test_a_fork_runs_only_what_comes_after_it(cluster: Cluster) -> None:
    handle = cluster.start("orders")
    handle.send("paid", 5)
    result = handle.get(timeout=20)
    fork = handle.fork(3, "orders-fork")
    assert fork.id == "orders-fork"
    assert fork.get(timeout=20) == result
    assert cluster.effects.names(fork.id) == ["do b"]
    assert [entry.kind for entry in fork.history()] == ["step", "timer", "receive", "step"]
    with pytest.raises(InstanceExists):
        handle.fork(3, "orders-fork")


def test_a_fork_before_a_receive_gets_a_message_of_its_own(cluster: Cluster) -> None:
    handle = cluster.start("orders")
    handle.send("paid", 5)
    result = handle.get(timeout=20)
    fork = handle.fork(2)
    cluster.wait_history(fork, 3)
    fork.send("paid", 7, missing="ignore")  # it may have had the first one, and ended
    told = fork.get(timeout=20)
    assert told[:3] == result[:3]
    assert told[3] in (5, 7)
    assert cluster.effects.names(fork.id) == ["do b"]


def test_a_fork_undoes_only_its_own_steps(cluster: Cluster) -> None:
    handle = cluster.start("orders")
    handle.send("paid", "fails")
    cluster.wait_status(handle)
    assert cluster.effects.names(handle.id) == ["do a", "do b", "undo b", "undo a"]
    fork = handle.fork(3)
    cluster.wait_status(fork)
    assert fork.instance_status == "COMPENSATED"
    assert cluster.effects.names(fork.id) == ["do b", "undo b"]
    assert cluster.effects.names(handle.id).count("undo a") == 1


def test_a_fork_of_a_terminated_instance_may_own_what_that_has_done(cluster: Cluster) -> None:
    handle = cluster.start("orders")
    cluster.wait_history(handle, 3)
    with pytest.raises(InvalidOperation, match="only a TERMINATED instance gives its compensations away"):
        handle.fork(2, owns_compensations=True)
    handle.terminate()
    fork = handle.fork(2, owns_compensations=True)
    fork.send("paid", "fails")
    cluster.wait_status(fork)
    assert fork.instance_status == "COMPENSATED"
    assert cluster.effects.names(fork.id) == ["do b", "undo b", "undo a"]
    assert cluster.effects.names(handle.id) == ["do a"]


@shared_workflow
def child(ctx: Context, name: str) -> str:
    return str(ctx.run(do.s(name), compensate=undo.s(name)))


@shared_workflow
def has_children(ctx: Context) -> list[str]:
    return [ctx.run(child.s("x")), ctx.run(child.s("y"))]


def test_a_fork_starts_children_of_its_own_and_undoes_those_alone(cluster: Cluster) -> None:
    handle = cluster.run("has_children")
    fork = handle.fork(1)
    assert fork.get(timeout=20) == ["x", "y"]
    shared, first, second = child_of(cluster, handle, 0), child_of(cluster, handle, 1), child_of(cluster, fork, 1)
    assert first.id != second.id
    fork.undo()
    cluster.wait_status(fork, "COMPENSATED")
    assert [each.instance_status for each in (shared, first, second)] == ["COMPLETED", "COMPLETED", "COMPENSATED"]
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    assert [each.instance_status for each in (shared, first)] == ["COMPENSATED", "COMPENSATED"]


@shared_workflow
def works_beside(ctx: Context, path: str) -> list[str]:
    slow = ctx.start(wait_for_file.s(path, "slow"), compensate=undo.s("slow"))
    quick = ctx.run(do.s("quick"), compensate=undo.s("quick"))
    ctx.run(do.s("between"))
    return [slow.get(), quick, ctx.run(do.s("last"))]


def test_what_had_not_settled_then_cannot_be_shared(cluster: Cluster) -> None:
    go = cluster.folder / "fork"
    handle = cluster.start("works_beside", str(go))
    wait_until(lambda: len(handle.history()) >= 3, "the step between")
    go.touch()
    assert handle.get(timeout=20) == ["slow", "quick", "last"]
    with pytest.raises(InvalidOperation, match="had not settled there"):
        handle.fork(2)
    with pytest.raises(InvalidOperation, match="cannot be forked at 9"):
        handle.fork(9)
    fork = handle.fork(3)
    assert fork.get(timeout=20) == ["slow", "quick", "last"]
    assert cluster.effects.names(fork.id) == ["do last"]


@shared_workflow(deadline=timedelta(hours=1), park=True)
def has_a_deadline(ctx: Context) -> list[Any]:
    began = ctx.now()
    ctx.run(do.s("a"))
    message = ctx.receive("go on")
    ctx.run(fail.s("b"))
    return [began, message]


def test_a_fork_has_a_deadline_of_its_own_and_parks_as_its_origin_does(cluster: Cluster) -> None:
    handle = cluster.start("has_a_deadline")
    cluster.wait_history(handle, 2)
    fork = handle.fork(1)
    cluster.wait_history(fork, 2)
    described = fork.describe()
    assert described.created_at > handle.describe().created_at
    assert described.deadline_at == described.created_at + timedelta(hours=1)
    for each in (handle, fork):
        each.send("go on", "now")
        cluster.wait_status(each, "BLOCKED")
        each.terminate()


@shared_workflow
def recurs(ctx: Context, run: int) -> list[Any]:
    done = ctx.run(do.s(f"run {run}"))
    if run == 0:
        ctx.recur(1)
    return [done, ctx.run(do.s("end"))]


def test_a_fork_goes_on_from_the_present_run(cluster: Cluster) -> None:
    handle = cluster.run("recurs", 0)
    fork = handle.fork(1)
    assert fork.get(timeout=20) == ["run 1", "end"]
    assert cluster.effects.names(fork.id) == ["do end"]
