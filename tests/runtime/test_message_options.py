"""The options of a signature, and of its task, hold for the step's message; what says when is kept in the record."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Task, shared_task

from orchestrator import Context, Orchestrator, RetryPolicy, StepFailed, StepTimedOut, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note

SETTINGS = {"max_payload_bytes": 2000}


@shared_task(bind=True)
def tells_message(self: Task, *_args: Any) -> dict[str, Any]:
    request = self.request
    info = request.delivery_info
    return {
        "queue": info["routing_key"],
        "priority": info.get("priority"),
        "tenant": getattr(request, "tenant", None),
        "limits": list(request.timelimit or (None, None)),
        "expires": request.expires,
        "eta": request.eta,
    }


@shared_task
def tell(result: Any, path: str) -> None:
    Path(path).write_text(json.dumps(result["queue"]))


@shared_task
def breaks() -> None:
    note("called", "effect")
    raise KeyError("broken")


@shared_task
def undo(result: Any) -> None:
    note("undone", "effect")


def register(orchestrator: Orchestrator) -> None:
    queue = orchestrator.app.conf.task_default_queue
    orchestrator.app.conf.task_routes = {f"{__name__}.tells_message": {"queue": f"{queue}-routed"}}
    orchestrator.app.amqp.queues.select_add(f"{queue}-routed")
    orchestrator.app.amqp.queues.select_add(f"{queue}-chosen")
    orchestrator.activity(retry=RetryPolicy(max_attempts=3, initial_interval=timedelta(0)))(breaks)
    orchestrator.activity(timeout=timedelta(seconds=0.3))(takes_its_time)


@shared_task
def takes_its_time() -> None: ...


@shared_workflow
def tells(ctx: Context, options: dict[str, Any]) -> Any:
    return ctx.run(tells_message.s().set(**options))


def message(cluster: Cluster, options: dict[str, Any]) -> dict[str, Any]:
    found = cluster.run("tells", options).get(timeout=1)
    assert isinstance(found, dict)
    return found


def test_a_message_is_routed_as_celery_routes_it(cluster: Cluster) -> None:
    assert message(cluster, {})["queue"] == f"{cluster.queue}-routed"
    assert message(cluster, {"queue": f"{cluster.queue}-chosen"})["queue"] == f"{cluster.queue}-chosen"


def test_priority_headers_and_limits_are_those_of_the_signature(cluster: Cluster) -> None:
    options = {"priority": 3, "headers": {"tenant": "north"}, "time_limit": 60, "soft_time_limit": 50}
    found = message(cluster, options)
    assert (found["priority"], found["tenant"], found["limits"]) == (3, "north", [60, 50])


def test_what_says_when_is_no_matter_of_the_broker(cluster: Cluster) -> None:
    found = message(cluster, {"countdown": 0.2, "expires": 60})
    assert (found["eta"], found["expires"]) == (None, None)


@shared_workflow
def begins_later(ctx: Context, seconds: float, by: str) -> float:
    began = ctx.now()
    options = {"countdown": seconds} if by == "countdown" else {"eta": began + timedelta(seconds=seconds)}
    ctx.run(tells_message.s().set(**options))
    return (ctx.now() - began).total_seconds()


@pytest.mark.parametrize("by", ["countdown", "eta"])
def test_a_step_begins_at_its_countdown_or_eta(cluster: Cluster, by: str) -> None:
    assert 0.5 <= cluster.run("begins_later", 0.5, by).get(timeout=1) < 5


@shared_workflow
def expires(ctx: Context, by: str) -> str:
    when = 0.2 if by == "seconds" else ctx.now() + timedelta(seconds=0.2)
    try:
        ctx.run(tells_message.s().set(expires=when, queue="nobody-serves-this"), compensate=undo.s())
    except StepFailed as error:
        return f"{type(error).__name__} {error.outcome}: {error.message}"
    return "ran"


@pytest.mark.parametrize("by", ["seconds", "moment"])
def test_a_step_that_expires_before_it_begins_is_withdrawn(cluster: Cluster, by: str) -> None:
    handle = cluster.run("expires", by)
    assert handle.get(timeout=1) == "StepWithdrawn withdrawn: it expired before it began"
    assert cluster.effects.names(handle.id) == []


@shared_workflow
def sets(ctx: Context, how: str) -> Any:
    known: dict[str, dict[str, Any]] = {
        "naive eta": {"eta": datetime(2026, 1, 1)},  # noqa: DTZ001
        "naive expires": {"expires": datetime(2026, 1, 1)},  # noqa: DTZ001
        "countdown": {"countdown": "soon"},
        "eta": {"eta": "2026-01-01T00:00:00Z"},
        "option": {"headers": {"tenant": object()}},
        "arguments": {},
    }
    return ctx.run(tells_message.s("x" * 2000 if how == "arguments" else "x").set(**known[how]))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("naive eta", "eta of tests.runtime.test_message_options.tells_message is datetime.datetime(2026, 1, 1, 0, 0)"),
        ("naive expires", "which has no time zone"),
        ("countdown", "countdown of tests.runtime.test_message_options.tells_message is 'soon'; give seconds"),
        ("eta", "is '2026-01-01T00:00:00Z'; give seconds, or for eta and expires a datetime"),
        ("option", "the options of tests.runtime.test_message_options.tells_message cannot be encoded"),
        ("arguments", "the arguments of tests.runtime.test_message_options.tells_message takes 2"),
    ],
)
def test_options_that_cannot_hold_are_refused_and_nothing_is_recorded(cluster: Cluster, how: str, reason: str) -> None:
    handle = cluster.run("sets", how)
    told = handle.describe()
    assert reason in (told.blocked or "" if told.error is None else told.error.message)
    assert handle.history() == []


@shared_workflow
def links(ctx: Context, path: str) -> Any:
    signature = tells_message.s()
    signature.link(tell.s(path))
    return ctx.run(signature)


def test_a_link_of_a_steps_signature_is_called(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("links", str(tmp_path / "told"))
    wait_until((tmp_path / "told").exists, "the callback of the step")


# --- defaults of activities, and policies -------------------------------------------------------------------------


@shared_workflow
def stops(ctx: Context, stop_on: str | None) -> None:
    retry = None if stop_on is None else RetryPolicy(initial_interval=timedelta(0), stop_on=(stop_on,))
    ctx.run(breaks.s(), retry=retry)


@pytest.mark.parametrize(("stop_on", "attempts"), [(None, 3), ("KeyError", 1), ("builtins.LookupError", 1)])
def test_an_activitys_policy_holds_unless_the_call_has_its_own(
    cluster: Cluster, stop_on: str | None, attempts: int
) -> None:
    handle = cluster.run("stops", stop_on)
    assert len(cluster.effects.names(handle.id)) == attempts
    assert (handle.history()[0].attempts, handle.history()[0].outcome) == (attempts, "failed")


@shared_workflow
def times_out(ctx: Context) -> str:
    try:
        ctx.run(takes_its_time.s().set(queue="nobody-serves-this"))
    except StepTimedOut as error:
        return f"{isinstance(error, TimeoutError)} {error.outcome}"
    return "ran"


def test_the_timeout_of_an_activity_holds(cluster: Cluster) -> None:
    assert cluster.run("times_out").get(timeout=1) == "True withdrawn"
