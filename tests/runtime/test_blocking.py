"""Workflow code that is broken, or does not fit what is recorded, undoes nothing: it waits for a deploy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task, signature

from orchestrator import Context, StepFailed, WorkflowFailed, WorkflowHandle, shared_workflow
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do, undo


class CardDeclined(Exception):
    """What a payment provider's client raises."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        super().__init__(f"{code}: {reason}")


@shared_task
def charge(reason: str) -> None:
    raise CardDeclined(51, reason)


def is_deployed(what: str) -> bool:
    return Path(os.environ["TEST_CRASHES"], what).exists()


def blocked(handle: WorkflowHandle) -> str:
    assert handle.instance_status == "BLOCKED"
    return handle.describe().blocked or ""


# --- failures of steps are failures -------------------------------------------------------------------------------


@shared_workflow
def pays(ctx: Context, catches: bool) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    try:
        ctx.run(charge.s("no funds"))
    except CardDeclined as error:
        if not catches:
            raise
        assert isinstance(error, StepFailed)
        return f"step {error.seq} {error.name.rpartition('.')[2]} {error.outcome}: {error.error_type}: {error.message}"
    return "paid"


def test_a_failed_step_is_also_the_activitys_own_exception(cluster: Cluster) -> None:
    told = cluster.run("pays", True).get(timeout=1)
    assert told == f"step 1 charge failed: {CardDeclined.__module__}.CardDeclined: 51: no funds"


def test_a_failed_workflow_raises_the_activitys_own_exception_in_the_client(cluster: Cluster) -> None:
    handle = cluster.run("pays", False)
    assert cluster.effects.names(handle.id) == ["do a", "undo a"]
    with pytest.raises(CardDeclined, match="51: no funds") as declined:
        handle.get(timeout=1)
    failure = declined.value
    assert isinstance(failure, WorkflowFailed)
    assert (failure.instance_id, failure.status) == (handle.id, "COMPENSATED")
    error = handle.history()[1].error
    assert error is not None
    assert error.traceback is not None
    assert "raise CardDeclined(51, reason)" in error.traceback
    assert (handle.state, handle.failed()) == ("FAILURE", True)


@shared_workflow
def raises(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    raise LookupError("out of stock")


def test_an_exception_of_the_workflow_itself_undoes_it(cluster: Cluster) -> None:
    handle = cluster.run("raises")
    assert cluster.effects.names(handle.id) == ["do a", "undo a"]
    with pytest.raises(LookupError, match="out of stock"):
        handle.get(timeout=1)


# --- errors of the program block ----------------------------------------------------------------------------------


def return_ctx_result(ctx: Context) -> Any:
    return ctx.run(do.s("b"))


@shared_workflow
def is_broken(ctx: Context, how: str) -> Any:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    match how:
        case "name":
            return undefined  # type: ignore[name-defined]  # noqa: F821
        case "attribute":
            return ctx.rum(do.s("b"))  # type: ignore[attr-defined]
        case "type":
            return ctx.run(do.s("b"), compensates=undo)  # type: ignore[call-arg]
        case "arguments":
            return ctx.run(do.s("b", "c"))
        case "unknown task":
            return ctx.run(signature("shop.reserve"))
        case "no signature":
            return ctx.run("reserve")
        case "compensation":
            return ctx.run(do.s("b"), compensate="release")
        case "workflow":
            return ctx.run(do.s("b"), compensate=raises.si())
        case "sends":
            return do.delay("b")
        case "starts":
            return raises.delay()
        case "inside":
            return ctx.local(return_ctx_result, ctx)
        case "argument":
            return ctx.run(do.s(object()))
        case "result":
            return object()
    return None


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("name", "builtins.NameError: name 'undefined' is not defined"),
        ("attribute", "builtins.AttributeError: 'Context' object has no attribute 'rum'"),
        ("type", "unexpected keyword argument 'compensates'"),
        ("arguments", "do() takes 1 positional argument but 2 were given"),
        ("unknown task", "no task named 'shop.reserve' is registered here or on any live worker"),
        ("no signature", "a step is a Celery signature (or a task without arguments), not 'reserve'"),
        ("compensation", "a step is a Celery signature (or a task without arguments), not 'release'"),
        ("workflow", "tests.runtime.test_blocking.raises is a workflow; a compensation is a task"),
        ("sends", "a workflow function tried to send 'tests.runtime.workflows.do'"),
        ("starts", "a workflow function tried to send 'tests.runtime.test_blocking.raises'"),
        ("inside", "ctx cannot be used inside a function that ctx.local runs"),
        ("argument", "the arguments of tests.runtime.workflows.do cannot be encoded: builtins.object"),
        ("result", "the result of the workflow cannot be encoded: builtins.object"),
    ],
)
def test_an_error_of_the_program_blocks_and_undoes_nothing(cluster: Cluster, how: str, reason: str) -> None:
    handle = cluster.run("is_broken", how)
    assert reason in blocked(handle)
    assert [(entry.name.rpartition(".")[2], entry.outcome) for entry in handle.history()] == [("do", "succeeded")]
    assert cluster.effects.names(handle.id) == ["do a"]
    assert handle.state == "BLOCKED"


# --- a deploy mends it --------------------------------------------------------------------------------------------


@shared_workflow
def changes(ctx: Context) -> list[str]:
    first = ctx.run(do.s("a"), compensate=undo.s("a"))
    if is_deployed("other-code"):
        ctx.sleep(1)
    second = ctx.run(do.s("b"), compensate=undo.s("b"))
    ctx.sleep(0.8)
    return [first, second]


@shared_workflow
def has_typo(ctx: Context) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    if not is_deployed("mended"):
        raise NameError("typo")
    return str(ctx.run(do.s("b")))


def test_a_deploy_of_code_that_matches_lets_blocked_instances_go_on(cluster: Cluster) -> None:
    typo = cluster.run("has_typo")
    changed = cluster.start("changes")
    cluster.wait_history(changed, 3)
    (cluster.crashes / "other-code").touch()
    cluster.wait_status(changed, "BLOCKED")
    assert "step 1: history has 'step tests.runtime.workflows.do', the workflow asked for 'timer" in blocked(changed)
    assert cluster.effects.names(changed.id) == ["do a", "do b"]

    (cluster.crashes / "other-code").unlink()
    (cluster.crashes / "mended").touch()
    cluster.workers[-1].stop()
    cluster.start_worker()
    assert changed.get(timeout=20) == ["a", "b"]
    assert typo.get(timeout=20) == "b"
    assert cluster.effects.names(changed.id) == ["do a", "do b"]
    assert changed.describe().blocked is None
