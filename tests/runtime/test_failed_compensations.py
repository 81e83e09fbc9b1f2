"""Compensations that cannot do their work are named, the others run, and an operator has the last word."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task, signals, signature

from orchestrator import CompensationFailed, Context, Orchestrator, RetryPolicy, shared_workflow
from tests.runtime.cluster import Cluster
from tests.runtime.test_undoing import Declined, book, cancel, decline
from tests.runtime.workflows import note

SETTINGS = {"max_publications": 2}

#: A task that the pool processes know, but not the worker that takes the messages.
GHOST = "nobody.knows"


@shared_task
def break_down(result: Any) -> None:
    note("break down", "effect")
    if not Path(os.environ["TEST_CRASHES"], "mended").exists():
        raise RuntimeError("out of order")
    note("mended", "effect")


def register(orchestrator: Orchestrator) -> None:
    orchestrator.activity(retry=RetryPolicy(max_attempts=2, initial_interval=timedelta(0)))(break_down)
    signals.worker_process_init.connect(lambda **_kwargs: orchestrator.app.task(cancel.run, name=GHOST), weak=False)


@shared_workflow
def breaks_down(ctx: Context) -> None:
    ctx.run(book.s("a"), compensate=cancel.s())
    ctx.run(book.s("b"), compensate=break_down.s())
    ctx.run(decline.s("c"))


def test_a_compensation_that_fails_for_good_is_named_and_the_others_run(cluster: Cluster) -> None:
    handle = cluster.run("breaks_down")
    assert handle.instance_status == "COMPENSATION_FAILED"
    (entry,) = handle.describe().not_undone
    assert (entry.undoes, entry.name) == (1, "tests.runtime.test_failed_compensations.break_down")
    assert "out of order" in entry.message
    assert cluster.effects.names(handle.id) == ["book a", "book b", "break down", "break down", "cancel a-1"]
    with pytest.raises(Declined):
        handle.get(timeout=1)


def test_an_operator_has_a_failed_compensation_run_again(cluster: Cluster) -> None:
    handle = cluster.run("breaks_down")
    mended = cluster.crashes / "mended"
    mended.touch()
    try:
        handle.retry_compensation(1)
        cluster.wait_status(handle, "COMPENSATED")
    finally:
        mended.unlink()
    assert cluster.effects.names(handle.id)[-1] == "mended"
    assert handle.describe().not_undone == []


def test_an_operator_deals_with_a_failed_compensation_by_hand(cluster: Cluster) -> None:
    handle = cluster.run("breaks_down")
    handle.skip_compensation(1, "refunded at the counter")
    assert handle.instance_status == "COMPENSATED"
    (record,) = [entry for entry in handle.history() if entry.undoes == 1]
    assert record.resolution == "skipped: refunded at the counter"


@shared_workflow
def breaks_down_inside(ctx: Context) -> str:
    try:
        with ctx.saga():
            ctx.run(book.s("b"), compensate=break_down.s())
            ctx.run(decline.s("c"))
    except CompensationFailed as error:
        return f"{error.not_undone[0].name.rpartition('.')[2]} after {type(error.__cause__).__name__}"
    return "undone"


def test_a_scope_that_could_not_be_undone_raises_from_the_original(cluster: Cluster) -> None:
    handle = cluster.run("breaks_down_inside")
    assert handle.get(timeout=1) == "break_down after Declined"
    assert [entry.undoes for entry in handle.describe().not_undone] == [0]


@shared_workflow
def asks_for_a_ghost(ctx: Context) -> None:
    ctx.run(book.s("a"), compensate=cancel.s())
    ctx.run(book.s("b"), compensate=signature(GHOST))
    ctx.run(decline.s("c"))


def test_a_compensation_that_no_worker_knows_is_named_and_the_others_run(cluster: Cluster) -> None:
    handle = cluster.run("asks_for_a_ghost")
    assert handle.instance_status == "COMPENSATION_FAILED"
    (entry,) = handle.describe().not_undone
    assert (entry.undoes, entry.name) == (1, GHOST)
    assert f"no task named '{GHOST}' is registered" in entry.message
    assert cluster.effects.names(handle.id) == ["book a", "book b", "cancel a-1"]


@shared_workflow
def gives_too_much(ctx: Context) -> None:
    ctx.run(book.s("a"), compensate=cancel.s())
    ctx.run(book.s("b"), compensate=cancel.s("why", "and more"))


def test_a_compensation_with_arguments_that_do_not_fit_is_refused_before_its_step_runs(cluster: Cluster) -> None:
    handle = cluster.run("gives_too_much")
    assert handle.instance_status == "BLOCKED"
    blocked = handle.describe().blocked
    assert blocked is not None
    assert "takes from 1 to 2 positional arguments but 3 were given" in blocked
    assert cluster.effects.names(handle.id) == ["book a"]
