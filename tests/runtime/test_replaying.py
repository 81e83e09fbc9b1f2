"""What a workflow function sees and leaves behind is the same however often it is run again."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import shared_task

from orchestrator import Context, CurrentStep, StepFailed, current_step, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note


@shared_task
def echo(value: Any) -> Any:
    return value


@shared_task
def fail(message: str) -> None:
    raise ValueError(message)


def read_outside(path: str) -> str:
    with Path(path).open("a") as file:
        file.write("read\n")
    return Path(path).read_text()


@shared_workflow
def draws(ctx: Context) -> list[Any]:
    """Give what was drawn before the steps to the first and the last of them."""
    began = ctx.now()
    drawn = [ctx.random(), str(ctx.uuid4()), str(ctx.uuid4("order")), began.isoformat()]
    first = ctx.run(echo.s(drawn))
    more = [ctx.random(), str(ctx.uuid4()), str(ctx.uuid4("order"))]
    last = ctx.run(echo.s([drawn, more]))
    return [drawn, first, more, last, ctx.now() > began]


def test_random_numbers_uuids_and_the_time_are_the_same_in_every_pass(cluster: Cluster) -> None:
    drawn, first, more, last, has_gone_on = cluster.run("draws").get(timeout=1)
    assert drawn == first == last[0]
    assert more == last[1]
    assert (drawn[0] != more[0], drawn[1] != more[1], drawn[2] == more[2], has_gone_on) == (True,) * 4
    assert cluster.run("draws").get(timeout=1)[0][:3] != drawn[:3]


@shared_workflow
def reads_locally(ctx: Context, path: str) -> list[Any]:
    read = ctx.local(read_outside, path)
    ctx.run(echo.s(1))
    try:
        ctx.local(int, "one")
    except StepFailed as error:
        failure = f"{error.error_type} {isinstance(error, ValueError)}"
    ctx.run(echo.s(2))
    return [read, ctx.local(read_outside, path), failure]


def test_a_local_function_runs_once_and_its_result_is_recorded(cluster: Cluster, tmp_path: Path) -> None:
    handle = cluster.run("reads_locally", str(tmp_path / "outside"))
    assert handle.get(timeout=1) == ["read\n", "read\nread\n", "builtins.ValueError True"]
    assert [entry.kind for entry in handle.history()] == ["local", "step", "local", "step", "local"]


@shared_workflow
def logs(ctx: Context, tag: str) -> None:
    replaying = [ctx.is_replaying]
    ctx.logger.info("%s begins", tag)
    for number in range(3):
        try:
            ctx.run(echo.s(number))
        finally:
            ctx.logger.warning("%s has step %d", tag, number)
        replaying.append(ctx.is_replaying)
    ctx.logger.info("%s ends, %s", tag, replaying)


def test_each_line_is_logged_once(cluster: Cluster) -> None:
    handle = cluster.start("logs", "tag-1")
    handle.get(timeout=10)
    lines = wait_until(
        lambda: [line for line in cluster.logs().splitlines() if "tag-1" in line and "ends" in cluster.logs()], "log"
    )
    said = [line[line.index("tag-1") :] for line in lines if "ForkPoolWorker" in line and "received" not in line]
    assert said == [
        "tag-1 begins",
        *(f"tag-1 has step {number}" for number in range(3)),
        "tag-1 ends, [True, True, True, False]",
    ]


@shared_workflow
def sleeps(ctx: Context) -> float:
    began = ctx.now()
    ctx.sleep(timedelta(milliseconds=300))
    timer = ctx.timer(0.2)
    ctx.run(echo.s(1))
    timer.get()
    return (ctx.now() - began).total_seconds()


def test_sleeping_takes_as_long_as_it_says(cluster: Cluster) -> None:
    slept = cluster.run("sleeps").get(timeout=1)
    assert 0.5 <= slept < 5


@shared_workflow
def is_patched(ctx: Context) -> list[bool]:
    first = ctx.patched("new-courier")
    ctx.run(echo.s(1))
    return [first, ctx.patched("new-courier"), ctx.patched("later")]


def test_new_instances_take_the_patched_path(cluster: Cluster) -> None:
    assert cluster.run("is_patched").get(timeout=1) == [True, True, True]


@shared_workflow
def shows_itself(ctx: Context, customer: str) -> None:
    ctx.set_attributes(customer=customer, amount=12, is_new=True, gone="x")
    ctx.set_progress("reserving")
    ctx.run(echo.s(1))
    ctx.set_attributes(amount=13, gone=None)
    ctx.set_progress("shipped")


def test_attributes_find_instances_and_progress_is_shown(cluster: Cluster) -> None:
    handles = [cluster.run("shows_itself", customer) for customer in ("ann", "bob", "ann")]
    found = cluster.orchestrator.list(attributes={"customer": "ann", "amount": 13, "is_new": True})
    assert [each.instance_id for each in found] == [handles[2].id, handles[0].id]
    assert handles[1].describe().attributes == {"customer": "bob", "amount": 13, "is_new": True}
    assert handles[1].describe().progress == "shipped"
    assert len(cluster.orchestrator.list(attributes={"amount": 12})) == 0
    page = cluster.orchestrator.list(workflow=cluster.task("shows_itself"), limit=2)
    rest = cluster.orchestrator.list(workflow=cluster.task("shows_itself"), limit=2, cursor=page.cursor)
    assert [each.instance_id for each in (*page, *rest)] == [handle.id for handle in reversed(handles)]


@shared_task(bind=True, max_retries=2, default_retry_delay=0)
def tells_step(self: Any) -> list[Any]:
    """Tell what the step is called in each of its attempts."""
    step = current_step()
    assert isinstance(step, CurrentStep)
    note(f"{step.attempt} {step.idempotency_key}", "effect")
    if step.attempt < 3:
        raise self.retry()
    return [step.instance_id, step.run, step.seq, step.attempt, step.cancel_requested, step.idempotency_key]


@shared_workflow
def asks_for_steps(ctx: Context) -> list[Any]:
    return [ctx.run(tells_step.s()), ctx.run(tells_step.s())]


def test_the_idempotency_key_is_the_same_in_every_attempt_of_a_step(cluster: Cluster) -> None:
    handle = cluster.run("asks_for_steps")
    first, second = handle.get(timeout=1)
    assert first[:5] == [handle.id, 0, 0, 3, False]
    assert second[:5] == [handle.id, 0, 1, 3, False]
    assert first[5] != second[5]
    assert cluster.effects.names(handle.id) == [f"{n} {key}" for key in (first[5], second[5]) for n in (1, 2, 3)]


def test_there_is_no_current_step_outside_of_one(cluster: Cluster) -> None:
    assert current_step() is None
