"""Waiting for time: timers are rows, so they fall due whoever is alive."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orchestrator import Context, ReceiveTimedOut, WorkflowHandle, shared_workflow
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do
from tests.waiting import wait_until


def list_due(cluster: Cluster, handle: WorkflowHandle) -> list[int]:
    """Return the records at which the clock still has something to do."""
    return [row.seq for row in cluster.list_rows(handle) if row.due_at is not None]


@shared_workflow
def sleeps(ctx: Context, seconds: float) -> float:
    before = ctx.now()
    ctx.sleep(timedelta(seconds=seconds))
    ctx.run(do.s("after"))
    return (ctx.now() - before).total_seconds()


def test_a_sleep_takes_as_long_as_it_says(cluster: Cluster) -> None:
    began = time.monotonic()
    slept = cluster.run("sleeps", 0.7).get(timeout=1)
    assert 0.7 <= slept <= time.monotonic() - began


@shared_workflow
def sleeps_until(ctx: Context, instant: datetime) -> list[str]:
    ctx.sleep_until(instant)
    first = ctx.run(do.s("a"))
    ctx.sleep_until(instant)
    return [first, str(ctx.run(do.s("b")))]


def test_an_instant_that_has_passed_is_no_wait(cluster: Cluster) -> None:
    instant = datetime.now(UTC) + timedelta(seconds=0.5)
    handle = cluster.run("sleeps_until", instant)
    assert handle.get(timeout=1) == ["a", "b"]
    first, _, second, _ = handle.history()
    assert (first.kind, second.kind) == ("timer", "timer")
    assert first.settled_at is not None
    assert first.settled_at >= instant
    assert second.settled_at == second.scheduled_at


@shared_workflow
def races(ctx: Context, seconds: list[float]) -> list[int]:
    numbers: dict[Any, int] = {ctx.timer(each): number for number, each in enumerate(seconds)}
    order: list[int] = []
    while len(order) < len(numbers):
        done, _ = ctx.wait(*(timer for timer, number in numbers.items() if number not in order))
        order += [numbers[timer] for timer in done]
    return order


def test_timers_fire_in_the_order_in_which_they_are_due(cluster: Cluster) -> None:
    assert cluster.run("races", [0.6, 0.1, 0.35]).get(timeout=1) == [1, 2, 0]


@shared_workflow
def waits_at_most(ctx: Context, seconds: float) -> list[str]:
    step = ctx.start(do.s("step"))
    done, pending = ctx.wait(step, ctx.message("answer"), count=2, timeout=seconds)
    names = [type(each).__name__ for each in done]
    return [*names, *(f"not {type(each).__name__}" for each in pending)]


def test_a_wait_ends_with_what_has_come_until_then(cluster: Cluster) -> None:
    handle = cluster.run("waits_at_most", 0.8)
    assert handle.get(timeout=1) == ["StepHandle", "not MessageHandle"]
    assert list_due(cluster, handle) == []


@shared_workflow
def waits_for_payment(ctx: Context, days: float) -> str:
    ctx.run(do.s("reserve"))
    paid, cancelled = ctx.message("paid"), ctx.message("cancelled")
    done, _ = ctx.wait(paid, cancelled, timeout=timedelta(days=days))
    if not done:
        return "nothing came"
    return f"paid {paid.get()}" if paid in done else f"cancelled {cancelled.get()}"


def test_whichever_message_comes_ends_a_wait_of_three_days(cluster: Cluster) -> None:
    paid, cancelled = cluster.start("waits_for_payment", 3), cluster.start("waits_for_payment", 3)
    for handle in (paid, cancelled):
        cluster.wait_history(handle, 4)
        timer = cluster.list_rows(handle)[3]
        assert timer.due_at is not None
        assert timedelta(days=2.9) < timer.due_at - datetime.now(UTC) <= timedelta(days=3)
    paid.send("paid", 5)
    cancelled.send("cancelled", "too dear")
    assert paid.get(timeout=20) == "paid 5"
    assert cancelled.get(timeout=20) == "cancelled too dear"
    for handle in (paid, cancelled):
        assert list_due(cluster, handle) == []


def test_a_wait_to_which_nothing_came_goes_on_in_time(cluster: Cluster) -> None:
    assert cluster.run("waits_for_payment", 0.3 / 86400).get(timeout=1) == "nothing came"


@shared_workflow
def starts_idle_timers(ctx: Context) -> str:
    ctx.timer(3600)
    cancelled = ctx.timer(3600)
    cancelled.cancel()
    try:
        ctx.receive("nothing", timeout=0.1)
    except ReceiveTimedOut:
        return str(ctx.run(do.s("a")))
    return "received"


def test_timers_that_nobody_waits_for_end_with_the_instance(cluster: Cluster) -> None:
    handle = cluster.run("starts_idle_timers")
    assert handle.get(timeout=1) == "a"
    assert list_due(cluster, handle) == []
    assert [entry.outcome for entry in handle.history()][:2] == ["withdrawn", "withdrawn"]


def test_timers_fall_due_while_every_process_is_down(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    cluster = Cluster(tmp_path, sqlite_url, broker_url, tasks=__name__)
    try:
        cluster.start_worker()
        racing = cluster.start("races", [2.4, 2.0, 2.2])
        sleeping = [cluster.start("sleeps", 2.0) for _ in range(3)]
        cluster.wait_history(racing, 3)
        for handle in sleeping:
            cluster.wait_history(handle, 1)
        timers = [*cluster.list_rows(racing), *(cluster.list_rows(handle)[0] for handle in sleeping)]
        cluster.workers[-1].kill()
        open_before = [row.seq for row in cluster.list_rows(racing) if row.outcome is None]
        last = max(row.timeout_at for row in timers if row.timeout_at is not None)
        wait_until(lambda: datetime.now(UTC) > last, "all timers being due")
        cluster.start_worker()
        assert racing.get(timeout=30) == [1, 2, 0]
        assert open_before, "the timers had fired before the worker was killed: the test shows nothing"
        for handle in sleeping:
            assert handle.get(timeout=30) >= 2.0
            assert cluster.effects.names(handle.id) == ["do after"]
    finally:
        cluster.close()
