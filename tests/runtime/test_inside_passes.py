"""What a workflow function may not do by itself: a replay would do it again."""

from __future__ import annotations

import pytest
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError

from orchestrator import Context, Orchestrator, shared_workflow
from tests.runtime.cluster import Cluster

orchestrators: list[Orchestrator] = []


def register(orchestrator: Orchestrator) -> None:
    orchestrators.append(orchestrator)


@shared_workflow
def waits(ctx: Context) -> None:
    ctx.receive("never")


@shared_workflow
def meddles(ctx: Context, how: str, victim: str) -> None:
    handle = orchestrators[0].get(victim)
    match how:
        case "send":
            handle.send("x", 1)
        case "publish":
            orchestrators[0].publish("x", 1)
        case "fork":
            handle.fork(0)
        case "fail_step" | "retry_compensation":
            getattr(handle, how)(0)
        case _:
            getattr(handle, how)()


CALLS = ("get", "cancel", "terminate", "undo", "resume", "fail_step", "retry_compensation", "fork", "send", "publish")


@pytest.mark.parametrize("how", CALLS)
def test_a_workflow_function_that_changes_an_instance_is_told_what_to_do_instead(cluster: Cluster, how: str) -> None:
    victim = cluster.start("waits")
    cluster.wait_status(victim, "RUNNING")
    handle = cluster.run("meddles", how, victim.id)
    assert handle.instance_status == "BLOCKED"
    blocked = handle.describe().blocked
    assert blocked is not None
    assert f"a workflow function called {how}(); it runs again on every replay: " in blocked
    assert victim.describe().cancel_reason is None
    assert victim.instance_status == "RUNNING"
    victim.terminate()


def test_whoever_waits_is_told_why(cluster: Cluster) -> None:
    victim = cluster.start("waits")
    cluster.wait_history(victim, 1)
    blocked = cluster.run("meddles", "resume", victim.id)
    with pytest.raises(CeleryTimeoutError, match=r"is BLOCKED \(the workflow function raised .*\) after 0 s"):
        blocked.get(timeout=0)
    victim.cancel("not needed")
    cluster.wait_status(victim, "CANCELLED")
    with pytest.raises(TaskRevokedError, match=f"instance {victim.id} is CANCELLED: .*: not needed"):
        victim.get(timeout=0)
