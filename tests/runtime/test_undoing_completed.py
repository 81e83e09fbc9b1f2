"""``undo()`` of an instance that has completed: its compensations run once, its children's with them."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task

from orchestrator import Context, Orchestrator, RetryPolicy, shared_workflow
from orchestrator.errors import InvalidOperation
from tests.runtime.cluster import Cluster
from tests.runtime.test_children import child_of
from tests.runtime.workflows import do, note, undo

KEEPS_RESULTS = True


@shared_task
def break_down(_result: Any) -> None:
    note("break down", "effect")
    if not Path(os.environ["TEST_CRASHES"], "mended").exists():
        raise RuntimeError("out of order")


def register(orchestrator: Orchestrator) -> None:
    orchestrator.activity(retry=RetryPolicy(max_attempts=1, initial_interval=timedelta(0)))(break_down)


@shared_workflow
def ships(ctx: Context) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.sleep(0.05)
    with ctx.saga():
        ctx.run(do.s("b"), compensate=undo.s("b"))
    return str(ctx.run(do.s("c"), compensate=undo.s("c")))


def test_what_was_done_is_undone_in_reverse(cluster: Cluster) -> None:
    handle = cluster.run("ships")
    assert handle.get(timeout=1) == "c"
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    assert cluster.effects.names(handle.id) == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]
    assert handle.instance_status == "COMPENSATED"
    with pytest.raises(Exception, match="undone"):
        handle.get(timeout=1)


def test_twice_is_one_undo(cluster: Cluster) -> None:
    handle = cluster.run("ships")
    threads = [threading.Thread(target=handle.undo) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.wait_status(handle, "COMPENSATED")
    handle.undo()
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id)[3:] == ["undo c", "undo b", "undo a"]


@shared_workflow
def commits(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.commit()
    ctx.run(do.s("pivot"), pivot=True, compensate=undo.s("pivot"))
    ctx.run(do.s("b"), compensate=undo.s("b"))
    ctx.run(do.s("c"))


def test_what_was_committed_stays_done(cluster: Cluster) -> None:
    handle = cluster.run("commits")
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    assert cluster.effects.names(handle.id) == ["do a", "do pivot", "do b", "do c", "undo b"]


@shared_workflow
def does_nothing(ctx: Context) -> str:
    return "nothing"


def test_one_with_nothing_to_undo_is_undone_at_once(cluster: Cluster) -> None:
    handle = cluster.run("does_nothing")
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    assert handle.history() == []


@shared_workflow
def fails(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    raise LookupError("no")


def test_only_what_has_completed_can_be_undone(cluster: Cluster) -> None:
    handle = cluster.run("fails")
    with pytest.raises(InvalidOperation, match="only what has completed can be undone"):
        handle.undo()
    assert cluster.effects.names(handle.id) == ["do a", "undo a"]


@shared_workflow
def has_a_child(ctx: Context) -> str:
    ctx.run(do.s("own"), compensate=undo.s("own"))
    return str(ctx.run(ships.s()))


def test_children_are_undone_with_it(cluster: Cluster) -> None:
    handle = cluster.run("has_a_child")
    child = child_of(cluster, handle, 1)
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    assert child.instance_status == "COMPENSATED"
    assert cluster.effects.names(child.id) == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]
    assert cluster.effects.names(handle.id) == ["do own", "undo own"]


def test_a_child_that_an_operator_has_undone_is_not_undone_twice(cluster: Cluster) -> None:
    handle = cluster.run("has_a_child")
    child = child_of(cluster, handle, 1)
    child.undo()
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    assert child.instance_status == "COMPENSATED"
    assert cluster.effects.names(child.id)[3:] == ["undo c", "undo b", "undo a"]


@shared_workflow
def breaks_down(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.run(do.s("b"), compensate=break_down.s())


def test_what_cannot_be_undone_is_named_and_can_be_repeated(cluster: Cluster) -> None:
    handle = cluster.run("breaks_down")
    handle.undo()
    cluster.wait_status(handle, "COMPENSATION_FAILED")
    (entry,) = handle.describe().not_undone
    assert (entry.undoes, entry.name) == (1, "tests.runtime.test_undoing_completed.break_down")
    assert cluster.effects.names(handle.id) == ["do a", "do b", "break down", "undo a"]
    mended = cluster.crashes / "mended"
    mended.touch()
    try:
        handle.retry_compensation(1)
        cluster.wait_status(handle, "COMPENSATED")
    finally:
        mended.unlink()
