"""Tasks and workflows of the tests: every body tells what it does to the outside world."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import shared_task

from orchestrator import Context, current_step, shared_workflow
from tests.runtime import crashing
from tests.runtime.effects import Effects


def note(name: str, what: str) -> None:
    Effects(os.environ["TEST_EFFECTS"]).note(name, what)


def act(name: str) -> None:
    """Have an effect, and be killed before or after it if that is the plan."""
    step = current_step()
    assert step is not None
    note(name, "begin")
    crashing.reach("body:before-effect", step.instance_id, step.seq)
    note(name, "effect")
    crashing.reach("body:after-effect", step.instance_id, step.seq)
    note(name, "end")


@shared_task
def do(name: str) -> str:
    act(f"do {name}")
    return name


@shared_task
def undo(result: str | None, name: str) -> None:
    act(f"undo {name}")


@shared_task
def fail(name: str) -> None:
    note(f"fail {name}", "begin")
    raise ValueError(f"{name} failed")


@shared_task
def wait_for_file(path: str, name: str) -> str:
    """Have an effect, then run until the file exists."""
    act(f"do {name}")
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"nobody made {path}"
        time.sleep(0.02)
    note(f"do {name}", "released")
    return name


@shared_workflow
def completes(ctx: Context) -> list[str]:
    return [ctx.run(do.s(name), compensate=undo.s(name)) for name in "abc"]


@shared_workflow
def gathers(ctx: Context) -> list[str]:
    return ctx.gather(*[ctx.start(do.s(name), compensate=undo.s(name)) for name in "abc"])


@shared_workflow
def undoes(ctx: Context) -> None:
    for name in "abc":
        ctx.run(do.s(name), compensate=undo.s(name))
    ctx.run(fail.s("d"))


@shared_workflow
def waits(ctx: Context, path: str) -> list[str]:
    """Three steps, of which the second one runs until a file is made."""
    first = ctx.run(do.s("a"), compensate=undo.s("a"))
    second = ctx.run(wait_for_file.s(path, "b"), compensate=undo.s("b"))
    return [first, second, ctx.run(do.s("c"))]


@shared_workflow
def works(ctx: Context, count: int) -> int:
    """Steps in a row, for a load."""
    return sum(len(ctx.run(do.s(f"step {number}"))) for number in range(count))


@shared_task
def take_seconds(seconds: float) -> str:
    act("do long")
    time.sleep(seconds)  # what a long call to somebody else does
    return "done"


@shared_workflow
def takes_seconds(ctx: Context, seconds: float) -> str:
    return str(ctx.run(take_seconds.s(seconds)))
