"""Signals: told after the commit, and again by a poller where the process died that had to tell them."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task
from celery.events import EventDispatcher

from orchestrator import Context, Orchestrator, RetryPolicy, current_step, shared_workflow, signals
from orchestrator.store.tables import notice
from tests.runtime.cluster import Cluster, wait_until

SETTINGS = {"publish_grace": 1.0, "slow_replay": 0.05, "signals": "always", "max_pass_attempts": 2}

OF_ALL = {"signal", "sender", "app", "instance_id", "generation", "workflow", "run", "at", "notice_id", "pid"}


def told_file() -> Path:
    return Path(os.environ["TEST_CRASHES"]).parent / "told"


def take_note(name: str, sender: str, told: dict[str, Any]) -> None:
    told = {key: value for key, value in told.items() if key != "signal"}
    line = json.dumps({"signal": name, "sender": sender, "pid": os.getpid(), **told}, default=str)
    with told_file().open("a") as file:
        file.write(f"{line}\n")


def register(orchestrator: Orchestrator) -> None:
    """Connect receivers in the workers, and nowhere else."""
    orchestrator.activity(retry=RetryPolicy(max_attempts=1))(take_never)
    for name in signals.__all__:

        def receive(sender: str, name: str = name, **told: Any) -> None:
            if name == "replay_slow":
                told["history"] = len(orchestrator.get(told["instance_id"]).history())
            take_note(name, sender, told)

        getattr(signals, name).connect(receive, weak=False)
    signals.step_settled.connect(die_of_it, weak=False)
    signals.instance_ended.connect(fail_of_it, weak=False)
    signals.instance_ended.connect(hang_of_it, weak=False)
    signals.step_settled.connect(hang_of_it, weak=False)


def die_of_it(instance_id: str, seq: int, **_told: Any) -> None:
    """End the process that tells, once, after the other receiver was told."""
    mark = told_file().with_name(f"die-{instance_id}-{seq}")
    if mark.exists():
        mark.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def fail_of_it(**_told: Any) -> None:
    raise RuntimeError("a receiver that does not work")


def hang_of_it(instance_id: str, **_told: Any) -> None:
    while told_file().with_name(f"hang-{instance_id}").exists():
        time.sleep(0.05)


@shared_task
def fail_once() -> None:
    time.sleep(0.4)
    step = current_step()
    assert step is not None
    if step.attempt == 1:
        raise LookupError("not yet")


@shared_task
def give(name: str) -> str:
    return name


@shared_task
def take(_result: str | None) -> None:
    pass


@shared_task
def take_badly(_result: str | None) -> None:
    raise ValueError("it is gone")


@shared_task
def refuse() -> None:
    raise LookupError("nobody is there")


@shared_workflow
def undoes(ctx: Context) -> None:
    ctx.run(give.s("a"), compensate=take)
    ctx.run(refuse)


@shared_task
def take_never(_result: str | None) -> None:
    raise ValueError("it is gone")


@shared_workflow
def undoes_badly(ctx: Context, tries: bool) -> None:
    ctx.run(give.s("a"), compensate=take_badly if tries else take_never)
    ctx.run(refuse)


@shared_workflow(park=True)
def parks(ctx: Context) -> None:
    ctx.run(refuse)


@shared_workflow
def waits(ctx: Context) -> str:
    return str(ctx.receive("go"))


@shared_workflow
def sleeps(ctx: Context) -> None:
    ctx.sleep(0.1)


@shared_workflow
def waits_for_nobody(ctx: Context) -> None:
    ctx.run(give.s("a").set(queue="nobody-serves-it"), timeout=0.3)


@shared_workflow
def retries(ctx: Context) -> None:
    ctx.run(fail_once, retry=RetryPolicy(max_attempts=2, initial_interval=timedelta(milliseconds=1)))


@shared_workflow
def has_child(ctx: Context) -> None:
    ctx.run(sleeps.s())


@shared_workflow
def kills_its_process(ctx: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@shared_workflow
def thinks_long(ctx: Context) -> None:
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        pass
    ctx.run(give.s("a"))


def list_told(cluster: Cluster, instance_id: str, *names: str) -> list[dict[str, Any]]:
    file = cluster.folder / "told"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [told for told in lines if told["instance_id"] == instance_id and (not names or told["signal"] in names)]


def wait_told(cluster: Cluster, instance_id: str, name: str, count: int = 1) -> list[dict[str, Any]]:
    return wait_until(
        lambda: found if len(found := list_told(cluster, instance_id, name)) >= count else [],
        f"{instance_id}: {name}\n{cluster.logs()[-3000:]}",
    )


def count_owed(cluster: Cluster) -> int:
    with cluster.orchestrator.store.read("test") as connection:
        return len(connection.execute(notice.select()).all())


def test_the_life_of_a_saga_is_told_step_by_step(cluster: Cluster) -> None:
    handle = cluster.run("undoes")
    wait_told(cluster, handle.id, "instance_ended")
    wait_until(lambda: count_owed(cluster) == 0, "everything having been told")
    told = [each for each in list_told(cluster, handle.id) if each["signal"] != "replay_slow"]  # a slow machine's
    assert {each["workflow"] for each in told} == {f"{__name__}.undoes"}
    assert [each["signal"] for each in told if each["signal"].startswith("instance")] == [
        "instance_started",
        "instance_compensating",
        "instance_ended",
    ]
    steps = [(e["signal"], e["sender"].rpartition(".")[2], e["seq"], e.get("outcome")) for e in told if "seq" in e]
    assert sorted(steps, key=lambda step: step[2]) == [  # of different steps different processes tell
        ("step_scheduled", "give", 0, None),
        ("step_started", "give", 0, None),
        ("step_settled", "give", 0, "succeeded"),
        ("step_scheduled", "refuse", 1, None),
        ("step_started", "refuse", 1, None),
        ("step_settled", "refuse", 1, "failed"),
        ("step_scheduled", "take", 2, None),
        ("step_started", "take", 2, None),
        ("compensation_settled", "take", 2, "succeeded"),
    ]
    for each in told:
        said = getattr(signals, each["signal"]).providing_args
        assert each.keys() - said == OF_ALL and not said - each.keys()
    ended = told[-1]
    assert (ended["status"], ended["error_type"]) == ("COMPENSATED", "builtins.LookupError")
    failed = list_told(cluster, handle.id, "step_settled")[1]
    assert failed["task_id"] == f"{handle.id}:0:1:1" and failed["message"] == "nobody is there"
    assert failed["seconds"] >= 0 and failed["attempt"] == 1


def test_what_could_not_be_undone_is_told(cluster: Cluster) -> None:
    handle = cluster.run("undoes_badly", False)
    assert handle.instance_status == "COMPENSATION_FAILED"
    (failed,) = wait_told(cluster, handle.id, "compensation_failed")
    assert (failed["undoes"], failed["sender"]) == (0, f"{__name__}.take_never")
    assert len(wait_told(cluster, handle.id, "compensation_settled")) == 1


def test_what_an_operator_has_dealt_with_raises_no_alarm(cluster: Cluster) -> None:
    handle = cluster.start("undoes_badly", True)
    wait_told(cluster, handle.id, "step_scheduled", 4)  # of the compensation the second time: its policy has days
    assert list_told(cluster, handle.id, "compensation_settled") == []
    handle.skip_compensation(2, "given back by hand")
    (settled,) = wait_told(cluster, handle.id, "compensation_settled")
    assert (settled["outcome"], settled["message"]) == ("failed", "given back by hand")
    wait_told(cluster, handle.id, "instance_ended")
    assert list_told(cluster, handle.id, "compensation_failed") == []


def test_a_blocked_instance_and_its_resumption_are_told(cluster: Cluster) -> None:
    handle = cluster.run("parks")
    (blocked,) = wait_told(cluster, handle.id, "instance_blocked")
    assert "nobody is there" in blocked["reason"]
    handle.resume()
    wait_told(cluster, handle.id, "instance_resumed")
    wait_told(cluster, handle.id, "instance_blocked", 2)


def test_what_a_process_without_receivers_does_is_told_by_a_worker(cluster: Cluster) -> None:
    handle = cluster.start("waits")
    wait_told(cluster, handle.id, "instance_started")
    cluster.wait_history(handle, 1)
    handle.terminate("enough")
    (ended,) = wait_told(cluster, handle.id, "instance_ended")
    assert (ended["status"], ended["message"]) == ("TERMINATED", "enough")


def test_a_slow_pass_is_told(cluster: Cluster) -> None:
    handle = cluster.run("thinks_long")
    slow = wait_told(cluster, handle.id, "replay_slow", 2)
    assert slow[1]["seconds"] >= 0.1 and slow[1]["records"] == 1
    # after the commit: receivers take their time, and an instance would be locked as long
    assert slow[0]["history"] == 1


def test_an_attempt_that_another_one_follows_is_told(cluster: Cluster) -> None:
    handle = cluster.run("retries")
    (retried,) = wait_told(cluster, handle.id, "step_retried")
    assert (retried["attempt"], retried["error_type"], retried["message"]) == (1, "builtins.LookupError", "not yet")
    assert retried["task_id"] == f"{handle.id}:0:0:1" and retried["seconds"] >= 0.4
    (settled,) = wait_told(cluster, handle.id, "step_settled")
    assert (settled["attempt"], settled["outcome"], settled["task_id"]) == (2, "succeeded", f"{handle.id}:0:0:2")
    started = wait_told(cluster, handle.id, "step_started", 2)
    assert started[1]["waited_seconds"] < 0.4  # since it was sent, and not since the first attempt was
    assert len({each["generation"] for each in list_told(cluster, handle.id)}) == 1


def test_an_end_says_whether_it_had_ended_before(cluster: Cluster) -> None:
    handle = cluster.start("waits")
    cluster.wait_history(handle, 1)
    handle.send("go", "home")
    (ended,) = wait_told(cluster, handle.id, "instance_ended")
    assert (ended["status"], ended["again"]) == ("COMPLETED", False)
    handle.undo()
    _, again = wait_told(cluster, handle.id, "instance_ended", 2)
    assert (again["status"], again["again"]) == ("COMPENSATED", True)


def test_a_child_that_begins_is_told_at_once(cluster: Cluster) -> None:
    handle = cluster.run("has_child")
    (started,) = wait_told(cluster, handle.id, "step_started")
    assert started["kind"] == "child"
    assert f"step started: {handle.id} step 0 {__name__}.sleeps" in cluster.logs()


def test_an_instance_whose_passes_never_come_back_is_told_to_be_blocked(cluster: Cluster) -> None:
    handle = cluster.run("kills_its_process")
    (blocked,) = wait_told(cluster, handle.id, "instance_blocked")
    assert "never came back" in blocked["reason"]
    wait_until(lambda: f"instance blocked: {handle.id}" in cluster.logs(), "the line in the log")


def test_a_receiver_that_hangs_does_not_stop_the_clock(cluster: Cluster) -> None:
    """Neither one that is told of what another process did, nor one that is told of what the poller did."""
    waiting = cluster.start("waits")
    cluster.wait_history(waiting, 1)
    not_served = f"not-served-{waiting.id}"
    marks = [cluster.folder / f"hang-{each}" for each in (waiting.id, not_served)]
    for mark in marks:
        mark.touch()
    try:
        cluster.start("waits_for_nobody", instance_id=not_served)
        wait_told(cluster, not_served, "step_settled")
        assert cluster.run("sleeps").instance_status == "COMPLETED"
        marks.pop().unlink()
        waiting.terminate("enough")
        wait_told(cluster, waiting.id, "instance_ended")
        assert cluster.run("sleeps").instance_status == "COMPLETED"
    finally:
        for mark in marks:
            mark.unlink()
    wait_until(lambda: count_owed(cluster) == 0, "everything having been told")


def test_a_monitor_that_cannot_be_told_breaks_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = cluster.start("waits")
    cluster.wait_history(handle, 1)

    def break_down(*_args: Any, **_fields: Any) -> None:
        raise RuntimeError("no such exchange")

    monkeypatch.setattr(EventDispatcher, "send", break_down)
    handle.terminate("enough")
    assert handle.instance_status == "TERMINATED"


def test_a_process_that_dies_before_all_was_told_tells_it_again(cluster: Cluster) -> None:
    handle = cluster.orchestrator.start(cluster.task("undoes").s(), instance_id="dies")
    (cluster.folder / "die-dies-0").touch()
    cluster.wait_status(handle, "COMPENSATED")
    settled = wait_told(cluster, handle.id, "step_settled", 3)
    again = [each for each in settled if each["seq"] == 0]
    assert len(again) == 2 and len({each["notice_id"] for each in again}) == 1
    assert len({each["pid"] for each in again}) == 2
    wait_until(lambda: count_owed(cluster) == 0, "everything having been told")


def test_nothing_is_written_down_where_nobody_listens(tmp_path: Path, sqlite_url: str, valkey_url: str) -> None:
    quiet = Cluster(tmp_path, sqlite_url, valkey_url)
    try:
        quiet.start_worker().wait_ready()
        written = []
        handle = quiet.start("completes")
        while quiet.wait_status(handle, "PENDING", "RUNNING", "COMPLETED") != "COMPLETED":
            written.append(count_owed(quiet))
        assert sum(written) == 0
    finally:
        quiet.close()
