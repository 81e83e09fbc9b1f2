"""Steps that run side by side: gather, wait, map and group against a real worker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from celery import group, shared_task

from orchestrator import Context, StepFailed, shared_workflow
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note, wait_for_file


@shared_task
def double(number: int) -> int:
    note(f"double {number}", "begin")
    time.sleep(0.02)  # long enough to overlap with others
    note(f"double {number}", "end")
    if number < 0:
        raise ValueError(f"{number} is negative")
    return 2 * number


@shared_task
def halve(number: int | None) -> None:
    note(f"halve {number}", "begin")
    time.sleep(0.02)
    note(f"halve {number}", "end")


def most_at_once(cluster: Cluster, instance: str, verb: str) -> int:
    """Return how many bodies ran at the same time."""
    running = most = 0
    for effect in sorted(cluster.effects.list_effects(instance), key=lambda effect: effect.at):
        if effect.name.startswith(verb):
            running += 1 if effect.what == "begin" else -1
            most = max(most, running)
    return most


def names(cluster: Cluster, instance: str, what: str = "begin") -> list[str]:
    return cluster.effects.names(instance, what)


@shared_workflow
def gathers(ctx: Context) -> list[Any]:
    first = ctx.start(double.s(1))
    return ctx.gather(first, double.s(2), group(double.s(3), double.s(4)))


def test_gathered_results_come_in_the_order_asked_for(cluster: Cluster) -> None:
    assert cluster.run("gathers").get(timeout=1) == [2, 4, [6, 8]]


@shared_workflow
def gathers_failures(ctx: Context) -> list[Any]:
    handles = [ctx.start(double.s(number), compensate=halve.s()) for number in (-2, 1, -1)]
    found = ctx.gather(*handles, return_exceptions=True)
    ctx.set_progress(" ".join(f"{e.seq}:{e.message}" for e in found if isinstance(e, StepFailed)))
    return ctx.gather(*handles)


def test_the_first_failure_by_number_is_raised_when_all_have_settled(cluster: Cluster) -> None:
    handle = cluster.run("gathers_failures")
    assert handle.describe().progress == "0:-2 is negative 2:-1 is negative"
    with pytest.raises(ValueError, match="-2 is negative"):
        handle.get(timeout=1)
    assert [name for name in names(cluster, handle.id) if "halve" in name] == ["halve 2"]


@shared_workflow
def waits_at_most(ctx: Context, path: str, seconds: float) -> list[Any]:
    slow, quick = ctx.start(wait_for_file.s(path, "slow")), ctx.start(double.s(1))
    done, pending = ctx.wait(slow, quick)
    first = [handle is quick for handle in done]
    done, pending = ctx.wait(*pending, timeout=seconds)
    return [first, len(done), len(pending), slow.ready(), slow.get()]


def test_a_wait_ends_at_its_timeout_or_when_enough_is_done(cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    handle = cluster.start("waits_at_most", str(go), 0.2)
    wait_until(lambda: [e.kind for e in handle.history() if e.outcome] == ["step", "timer"], "the timeout of the wait")
    go.touch()
    assert handle.get(timeout=10) == [[True], 0, 1, False, "slow"]
    handle = cluster.run("waits_at_most", str(go), 60)
    assert handle.get(timeout=1)[1:3] in ([1, 0], [0, 0])  # the slow one may have been the first


@shared_workflow
def maps(ctx: Context, numbers: list[int], concurrency: int | None, on_failure: Any) -> list[Any]:
    found = ctx.map(double, numbers, concurrency=concurrency, on_failure=on_failure, compensate=halve.s())
    return [f"{e.seq} {e.outcome}" if isinstance(e, StepFailed) else e for e in found]


def test_a_map_never_runs_more_bodies_than_its_concurrency(cluster: Cluster) -> None:
    numbers = list(range(12))
    handle = cluster.run("maps", numbers, 2, "stop")
    assert handle.get(timeout=1) == [2 * number for number in numbers]
    assert most_at_once(cluster, handle.id, "double") == 2


def test_a_map_with_concurrency_one_keeps_the_order(cluster: Cluster) -> None:
    handle = cluster.run("maps", [3, 1, 2], 1, "stop")
    assert names(cluster, handle.id) == ["double 3", "double 1", "double 2"]
    assert most_at_once(cluster, handle.id, "double") == 1


def test_a_map_that_stops_undoes_what_it_did(cluster: Cluster) -> None:
    handle = cluster.run("maps", [1, 2, 3, -1, *range(4, 20)], 3, "stop")
    assert handle.instance_status == "COMPENSATED"
    begun = [name for name in names(cluster, handle.id) if "double" in name]
    undone = [name for name in names(cluster, handle.id) if "halve" in name]
    assert sorted(undone) == sorted(f"halve {2 * int(name.split()[1])}" for name in begun if name != "double -1")
    assert most_at_once(cluster, handle.id, "halve") <= 3
    with pytest.raises(ValueError, match="-1 is negative"):
        handle.get(timeout=1)


@shared_workflow
def maps_behind_a_file(ctx: Context, path: str, labels: list[str]) -> list[Any]:
    return list(ctx.map(fails_or_waits.s(path), labels, concurrency=1))


@shared_task
def fails_or_waits(label: str, path: str) -> str:
    if label == "fail":
        raise ValueError(label)
    return str(wait_for_file(path, label))


def test_a_map_that_stops_withdraws_what_has_not_begun(cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    handle = cluster.start("maps_behind_a_file", str(go), ["fail", "second", "third", "fourth"])
    wait_until(
        lambda: [e.outcome for e in handle.history()][2:4] == ["withdrawn"] * 2,
        "the withdrawal of what the map still held back",
    )
    go.touch()
    with pytest.raises(ValueError, match="fail"):
        handle.get(timeout=10)
    assert "do third" not in names(cluster, handle.id)


def test_a_map_that_collects_returns_failures_in_place(cluster: Cluster) -> None:
    handle = cluster.run("maps", [1, -1, 2], None, "collect")
    assert handle.get(timeout=1) == [2, "1 failed", 4]


def test_a_map_of_nothing_is_an_empty_list(cluster: Cluster) -> None:
    assert cluster.run("maps", [], 3, "stop").get(timeout=1) == []


@shared_workflow
def runs_a_group(ctx: Context) -> list[Any]:
    return [
        ctx.run(group(double.s(number) for number in (1, 2))),
        ctx.run(group(double.s(-1), double.s(3)), optional=True),
    ]


def test_the_members_of_a_group_become_steps(cluster: Cluster) -> None:
    handle = cluster.run("runs_a_group")
    assert handle.get(timeout=1) == [[2, 4], [None, 6]]
    assert [entry.outcome for entry in handle.history()] == ["succeeded", "succeeded", "failed", "succeeded"]


@shared_workflow
def tries(ctx: Context) -> Any:
    return ctx.run(double.s(-1), optional=True)


def test_an_optional_step_that_fails_returns_none_and_is_recorded(cluster: Cluster) -> None:
    handle = cluster.run("tries")
    assert handle.get(timeout=1) is None
    assert (handle.instance_status, handle.history()[0].outcome) == ("COMPLETED", "failed")


@shared_workflow
def cancels(ctx: Context, path: str) -> list[Any]:
    running = ctx.start(wait_for_file.s(path, "slow"), compensate=halve.si(1))
    unbegun = ctx.start(double.s(5).set(countdown=60), compensate=halve.si(5))
    ctx.run(double.s(1))
    unbegun.cancel()
    running.cancel()
    return [str(handle.error) for handle in (unbegun, running)]


def test_cancelling_withdraws_what_has_not_begun_and_undoes_what_has(cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    handle = cluster.start("cancels", str(go))
    wait_until(lambda: "withdrawn" in [e.outcome for e in handle.history()], "the step withdrawn")
    go.touch()
    withdrawn, none = handle.get(timeout=10)
    assert "it never began" in withdrawn
    assert none == "None"
    done = names(cluster, handle.id)
    assert (sorted(done[:2]), done[2:]) == (["do slow", "double 1"], ["halve 1"])  # two processes began at once


@shared_workflow
def leaves_behind(ctx: Context) -> str:
    ctx.start(double.s(-1))
    ctx.run(double.s(1), compensate=halve.s())
    return "done"


def test_a_failure_that_nobody_looked_at_fails_the_scope(cluster: Cluster) -> None:
    handle = cluster.run("leaves_behind")
    assert handle.instance_status == "COMPENSATED"
    assert names(cluster, handle.id)[-1] == "halve 2"
