"""Tasks of every kind run as steps unchanged, with the behaviour that Celery gives them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from celery import Task, current_app, shared_task, signals
from pydantic import BaseModel

from orchestrator import Context, Orchestrator, StepFailed, current_step, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note

KEEPS_RESULTS = True


def tell(line: str) -> None:
    """Tell what happened outside of a body, in the order in which it did."""
    with Path(os.environ["TEST_CRASHES"], "told").open("a") as file:
        file.write(f"{line}\n")


def told(cluster: Cluster, instance: str) -> list[str]:
    lines = (cluster.crashes / "told").read_text().splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith(instance)]


class Telling(Task):
    """A base class with every hook that Celery has."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        tell(f"{self.instance(task_id)} before {args} {kwargs}")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        tell(f"{self.instance(task_id)} success {retval!r}")

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        tell(f"{self.instance(task_id)} retry {exc!r}")

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        tell(f"{self.instance(task_id)} failure {exc!r}")

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        tell(f"{self.instance(task_id)} after {status}")

    @staticmethod
    def instance(task_id: str) -> str:
        return task_id.partition(":")[0]


@shared_task(base=Telling, bind=True, max_retries=1, default_retry_delay=0)
def tells(self: Task, how: str, *, times: int = 1) -> str:
    if how == "retry" and self.request.retries == 0:
        raise self.retry(exc=ValueError("again"))
    if how == "fail":
        raise ValueError("no")
    return how * times


class Refusing(Task):
    """A base class that looks at its arguments before it begins."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        raise PermissionError("not today")


@shared_task(base=Refusing)
def never_begins() -> None:
    note("begun", "effect")


class Connected(Task):
    """A base class that gives the body more than the message has."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tell(f"{Telling.instance(self.request.id)} called")
        return super().__call__("connection", *args, **kwargs)


@shared_task(base=Connected, typing=False)
def queries(connection: str, what: str) -> str:
    step = current_step()
    return f"{what} over {connection} as {step.seq if step else None}"


class Counting(Task):
    """A task that is a class, with state of its own."""

    name = "tests.counting"

    def __init__(self) -> None:
        self.begun_with = 40

    def run(self, number: int) -> int:
        return self.begun_with + number


class Point(BaseModel):
    x: int
    y: int = 0


@shared_task(pydantic=True)
def mirrors(point: Point) -> Point:
    assert isinstance(point, Point)
    return Point(x=-point.x, y=-point.y)


@shared_task(bind=True, pydantic=True, max_retries=1, default_retry_delay=0)
def mirrors_later(self: Task, point: Point) -> Point:
    if self.request.retries == 0:
        raise self.retry()
    return mirrors.run(point)  # type: ignore[no-any-return]


@shared_task(rate_limit="600/m", ignore_result=True, trail=False)
def is_limited(number: int) -> int:
    return number


@shared_task
def adds(left: int, right: int) -> int:
    return left + right


@shared_task(bind=True)
def calls_others(self: Task, depth: int) -> list[Any]:
    """Call tasks as the functions they are, itself included."""
    step = current_step()
    assert step is not None
    inner = [] if depth == 0 else [self(depth - 1), self.run(depth - 1), calls_others.run(depth - 1)]
    return [adds(1, 2), adds.run(3, 4), step.seq, *inner]


@shared_task(bind=True)
def tells_request(self: Task, *args: int, **kwargs: int) -> list[Any]:
    request = self.request
    return [list(request.args), request.kwargs, request.root_id, request.parent_id, request.id, request.retries]


def register(orchestrator: Orchestrator) -> None:
    orchestrator.app.register_task(Counting())

    def listen(name: str, signal: Any) -> None:
        def receive(sender: Any = None, task_id: str = "", request: Any = None, **_kwargs: Any) -> None:
            own = task_id or getattr(request, "id", "")
            if sender.name.endswith("adds"):
                tell(f"{Telling.instance(own)} {name}")

        signal.connect(receive, weak=False)

    for name in ("prerun", "success", "postrun"):
        listen(name, getattr(signals, f"task_{name}"))


@shared_workflow
def runs(ctx: Context, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    task = globals().get(name) or current_app.tasks[name]
    try:
        result = ctx.run(task.s(*args, **kwargs))
    except StepFailed as error:
        return f"{error.outcome}: {error.error_type}: {error.message}"
    return f"{type(result).__name__} {result}" if isinstance(result, BaseModel) else result


@pytest.mark.parametrize(
    ("name", "args", "result"),
    [
        ("queries", ["rows"], "rows over connection as 0"),
        ("tests.counting", [2], 42),
        ("mirrors", [{"x": 1, "y": 2}], "Point x=-1 y=-2"),
        ("mirrors_later", [{"x": 3}], "Point x=-3 y=0"),
        ("is_limited", [1], 1),
        ("calls_others", [1], [3, 7, 0, *[[3, 7, 0]] * 3]),
    ],
)
def test_tasks_of_every_kind_run_as_steps(cluster: Cluster, name: str, args: list[Any], result: Any) -> None:
    assert cluster.run("runs", name, args, {}).get(timeout=1) == result


def test_the_hooks_of_a_base_class_are_called_for_a_step(cluster: Cluster) -> None:
    handle = cluster.run("runs", "tells", ["x"], {"times": 2})
    wait_until(lambda: len(told(cluster, handle.id)) == 3, "the hooks after the body")
    assert told(cluster, handle.id) == ["before ['x'] {'times': 2}", "success 'xx'", "after SUCCESS"]


@pytest.mark.parametrize(
    ("how", "hooks"),
    [
        ("fail", ["before", "failure ValueError('no')", "after FAILURE"]),
        ("retry", ["before", "retry ValueError('again')", "before", "success 'retry'", "after SUCCESS"]),
    ],
)
def test_the_hooks_of_failures_and_retries_are_called(cluster: Cluster, how: str, hooks: list[str]) -> None:
    handle = cluster.run("runs", "tells", [how], {})
    wait_until(lambda: len(told(cluster, handle.id)) == len(hooks), "the hooks after the body")
    heard = ["before" if line.startswith("before") else line for line in told(cluster, handle.id)]
    assert sorted(heard) == sorted(hooks)  # the second attempt may begin before the first one's hooks


def test_a_task_that_raises_before_its_body_fails_the_step(cluster: Cluster) -> None:
    handle = cluster.run("runs", "never_begins", [], {})
    assert handle.get(timeout=1) == "failed: builtins.PermissionError: not today"
    assert cluster.effects.names(handle.id) == []


def test_signals_of_tasks_are_sent_for_steps(cluster: Cluster) -> None:
    handle = cluster.run("runs", "adds", [1, 2], {})
    wait_until(lambda: len(told(cluster, handle.id)) == 2, "the signals after the body")
    assert told(cluster, handle.id) == ["prerun", "postrun"]


def test_a_step_sees_the_request_that_celery_users_know(cluster: Cluster) -> None:
    handle = cluster.run("runs", "tells_request", [1, 2], {"three": 3})
    own = f"{handle.id}:0:0:1"
    assert handle.get(timeout=1) == [[1, 2], {"three": 3}, handle.id, handle.id, own, 0]


def test_a_steps_result_is_told_to_the_result_backend(cluster: Cluster) -> None:
    handle = cluster.run("runs", "mirrors", [{"x": 1}], {})
    result = cluster.app.AsyncResult(f"{handle.id}:0:0:1")
    assert result.get(timeout=5) == {"x": -1, "y": 0}
