"""The steps of all workloads, which do nothing, and the workflows that take them."""

from __future__ import annotations

import base64
import functools
import random
from datetime import timedelta
from typing import Any

from celery import Celery

from orchestrator import Context, Orchestrator


class Refused(Exception):
    """What the step raises that is there to fail."""


def register_steps(app: Celery) -> None:
    """Register the plain tasks: with every app the same."""
    for function in (step, first, finish, echo, echo_last, join, undo, undo_last, fail):
        app.task(name=f"benchmarks.{function.__name__}", shared=False)(function)


def step(value: int | None = None) -> int | None:
    return value


def first() -> None:
    pass


def finish() -> None:
    pass


def echo(text: str) -> str:
    return text


def echo_last(text: str) -> str:
    return text


@functools.cache
def make_text(size: int) -> str:
    """Return the same text of ``size`` characters each time, which no database makes much smaller."""
    return base64.b64encode(random.Random(size).randbytes(size)).decode()[:size]  # noqa: S311


def join(results: list[int]) -> int:
    return len(results)


def undo(_result: None) -> None:
    pass


def undo_last(_result: None) -> None:
    pass


def fail() -> None:
    raise Refused("the fifth step fails")


def register_workflows(app: Celery, orchestrator: Orchestrator) -> None:
    """Register the workflows of our side over the same tasks."""

    def task(name: str) -> Any:
        return app.tasks[f"benchmarks.{name}"]

    @orchestrator.workflow(name="benchmarks.sequence")
    def sequence(ctx: Context, steps: int) -> None:
        ctx.run(task("first").si())
        for _ in range(steps - 2):
            ctx.run(task("step").si())
        ctx.run(task("finish").si())

    @orchestrator.workflow(name="benchmarks.echoes")
    def echoes(ctx: Context, steps: int, size: int) -> None:
        ctx.run(task("first").si())
        text = make_text(size)
        for _ in range(steps - 2):
            text = ctx.run(task("echo").s(text))
        ctx.run(task("echo_last").s(text))

    @orchestrator.workflow(name="benchmarks.fan_out")
    def fan_out(ctx: Context, width: int) -> int:
        step = task("step")
        return int(ctx.run(task("join").si(ctx.gather(*[step.si(value) for value in range(width)]))))

    @orchestrator.workflow(name="benchmarks.map")
    def map_items(ctx: Context, items: int, concurrency: int | None) -> int:
        return int(ctx.run(task("join").si(ctx.map(task("step"), range(items), concurrency=concurrency))))

    @orchestrator.workflow(name="benchmarks.undone")
    def undone(ctx: Context) -> None:
        ctx.run(task("step").si(), compensate=task("undo_last").s())
        for _ in range(3):
            ctx.run(task("step").si(), compensate=task("undo").s())
        ctx.run(task("fail").si())

    @orchestrator.workflow(name="benchmarks.local")
    def local(ctx: Context, steps: int) -> None:
        for value in range(steps):
            ctx.local(abs, value)

    @orchestrator.workflow(name="benchmarks.sleeper")
    def sleeper(ctx: Context) -> None:
        ctx.sleep(timedelta(days=365))
