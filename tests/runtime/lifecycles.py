"""Workflows whose lives are interrupted by what others do to them, and by the death of who does it."""

from __future__ import annotations

from datetime import timedelta

from celery import shared_task

from orchestrator import Context, current_step, shared_workflow
from tests.runtime.workflows import act, do, undo


@shared_task
def succeed_at_second(name: str) -> str:
    step = current_step()
    assert step is not None
    act(f"do {name}")
    if step.attempt == 1:
        raise ConnectionError("not yet")
    return name


@shared_workflow
def ships(ctx: Context) -> list[str]:
    return [ctx.run(do.s(name), compensate=undo.s(name)) for name in "ab"]


@shared_workflow
def sleeps(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.sleep(3600)


@shared_workflow(deadline=timedelta(seconds=1))
def is_late(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.sleep(3600)


@shared_workflow
def naps(ctx: Context) -> list[str]:
    first = ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.sleep(0.1)
    return [first, ctx.run(do.s("b"), compensate=undo.s("b"))]


@shared_workflow(park=True)
def is_parked(ctx: Context) -> list[str]:
    first = ctx.run(do.s("a"), compensate=undo.s("a"))
    return [first, ctx.run(succeed_at_second.s("b"))]


@shared_workflow
def recurs(ctx: Context, run: int) -> int:
    ctx.run(do.s(f"run {run}"), compensate=undo.s(f"run {run}"))
    ctx.commit()
    if run < 2:
        ctx.recur(run + 1)
    return run


# --- messages -----------------------------------------------------------------------------------------------------


@shared_workflow
def receives(ctx: Context, channel: str, mode: str | None) -> list[str]:
    """Take what comes until ``end`` does."""
    if mode is not None:
        ctx.subscribe(channel, mode=mode)  # type: ignore[arg-type]
    received: list[str] = []
    while True:
        message = ctx.receive(channel)
        if message == "end":
            return received
        received.append(message)
        ctx.run(do.s(f"got {message}"))


@shared_workflow
def tells(ctx: Context, receiver: str, how: str) -> str:
    ctx.run(do.s("a"))
    if how == "send":
        ctx.send(receiver, receiver, "m")
    else:
        ctx.publish(receiver, "m")
    return str(ctx.run(do.s("b")))


# --- children -----------------------------------------------------------------------------------------------------


@shared_workflow
def is_child(ctx: Context, is_slow: bool) -> str:
    ctx.run(do.s("c"), compensate=undo.s("c"))
    if is_slow:
        ctx.sleep(3600)
    return "c"


@shared_workflow
def has_child(ctx: Context, child_id: str, is_slow: bool) -> None:
    """Start a child that is given its id, and fail when it has ended."""
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.run(is_child.s(is_slow).set(task_id=child_id))
    raise LookupError("after the child")


# --- all of it ----------------------------------------------------------------------------------------------------


@shared_workflow
def waits_for_everything(ctx: Context, own: str, run: int) -> list[object]:
    """Two runs; a timer, messages of every kind, a pivot, a child, a step that blocks."""
    if run == 0:
        ctx.subscribe(f"{own}-news")
        ctx.subscribe(f"{own}-work", mode="competing")
        ctx.run(do.s("first run"), compensate=undo.s("first run"))
        ctx.commit()
        ctx.recur(own, 1)
    ctx.sleep(0.05)
    news, work = ctx.receive(f"{own}-news"), ctx.receive(f"{own}-work", timeout=60)
    done, _ = ctx.wait(ctx.message("paid"), ctx.message("cancelled"), timeout=timedelta(days=3))
    paid = done[0].get()
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.run(do.s("pivot"), pivot=True)
    child = ctx.start(told_by_parent.s().set(task_id=f"{own}-child"))
    ctx.send(child.instance_id, "in", "from the parent")
    told = child.get()
    last = ctx.run(succeed_at_second.s("b"), compensate=undo.s("b"))
    return [news, work, paid, told, last]


@shared_workflow
def told_by_parent(ctx: Context) -> str:
    message = ctx.receive("in")
    ctx.run(do.s("c"), compensate=undo.s("c"))
    return str(message)


@shared_workflow
def weathers(ctx: Context, number: int, run: int = 0) -> str:
    """Something of everything, in runs, until it is told to end."""
    if run == 0:
        ctx.subscribe("all", mode="competing" if number % 2 else "broadcast")
    for _ in range(3):
        message, news = ctx.message("in"), ctx.message("all")
        done, _pending = ctx.wait(message, news, timeout=5)
        message.cancel()
        news.cancel()
        if message in done:
            what = message.get()
            if what == "end":
                return "told to end"
            ctx.run(do.s(f"kept {what}"))
    ctx.run(do.s(f"a {run}"), compensate=undo.s(f"a {run}"))
    handles = [ctx.start(do.s(f"{name} {run}"), compensate=undo.s(f"{name} {run}")) for name in "bc"]
    ctx.run(weathering_child.s(run))
    ctx.gather(*handles)
    if number % 5 == 0 and run == 1:
        raise LookupError("wrecked")
    if number % 7 == 0 and run == 1:
        return "arrived"
    if run < 3:
        ctx.commit()
        ctx.recur(number, run + 1)
    return "arrived"


@shared_workflow
def weathering_child(ctx: Context, run: int) -> None:
    ctx.run(do.s(f"c {run}"), compensate=undo.s(f"c {run}"))
    ctx.sleep(0.2)
    ctx.run(do.s(f"d {run}"), compensate=undo.s(f"d {run}"))
