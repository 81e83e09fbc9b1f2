"""Points of no return, and workflows that are parked: a failing step blocks, and waits for an operator."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import group, shared_task

from orchestrator import Context, OutcomeUnknown, StepFailed, shared_workflow
from orchestrator.errors import InvalidOperation
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do, note, undo
from tests.waiting import wait_until


@shared_task
def needs(path: str) -> str:
    """Fail until somebody makes the file."""
    note("try", "effect")
    if not Path(path).exists():
        raise LookupError("not there")
    return Path(path).read_text()


@shared_task
def pivot(how: str) -> str:
    note(f"pivot {how}", "effect")
    if how == "fails":
        raise ValueError("declined")
    if how == "in doubt" and not Path(os.environ["TEST_CRASHES"], "answers").exists():
        raise OutcomeUnknown("no answer")
    return "paid"


@shared_workflow(deadline=timedelta(seconds=600))
def pays(ctx: Context, how: str, path: str) -> str:
    ctx.run(do.s("reserve"), compensate=undo.s("reserve"))
    ctx.run(pivot.s(how), pivot=True, compensate=undo.s("pivot"))
    ctx.run(do.s("after"), compensate=undo.s("after"))
    return str(ctx.run(needs.s(path)))


def test_a_step_that_fails_after_the_pivot_blocks_until_it_is_resumed(cluster: Cluster) -> None:
    path = cluster.folder / "after the pivot"
    handle = cluster.run("pays", "succeeds", str(path))
    assert handle.instance_status == "BLOCKED"
    assert handle.state == "BLOCKED"
    blocked = handle.describe().blocked or ""
    assert "step 3 (tests.runtime.test_pivots.needs): it failed: builtins.LookupError: not there" in blocked
    handle.resume()
    wait_until(lambda: cluster.effects.names(handle.id).count("try") == 2, "another attempt")
    cluster.wait_status(handle, "BLOCKED")
    path.write_text("tracking")
    handle.resume()
    assert handle.get(timeout=20) == "tracking"
    assert cluster.effects.names(handle.id) == ["do reserve", "pivot succeeds", "do after", "try", "try", "try"]
    assert handle.history()[3].attempts == 3
    assert handle.describe().blocked is None
    with pytest.raises(InvalidOperation, match="is COMPLETED"):
        handle.resume()


def test_a_blocked_step_that_is_failed_undoes_only_what_came_after_the_pivot(cluster: Cluster) -> None:
    handle = cluster.run("pays", "succeeds", str(cluster.folder / "never there"))
    with pytest.raises(InvalidOperation, match="only a step that blocks can be failed"):
        handle.fail_step(2)
    with pytest.raises(InvalidOperation, match="has no step 9"):
        handle.fail_step(9)
    handle.fail_step(3)
    cluster.wait_status(handle)
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["do reserve", "pivot succeeds", "do after", "try", "undo after"]
    with pytest.raises(LookupError, match="not there"):
        handle.get(timeout=1)


def test_a_pivot_that_fails_undoes_like_any_step(cluster: Cluster) -> None:
    handle = cluster.run("pays", "fails", "")
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["do reserve", "pivot fails", "undo reserve"]


def test_a_pivot_in_doubt_blocks(cluster: Cluster) -> None:
    path = cluster.folder / "there"
    path.write_text("tracking")
    handle, other = cluster.run("pays", "in doubt", str(path)), cluster.run("pays", "in doubt", str(path))
    for each in (handle, other):
        assert each.instance_status == "BLOCKED"
        assert "step 1 (tests.runtime.test_pivots.pivot): nobody can say" in (each.describe().blocked or "")
    other.fail_step(1)
    cluster.wait_status(other)
    assert other.instance_status == "COMPENSATED"
    assert cluster.effects.names(other.id) == ["do reserve", "pivot in doubt", "undo pivot", "undo reserve"]

    (cluster.crashes / "answers").touch()
    handle.resume()
    assert handle.get(timeout=20) == "tracking"
    assert cluster.effects.names(handle.id).count("pivot in doubt") == 2
    assert not any(name.startswith("undo") for name in cluster.effects.names(handle.id))


@shared_workflow(deadline=timedelta(seconds=2.5))
def is_slow_after_the_pivot(ctx: Context) -> str:
    ctx.run(do.s("pivot"), pivot=True)
    return str(ctx.receive("go on"))


def test_past_the_pivot_there_is_no_cancelling_and_no_deadline(cluster: Cluster) -> None:
    handle = cluster.start("is_slow_after_the_pivot")
    cluster.wait_history(handle, 2)
    with pytest.raises(InvalidOperation, match="past its pivot"):
        handle.cancel()
    wait_until(lambda: handle.describe().deadline_at is None, "its deadline passing")
    handle.send("go on", "went on")
    assert handle.get(timeout=20) == "went on"


@shared_workflow
def child_that_needs(ctx: Context, path: str) -> str:
    return str(ctx.run(needs.s(path)))


@shared_workflow
def pays_then_starts_a_child(ctx: Context, path: str) -> str:
    ctx.run(do.s("pivot"), pivot=True)
    return str(ctx.run(child_that_needs.s(path)))


def test_a_child_that_fails_after_the_pivot_is_started_again(cluster: Cluster) -> None:
    path = cluster.folder / "for the child"
    handle = cluster.start("pays_then_starts_a_child", str(path))
    cluster.wait_status(handle, "BLOCKED")
    first = handle.history()[1].child_id
    path.write_text("tracking")
    handle.resume()
    assert handle.get(timeout=20) == "tracking"
    second = handle.history()[1].child_id
    assert first is not None
    assert second is not None
    assert first != second
    statuses = [cluster.orchestrator.get(each).instance_status for each in (first, second)]
    assert statuses == ["FAILED", "COMPLETED"]


def test_a_child_with_the_longest_id_is_started_again(cluster: Cluster) -> None:
    path = cluster.folder / "for the child with the long id"
    handle = cluster.start("pays_then_names_a_child", str(path), "c" * 200)
    cluster.wait_status(handle, "BLOCKED")
    path.write_text("tracking")
    handle.resume()
    assert handle.get(timeout=20) == "tracking"
    assert len(handle.history()[1].child_id or "") <= 200


@shared_workflow
def pays_then_names_a_child(ctx: Context, path: str, child_id: str) -> str:
    ctx.run(do.s("pivot"), pivot=True)
    return str(ctx.run(child_that_needs.s(path).set(task_id=child_id)))


# --- parked workflows ---------------------------------------------------------------------------------------------


@shared_workflow(park=True)
def is_parked(ctx: Context, first: str, second: str) -> list[Any]:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    both = ctx.run(group(needs.s(first), needs.s(second)))
    try:
        ctx.run(needs.s("nowhere"), optional=True)
        return [*both, ctx.run(needs.s("nowhere"))]
    except StepFailed as error:
        return [*both, error.message]


def test_a_parked_workflow_blocks_for_each_failing_step(cluster: Cluster) -> None:
    first, second = cluster.folder / "first", cluster.folder / "second"
    handle = cluster.start("is_parked", str(first), str(second))
    wait_until(lambda: (handle.describe().blocked or "").count("resume()") >= 1, "it being blocked")
    wait_until(lambda: [e.state for e in handle.history()[1:3]] == ["blocked"] * 2, "both being blocked")
    first.write_text("1")
    handle.resume()
    wait_until(lambda: handle.history()[1].outcome == "succeeded", "the first one succeeding")
    wait_until(lambda: handle.history()[2].state == "blocked", "the second one failing again")
    cluster.wait_status(handle, "BLOCKED")
    second.write_text("2")
    handle.resume()
    wait_until(lambda: len(handle.history()) == 5, "the last step")
    cluster.wait_status(handle, "BLOCKED")
    handle.fail_step(4)
    assert handle.get(timeout=20) == ["1", "2", "not there"]
    assert "undo a" not in cluster.effects.names(handle.id)


def test_a_parked_workflow_can_be_cancelled(cluster: Cluster) -> None:
    handle = cluster.start("is_parked", "nowhere", "nowhere")
    wait_until(lambda: [e.state for e in handle.history()[1:3]] == ["blocked"] * 2, "both being blocked")
    handle.cancel()
    cluster.wait_status(handle)
    assert handle.instance_status == "CANCELLED"
    assert cluster.effects.names(handle.id) == ["do a", "try", "try", "undo a"]


@shared_task
def fails_late(path: str) -> None:
    note("try", "effect")
    wait_until(lambda: Path(path).exists(), path, 60)
    raise LookupError("late")


@shared_workflow(park=True)
def parks_a_slow_step(ctx: Context, path: str) -> str:
    slow = ctx.start(fails_late.s(path), timeout=2)
    first = ctx.run(do.s("beside"))
    ctx.receive("go on")
    ctx.run(do.s("went on"))
    try:
        slow.get()
    except StepFailed as error:
        return f"{first}: {error.outcome}"
    return "never"


def test_a_step_that_takes_too_long_blocks_while_its_attempt_goes_on(cluster: Cluster) -> None:
    path = cluster.folder / "late"
    handle = cluster.start("parks_a_slow_step", str(path))
    cluster.wait_status(handle, "BLOCKED")
    assert "did not end in time, and an attempt of it goes on" in (handle.describe().blocked or "")
    handle.resume()  # it cannot have another attempt while one is alive: that one is given as much time again
    cluster.wait_status(handle, "BLOCKED")
    path.touch()
    wait_until(lambda: handle.history()[0].state == "blocked", "the attempt failing")
    cluster.wait_status(handle, "BLOCKED")
    assert "builtins.LookupError: late" in (handle.describe().blocked or "")
    # the others go on meanwhile
    handle.send("go on", None)
    cluster.wait_effect(handle, "do went on")
    handle.fail_step(0)
    assert handle.get(timeout=20) == "beside: failed"
    assert cluster.effects.names(handle.id).count("try") == 1


@shared_task
def pay_when_there(path: str, how: str) -> str:
    note(f"pivot {how}", "effect")
    wait_until(lambda: Path(path).exists(), path, 60)
    if how == "fails":
        raise ValueError("declined")
    return "paid"


@shared_workflow
def pays_slowly(ctx: Context, path: str, how: str) -> str:
    ctx.run(do.s("reserve"), compensate=undo.s("reserve"))
    ctx.run(pay_when_there.s(path, how), pivot=True, compensate=undo.s("pivot"))
    return str(ctx.run(do.s("after")))


@pytest.mark.parametrize("how", ["succeeds", "fails"])
def test_a_cancellation_while_the_pivot_is_under_way_waits_for_what_it_comes_to(cluster: Cluster, how: str) -> None:
    path = cluster.folder / f"pays slowly {how}"
    handle = cluster.start("pays_slowly", str(path), how)
    cluster.wait_effect(handle, f"pivot {how}")
    handle.cancel()
    assert handle.instance_status == "RUNNING"
    path.touch()
    cluster.wait_status(handle)
    names = cluster.effects.names(handle.id)
    if how == "succeeds":
        assert (handle.instance_status, names) == ("COMPLETED", ["do reserve", "pivot succeeds", "do after"])
    else:
        assert names == ["do reserve", "pivot fails", "undo reserve"]
        assert handle.instance_status in ("CANCELLED", "COMPENSATED")
