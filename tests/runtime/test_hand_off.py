"""The process that settles a step runs the next one as well, where that is asked for and nothing needs a message."""

from __future__ import annotations

import contextvars
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from celery import Task, shared_task, signals
from celery.result import AsyncResult

from orchestrator import Context, Orchestrator, RetryPolicy, StepFailed, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.effects import Effect
from tests.runtime.watching import Watcher
from tests.runtime.workflows import act, do, fail, note, take_seconds, undo, wait_for_file

SETTINGS, KEEPS_RESULTS = {"hand_off": True, "hand_off_limit": 1.0, "live_passes": 100}, True


@shared_task(bind=True)
def tell_request(self: Task) -> list[Any]:
    request = self.request
    own = [request.id, request.root_id, request.parent_id, request.retries, request.called_directly]
    return [*own, bool(request.hostname), request.delivery_info["routing_key"], getattr(request, "tenant", None)]


@shared_task(time_limit=60)
def has_a_limit() -> None:
    act("do limited")


@shared_task(rate_limit="1000/s")
def has_a_rate() -> None:
    act("do rated")


class InContextOfItsOwn(Task):
    """What users' base classes do around a body."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return contextvars.copy_context().run(super().__call__, *args, **kwargs)


@shared_task(base=InContextOfItsOwn)
def do_apart(name: str) -> str:
    act(f"do {name}")
    return name


@shared_task
def then() -> None:
    """What a step is linked to."""


@shared_task(bind=True, max_retries=2)
def fails_once(self: Task) -> str:
    act("do again")
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "done"


@shared_task(bind=True)
def run_another(self: Task) -> str:
    """Run another task within its body, as code of users does."""
    note("do outer", "begin")
    do_plainly.apply()
    note("do outer", "effect")
    return "outer"


@shared_task
def do_plainly() -> None: ...


def register(orchestrator: Orchestrator) -> None:
    orchestrator.activity(retry=RetryPolicy(max_attempts=2))(fail)
    signals.task_prerun.connect(lambda task, **_: _note_signal(task, "prerun"), weak=False)
    signals.task_postrun.connect(lambda task, **_: _note_signal(task, "postrun"), weak=False)


_told: list[str] = []


def _note_signal(task: Any, name: str) -> None:
    if task.name.endswith(("fails_once", "run_another", "do_plainly")):
        _told.append(f"{name} {task.name.rpartition('.')[2]}")


@shared_task
def list_signals() -> list[str]:
    return list(_told)


@shared_workflow
def saga(ctx: Context, fails: bool) -> list[str]:
    done = [ctx.run(do.s(name), compensate=undo.s(name)) for name in "abc"]
    if fails:
        ctx.run(fail.s("d"), retry=RetryPolicy(max_attempts=1))
    return done


@shared_workflow
def goes_apart(ctx: Context) -> list[str]:
    first = ctx.run(do_apart.s("a").set(countdown=0.05))  # by message: a burst begins in its context
    return [first, *(ctx.run(do_apart.s(name)) for name in "bc")]


@shared_workflow
def asks(ctx: Context) -> Any:
    ctx.run(do.s("a"))
    return ctx.run(tell_request.s().set(headers={"tenant": "t-1"}))


@shared_workflow
def mixed(ctx: Context, elsewhere: str) -> None:
    ctx.run(do.s("a"))
    ctx.run(has_a_limit.s())
    ctx.run(do.s("b"))
    ctx.run(has_a_rate.s())
    ctx.run(do.s("c"))
    ctx.run(do.s("d").set(link=then.si()))
    ctx.run(do.s("e").set(countdown=0.05))
    ctx.run(do.s("f").set(queue=elsewhere))


@shared_workflow
def fans(ctx: Context, count: int) -> list[str]:
    return ctx.gather(*(do.s(str(number)) for number in range(count)))


@shared_workflow
def maps(ctx: Context, count: int) -> list[str]:
    return ctx.map(do, [str(number) for number in range(count)], concurrency=2)


@shared_workflow
def works(ctx: Context, count: int, seconds: float) -> None:
    for _ in range(count):
        ctx.run(take_seconds.s(seconds))


@shared_workflow
def retries(ctx: Context) -> list[Any]:
    found = [ctx.run(fails_once.s()), ctx.run(run_another.s())]
    try:
        ctx.run(fail.s("twice"))
    except StepFailed as failure:
        found.append(failure.message)
    return [*found, ctx.run(list_signals.s())]


@shared_workflow
def waits(ctx: Context, path: str) -> list[str]:
    return [ctx.run(do.s("a"), compensate=undo.s("a")), ctx.run(wait_for_file.s(path, "b"), compensate=undo.s("b"))]


def by_message(cluster: Cluster, instance_id: str) -> list[int]:
    """Return the ``seq`` of the steps for which a worker has received a message."""
    received = re.findall(rf"\[{re.escape(instance_id)}:0:(-?\d+):\d+\] received", cluster.logs())
    return sorted({int(seq) for seq in received})


def begun(cluster: Cluster, instance_id: str) -> list[Effect]:
    return cluster.effects.list_effects(instance_id, "begin")


def test_a_saga_runs_in_the_process_that_began_it_and_needs_no_message(cluster: Cluster) -> None:
    handle = cluster.run("saga", False)
    assert handle.get(timeout=1) == ["a", "b", "c"]
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do c"]
    assert len({effect.process for effect in begun(cluster, handle.id)}) == 1
    assert by_message(cluster, handle.id) == []
    assert {(entry.attempts, entry.outcome) for entry in handle.history()} == {(1, "succeeded")}


def test_what_failed_is_undone_there_as_well(cluster: Cluster) -> None:
    handle = cluster.run("saga", True)
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]
    assert by_message(cluster, handle.id) == []


def test_a_task_finds_in_its_request_what_a_message_would_have_brought(cluster: Cluster) -> None:
    handle = cluster.run("asks")
    assert by_message(cluster, handle.id) == []
    own = [f"{handle.id}:0:1:1", handle.id, handle.id, 0, False]
    assert handle.get(timeout=1) == [*own, True, cluster.queue, "t-1"]
    step = AsyncResult(f"{handle.id}:0:1:1", app=cluster.app)
    assert step.get(timeout=5) == handle.get(timeout=1)  # the result backend was told, as always


def test_a_body_in_a_context_of_its_own_hands_over_all_the_same(cluster: Cluster) -> None:
    handle = cluster.run("goes_apart")
    assert handle.get(timeout=1) == ["a", "b", "c"]
    assert {entry.attempts for entry in handle.history()} == {1}
    assert by_message(cluster, handle.id) == [0]


def test_what_needs_a_message_gets_one(cluster: Cluster) -> None:
    elsewhere = f"{cluster.queue}-elsewhere"
    other = cluster.start_worker("-Q", elsewhere).wait_ready()
    handle = cluster.run("mixed", elsewhere)
    assert handle.instance_status == "COMPLETED"
    # a time limit, a rate limit, a link, a countdown, another's queue; and what comes after a task with a time limit
    assert by_message(cluster, handle.id) == [1, 2, 3, 4, 5, 6, 7]
    other.stop()


def test_of_a_group_one_is_run_at_once_and_the_others_are_published_first(cluster: Cluster) -> None:
    handle = cluster.run("fans", 4)
    assert handle.get(timeout=1) == ["0", "1", "2", "3"]
    assert by_message(cluster, handle.id) == [1, 2, 3]


def test_a_map_keeps_its_width(cluster: Cluster) -> None:
    handle = cluster.run("maps", 12)
    assert handle.get(timeout=1) == [str(number) for number in range(12)]
    assert len(by_message(cluster, handle.id)) < 12
    alive = most = 0
    for effect in cluster.effects.list_effects(handle.id):
        alive += {"begin": 1, "end": -1}.get(effect.what, 0)
        most = max(most, alive)
    assert most <= 2


def test_retries_and_tasks_within_tasks_are_as_they_always_were(cluster: Cluster) -> None:
    handle = cluster.run("retries")
    done, outer, message, told = handle.get(timeout=1)
    assert (done, outer, message) == ("done", "outer", "twice failed")
    assert [entry.attempts for entry in handle.history()][:3] == [2, 1, 2]
    # the process that told them may have run the last attempts only; whatever it ran was told in pairs
    assert told.count("prerun run_another") == told.count("postrun run_another")
    assert told.count("prerun do_plainly") == told.count("postrun do_plainly")


def test_after_its_limit_a_burst_goes_on_by_message(cluster: Cluster) -> None:
    handle = cluster.run("works", 8, 0.3)
    assert handle.instance_status == "COMPLETED"
    assert 0 < len(by_message(cluster, handle.id)) < 4


def test_a_pool_process_that_is_killed_in_what_it_was_handed_loses_one_attempt(
    cluster: Cluster, tmp_path: Path
) -> None:
    handle = cluster.start("waits", str(tmp_path / "go"))
    cluster.wait_effect(handle, "do b", "end")
    (effect,) = [each for each in begun(cluster, handle.id) if each.name == "do b"]
    os.kill(effect.process, signal.SIGKILL)
    (tmp_path / "go").touch()
    assert cluster.wait_status(handle) == "COMPLETED"
    assert [entry.attempts for entry in handle.history()] == [1, 2]
    (row,) = [row for row in cluster.list_rows(handle) if row.seq == 1]
    assert (row.lost, row.dispatch) == (1, 2)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_that_is_told_to_end_ends_after_the_step_and_loses_nothing(cluster: Cluster, pool: str) -> None:
    cluster.app.control.cancel_consumer(cluster.queue, reply=True, timeout=5)
    own = cluster.start_worker(pool=pool, concurrency=1).wait_ready()
    handle = cluster.start("works", 20, 0.2)
    cluster.wait_effect(handle, "do long", "end")
    began_at = time.monotonic()
    os.kill(own.pid, signal.SIGTERM)
    wait_until(lambda: not own.is_running, f"the worker ending\n{own.log.read_text()[-3000:]}")
    assert time.monotonic() - began_at < 3.0  # all of them take longer
    assert handle.instance_status == "RUNNING"
    cluster.app.control.add_consumer(cluster.queue, reply=True, timeout=5)
    assert cluster.wait_status(handle) == "COMPLETED"
    assert {row.lost for row in cluster.list_rows(handle)} == {0}
    assert len(begun(cluster, handle.id)) == 20


def test_a_worker_with_a_time_limit_hands_nothing_over(cluster: Cluster) -> None:
    cluster.app.control.cancel_consumer(cluster.queue, reply=True, timeout=5)
    own = cluster.start_worker("--time-limit=60", concurrency=1).wait_ready()
    handle = cluster.run("saga", False)
    assert by_message(cluster, handle.id) == [0, 1, 2]
    own.stop()
    cluster.app.control.add_consumer(cluster.queue, reply=True, timeout=5)


def test_monitors_are_told_of_what_was_handed_over_as_of_any_task(cluster: Cluster) -> None:
    cluster.app.control.cancel_consumer(cluster.queue, reply=True, timeout=5)
    own = cluster.start_worker("--task-events", concurrency=1).wait_ready()
    watcher = Watcher(cluster.app)
    first = cluster.run("saga", True)
    wait_until(lambda: first.id in watcher.states, "the first event")
    handle = cluster.run("saga", True)
    for seq, (state, name) in enumerate([*[("SUCCESS", "do")] * 3, ("FAILURE", "fail"), *[("SUCCESS", "undo")] * 3]):
        row = watcher.wait(f"{handle.id}:0:{seq}:1", state)
        assert (row.name.rpartition(".")[2], row.root_id, row.parent_id) == (name, handle.id, handle.id)
        assert row.received is not None and row.started is not None
        assert state == "FAILURE" or row.runtime > 0
    assert by_message(cluster, handle.id) == []
    assert {entry.attempts for entry in handle.history()} == {1}
    assert " ERROR/" not in own.log.read_text().replace("ERROR/ForkPoolWorker-1] Task tests.runtime.workflows.fail", "")
    watcher.stop()
    own.stop()
    cluster.app.control.add_consumer(cluster.queue, reply=True, timeout=5)
