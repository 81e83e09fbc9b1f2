"""What failed is undone by the compensations of what took effect, in all the ways that they can be given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task

from orchestrator import (
    Context,
    Orchestrator,
    OutcomeUnknown,
    StepFailed,
    StepTimedOut,
    StepUnknown,
    UndoneStep,
    WorkflowFailed,
    current_step,
    shared_workflow,
)
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.workflows import note, wait_for_file


class Declined(Exception):
    """What a payment provider's client raises."""


class Interrupted(Exception):
    """What it raises when the answer was lost."""


@shared_task
def book(what: str) -> str:
    note(f"book {what}", "effect")
    return f"{what}-1"


@shared_task
def cancel(booking: str | None, why: str = "") -> None:
    note(f"cancel {booking}{why}", "effect")


@shared_task
def cancel_known(booking: str) -> None:
    note(f"cancel {booking}", "effect")


@shared_task
def decline(what: str) -> None:
    raise Declined(what)


@shared_task
def lose(what: str) -> None:
    note(f"lose {what}", "effect")
    raise OutcomeUnknown(f"the answer about {what} was lost")


@shared_task
def interrupt(what: str) -> str:
    raise Interrupted(what)


@shared_task
def return_odd(what: str) -> Any:
    note("odd", "effect")
    return object()


@shared_task
def return_none() -> None:
    note("none", "effect")


@shared_task
def lodge(name: str, *, nights: int = 1) -> str:
    note(f"lodge {name}", "effect")
    if nights > 7:
        raise Declined(name)
    return f"room of {name}"


@shared_task
def leave(step: UndoneStep) -> None:
    own = current_step()
    assert own is not None
    assert step.idempotency_key != own.idempotency_key
    note(f"leave {step.result} {step.args} {step.kwargs} {step.outcome}", "effect")


def register(orchestrator: Orchestrator) -> None:
    orchestrator.compensates(lodge, pass_step=True, always=True)(leave)
    orchestrator.activity(unknown_on=(Interrupted,))(interrupt)


# --- which steps are undone, and how ------------------------------------------------------------------------------


@shared_workflow
def undoes(ctx: Context) -> None:
    ctx.run(book.s("a"), compensate=cancel.s(" because"))
    ctx.run(book.s("b"), compensate=cancel.si("b by hand"))
    ctx.run(book.s("c"), compensate=cancel)
    ctx.run(lodge.s("d"), compensate=False)
    ctx.run(lodge.s("e", nights=2))
    ctx.compensate(cancel.si("nothing"))
    ctx.run(lodge.s("f", nights=9))


def test_compensations_run_in_reverse_order_with_what_they_ask_for(cluster: Cluster) -> None:
    handle = cluster.run("undoes")
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == [
        "book a",
        "book b",
        "book c",
        "lodge d",
        "lodge e",
        "lodge f",
        "leave None ('f',) {'nights': 9} failed",
        "cancel nothing",
        "leave room of e ('e',) {'nights': 2} succeeded",
        "cancel c-1",
        "cancel b by hand",
        "cancel a-1 because",
    ]
    with pytest.raises(Declined) as failure:
        handle.get(timeout=1)
    assert isinstance(failure.value, WorkflowFailed)


@shared_workflow
def commits(ctx: Context) -> None:
    ctx.run(book.s("a"), compensate=cancel.s())
    ctx.commit()
    ctx.run(book.s("b"), compensate=cancel.s())
    ctx.run(decline.s("c"))


def test_what_was_committed_stays_done(cluster: Cluster) -> None:
    handle = cluster.run("commits")
    assert cluster.effects.names(handle.id) == ["book a", "book b", "cancel b-1"]


@shared_workflow
def tries_another_way(ctx: Context) -> list[str]:
    ctx.run(book.s("a"), compensate=cancel.s())
    try:
        with ctx.saga():
            ctx.run(book.s("b"), compensate=cancel.s())
            ctx.run(decline.s("c"))
    except Declined as error:
        assert isinstance(error, StepFailed)
        with ctx.saga():
            ctx.run(book.s("d"), compensate=cancel.s())
    ctx.run(decline.s("e"))
    return []


def test_a_nested_saga_is_undone_before_another_way_is_tried(cluster: Cluster) -> None:
    handle = cluster.run("tries_another_way")
    assert cluster.effects.names(handle.id) == [
        *("book a", "book b", "cancel b-1", "book d"),
        *("cancel d-1", "cancel a-1"),
    ]


@shared_task
def meet(_result: Any, own: str, other: str) -> None:
    """End only when the other one has begun."""
    folder = Path(os.environ["TEST_CRASHES"])
    (folder / own).touch()
    wait_until(lambda: (folder / other).exists(), f"{other} running beside {own}")
    note(f"met {other}", "effect")


@shared_workflow
def undoes_together(ctx: Context) -> None:
    with ctx.saga(parallel=True):
        ctx.run(book.s("a"), compensate=meet.s("a", "b"))
        ctx.run(book.s("b"), compensate=meet.s("b", "a"))
        ctx.run(decline.s("c"))


def test_a_parallel_saga_is_undone_together(cluster: Cluster) -> None:
    handle = cluster.run("undoes_together")
    assert handle.instance_status == "COMPENSATED"
    assert sorted(cluster.effects.names(handle.id)[2:]) == ["met a", "met b"]


# --- outcomes that nobody knows -----------------------------------------------------------------------------------


@shared_workflow
def is_in_doubt(ctx: Context, name: str, compensation: str, accepts: bool) -> str:
    try:
        ctx.run(globals()[name].s("a"), compensate=globals()[compensation].s())
    except StepUnknown as error:
        if accepts:
            ctx.accept(error)
        return f"{error.outcome} {error.error_type.rpartition('.')[2]}"
    return "known"


@pytest.mark.parametrize(
    ("task", "error"), [("lose", "OutcomeUnknown"), ("interrupt", "Interrupted"), ("return_odd", "NotEncodable")]
)
def test_a_step_in_doubt_is_undone_though_the_workflow_goes_on(cluster: Cluster, task: str, error: str) -> None:
    handle = cluster.run("is_in_doubt", task, "cancel", False)
    assert handle.instance_status == "COMPLETED"
    assert handle.get(timeout=1) == f"unknown {error}"
    assert cluster.effects.names(handle.id)[-1:] == ["cancel None"]


def test_a_result_that_cannot_be_recorded_is_named(cluster: Cluster) -> None:
    error = cluster.run("is_in_doubt", "return_odd", "cancel", False).history()[0].error
    assert error is not None
    assert "the result of tests.runtime.test_undoing.return_odd cannot be encoded" in error.message
    assert "builtins.object" in error.message


def test_a_step_in_doubt_that_was_taken_on_is_not_undone(cluster: Cluster) -> None:
    handle = cluster.run("is_in_doubt", "lose", "cancel", True)
    assert handle.get(timeout=1) == "unknown OutcomeUnknown"
    assert cluster.effects.names(handle.id) == ["lose a"]


def test_a_compensation_that_needs_the_unknown_result_is_left_to_an_operator(cluster: Cluster) -> None:
    handle = cluster.run("is_in_doubt", "lose", "cancel_known", False)
    (entry,) = handle.describe().not_undone
    assert (entry.undoes, entry.seq) == (0, 1)
    assert "ResultNeeded" in entry.message
    assert "'booking' does not accept None" in entry.message
    assert cluster.effects.names(handle.id) == ["lose a"]


@shared_workflow
def returns_none(ctx: Context) -> None:
    ctx.run(return_none.s(), compensate=cancel_known.s())
    ctx.run(decline.s("b"))


def test_a_step_that_returned_none_is_undone_with_none_whatever_the_annotation(cluster: Cluster) -> None:
    handle = cluster.run("returns_none")
    assert handle.instance_status == "COMPENSATED"
    assert cluster.effects.names(handle.id) == ["none", "cancel None"]


@shared_workflow
def times_out(ctx: Context, path: str) -> str:
    try:
        with ctx.saga():
            ctx.run(wait_for_file.s(path, "late"), timeout=0.3, compensate=cancel.s())
    except StepTimedOut as error:
        return error.outcome
    return "in time"


def test_the_compensation_of_a_step_that_timed_out_waits_for_its_late_result(cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    handle = cluster.start("times_out", str(go))
    wait_until(lambda: [e.outcome for e in handle.history()] == ["unknown"], "the timeout")
    assert cluster.effects.names(handle.id) == ["do late"]  # and nothing is undone while the attempt is alive
    go.touch()
    assert handle.get(timeout=10) == "unknown"
    assert [e.late_outcome for e in handle.history()] == ["succeeded", None]
    assert cluster.effects.names(handle.id) == ["do late", "cancel late"]
