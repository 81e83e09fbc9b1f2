"""What Flower and its like are told: events of the instance itself, beside those of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task

from orchestrator import Context, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.watching import Watcher

MASK = {
    f"{__name__}.pay": ["card", "return"],
    f"{__name__}.refund": ["charge"],
    f"{__name__}.pays": ["order.card", "return"],
}
SETTINGS = {"mask": MASK}


@shared_task
def pay(card: str, cents: int) -> str:
    return f"charge of {card}"


@shared_task
def refund(charge: str | None) -> None:
    pass


@shared_task
def refuse() -> None:
    raise LookupError("nobody is there")


@shared_workflow
def pays(ctx: Context, order: dict[str, Any]) -> str:
    return str(ctx.run(pay.s(order["card"], order["cents"])))


@shared_workflow
def undoes(ctx: Context) -> None:
    ctx.run(pay.s("4000-1", 100), compensate=refund)
    ctx.run(refuse)


@shared_workflow(park=True)
def parks(ctx: Context) -> None:
    ctx.run(refuse)


@shared_workflow
def waits(ctx: Context) -> str:
    ctx.run(pay.s("4000-2", 100), compensate=refund)
    return str(ctx.receive("go"))


@shared_workflow
def has_child(ctx: Context) -> str:
    return str(ctx.run(pays.s({"card": "4000-3", "cents": 1})))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[tuple[Cluster, Watcher]]:
    folder = tmp_path_factory.mktemp("watched")
    celery = {"event_exchange": f"events-{folder.name}", "event_queue_prefix": folder.name}
    store = f"sqlite:///{folder}/store.db"
    cluster = Cluster(folder, store, valkey_url, tasks=__name__, settings=SETTINGS, celery=celery)
    watcher = Watcher(cluster.app)
    try:
        cluster.start_worker("--task-events").wait_ready()
        # until the poller has seen that events are on, none are sent for instances
        handle = cluster.run("pays", {"card": "0", "cents": 0})
        wait_until(lambda: handle.id in watcher.states, "the first event")
        yield cluster, watcher
    finally:
        watcher.stop()
        cluster.close()


def test_an_instance_is_a_row_with_its_name_arguments_result_and_run_time(watched: tuple[Cluster, Watcher]) -> None:
    cluster, watcher = watched
    handle = cluster.run("pays", {"card": "4000-0", "cents": 1450})
    row = watcher.wait(handle.id, "SUCCESS")
    assert row.name == f"{__name__}.pays"
    assert row.args == "({'card': '***', 'cents': 1450},)"
    assert row.result == "'***'"
    assert row.runtime > 0
    assert row.worker.hostname.endswith("@test")
    assert watcher.states[handle.id][-2:] == ["STARTED", "SUCCESS"]


def test_its_steps_and_compensations_are_its_children(watched: tuple[Cluster, Watcher]) -> None:
    cluster, watcher = watched
    handle = cluster.run("undoes")
    row = watcher.wait(handle.id, "FAILURE")
    assert row.exception.startswith("COMPENSATED: builtins.LookupError('step 1 ")
    assert row.exception.endswith("nobody is there')")
    assert watcher.states[handle.id][-3:] == ["STARTED", "COMPENSATING", "FAILURE"]
    watcher.wait(f"{handle.id}:0:2:1", "SUCCESS")
    steps = [each for each in watcher.state.tasks.values() if each.uuid.startswith(f"{handle.id}:")]
    assert {(each.name.rpartition(".")[2], each.parent_id, each.root_id) for each in steps} == {
        ("pay", handle.id, handle.id),
        ("refuse", handle.id, handle.id),
        ("refund", handle.id, handle.id),
    }
    assert {each.id for each in row.children} == {each.uuid for each in steps}


def test_a_child_instance_is_a_child(watched: tuple[Cluster, Watcher]) -> None:
    cluster, watcher = watched
    handle = cluster.run("has_child")
    (entry,) = handle.history()
    child = watcher.wait(entry.child_id or "", "SUCCESS")
    assert (child.name, child.parent_id, child.root_id) == (f"{__name__}.pays", handle.id, handle.id)


def test_a_blocked_instance_shows_why_and_goes_on_from_there(watched: tuple[Cluster, Watcher]) -> None:
    cluster, watcher = watched
    handle = cluster.run("parks")
    row = watcher.wait(handle.id, "BLOCKED")
    assert "nobody is there" in row.exception
    seen = len(watcher.states[handle.id])
    handle.resume()
    watcher.wait(handle.id, "BLOCKED")
    wait_until(lambda: len(watcher.states[handle.id]) >= seen + 2, "it being blocked again")
    assert watcher.states[handle.id][seen:] == ["STARTED", "BLOCKED"]
    handle.fail_step(0)
    watcher.wait(handle.id, "FAILURE")


def test_a_cancelled_one_is_revoked_and_what_completed_can_be_undone(watched: tuple[Cluster, Watcher]) -> None:
    cluster, watcher = watched
    cancelled = cluster.start("waits")
    cluster.wait_history(cancelled, 2)
    cancelled.cancel("changed my mind")
    assert "CANCELLED" in watcher.wait(cancelled.id, "REVOKED").exception
    terminated = cluster.start("waits")
    cluster.wait_history(terminated, 2)
    terminated.terminate("enough")  # by this process, which is no worker
    assert "enough" in watcher.wait(terminated.id, "REVOKED").exception
    completed = cluster.start("waits")
    cluster.wait_history(completed, 2)
    completed.send("go", "home")
    watcher.wait(completed.id, "SUCCESS")
    completed.undo()
    watcher.wait(completed.id, "FAILURE")
    assert watcher.states[completed.id][-3:] == ["SUCCESS", "COMPENSATING", "FAILURE"]


def test_what_is_masked_is_in_no_event_log_or_description(watched: tuple[Cluster, Watcher]) -> None:
    cluster, watcher = watched
    handle = cluster.run("pays", {"card": "4000-secret", "cents": 7})
    watcher.wait(handle.id, "SUCCESS")
    watcher.wait(f"{handle.id}:0:0:1", "SUCCESS")
    assert handle.get(timeout=5) == "charge of 4000-secret"  # whoever asks for the result gets it
    (entry,) = handle.history()
    described = handle.describe()
    assert (entry.args, entry.result) == (["***", 7], "***")
    assert (described.args, described.result) == ([{"card": "***", "cents": 7}], "***")
    (listed,) = [each for each in cluster.orchestrator.list() if each.instance_id == handle.id]
    assert listed == described
    assert [event for event in watcher.seen if "4000-secret" in event] == []
    assert "4000-secret" not in cluster.logs()


def test_nothing_is_sent_when_nobody_asked_for_events(tmp_path: Path, sqlite_url: str, valkey_url: str) -> None:
    celery = {"event_exchange": f"events-{tmp_path.name}", "event_queue_prefix": tmp_path.name}
    quiet = Cluster(tmp_path, sqlite_url, valkey_url, tasks=__name__, celery=celery)
    watcher = Watcher(quiet.app)
    try:
        quiet.start_worker().wait_ready()
        handle = quiet.run("pays", {"card": "0", "cents": 0})
        assert handle.get(timeout=10)
        quiet.app.control.enable_events()
        # a monitor that is started late switches them on, and learns of what it sees from then on
        later: list[str] = []

        def is_seen() -> bool:
            later.append(quiet.run("pays", {"card": "0", "cents": 0}).id)
            return watcher.states.get(later[-1], [""])[-1] == "SUCCESS"

        wait_until(is_seen, "the events of an instance")
        assert handle.id not in watcher.states
    finally:
        watcher.stop()
        quiet.close()
