"""A replay looks at the name of a recorded call and at nothing else, and yet refuses what was refused before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.asking import REFUSED
from orchestrator.core.context import Context
from orchestrator.core.host import Call
from orchestrator.core.records import Compensation, Diverged, Kind, Outcome, StartChild

from .host import FakeHost, group
from .past import Past, Workflow, asks, failure_of, refusal_of, result_of, waits_for

TOO_LARGE = "x" * 20_000


class Blind(FakeHost):
    """Does not look into calls any more, once told so."""

    is_blind = False

    def read_call(self, step: object, item: tuple[Any, ...] = ()) -> Call:
        assert not self.is_blind
        return super().read_call(step, item)

    def read_compensation(self, *args: Any, **kwargs: Any) -> Compensation:
        assert not self.is_blind
        return super().read_compensation(*args, **kwargs)

    def check_known(self, name: str) -> None:
        assert not self.is_blind
        super().check_known(name)


def grown(past: Past, workflow: Workflow, results: int = 0) -> Past:
    """Record what is asked for next, and let all of it succeed."""
    for new in past.decide(workflow).records:
        at_once = {} if new.outcome is None else {"outcome": new.outcome, "result": new.result}
        child = {"child_id": new.command.child_id} if isinstance(new.command, StartChild) else {}
        past.asked(new.command.name, new.command.kind, scope=new.command.scope, **at_once, **child)
        if not at_once:
            past.succeeded(new.seq, new.seq)
    return past


CALLS: dict[str, Callable[[Context, FakeHost], Any]] = {
    "run": lambda ctx, host: ctx.run(host.tasks["work"].s(1), compensate=host.tasks["undo"].s()),
    "start": lambda ctx, host: ctx.start(host.tasks["work"].s(1), timeout=5).get(),
    "child": lambda ctx, host: ctx.start(host.tasks["deliver"].s(1)).instance_id,
    "left alone": lambda ctx, host: ctx.start(host.tasks["deliver"].s(1), on_parent_end="leave").instance_id,
    "group": lambda ctx, host: ctx.run(group(host.tasks["work"].s(1), host.tasks["work"].s(2))),
    "gather": lambda ctx, host: ctx.gather(host.tasks["work"].s(1), host.tasks["deliver"].s(2)),
    "map": lambda ctx, host: ctx.map(host.tasks["work"].s(), [1, 2, 3], concurrency=2),
}


@pytest.mark.parametrize("way", CALLS)
def test_what_is_recorded_is_not_looked_into(way: str) -> None:
    host = Blind()
    for name in ("work", "undo"):
        host.task(name)
    host.task("deliver", is_workflow=True)
    past = grown(Past(host), lambda ctx: CALLS[way](ctx, host))
    first = result_of(past.decide(lambda ctx: CALLS[way](ctx, host)))
    host.is_blind = True
    assert result_of(past.decide(lambda ctx: CALLS[way](ctx, host))) == first


def test_what_is_recorded_may_have_become_too_large(past: Past, host: FakeHost) -> None:
    past.asked("work").succeeded(0, 1)
    assert result_of(past.decide(lambda ctx: ctx.run(host.tasks["work"].s(TOO_LARGE)))) == 1


def test_a_task_that_is_not_registered_here_is_what_the_record_says(past: Past, host: FakeHost) -> None:
    workflow = lambda ctx: ctx.start(host.tasks["deliver"].s()).instance_id  # noqa: E731
    past.child("deliver")
    host.tasks["deliver"].is_workflow = False
    assert result_of(past.succeeded(0).decide(workflow)) == "order-1:1:0~g1"


def test_a_task_that_has_become_a_workflow_is_another_call(past: Past, host: FakeHost) -> None:
    decision = past.asked("deliver").succeeded(0).decide(lambda ctx: ctx.run(host.tasks["deliver"].s()))
    assert decision.ending == Diverged(0, "step deliver", "child deliver")


# --- refused, and caught ------------------------------------------------------------------------------------------


def run(ctx: Context, host: FakeHost, argument: Any) -> Any:
    return ctx.run(host.tasks["work"].s(argument))


def gather(ctx: Context, host: FakeHost, argument: Any) -> Any:
    return ctx.gather(host.tasks["work"].s(1), host.tasks["work"].s(argument))


def map_(ctx: Context, host: FakeHost, argument: Any) -> Any:
    return ctx.map(host.tasks["work"].s(), [1, argument])


def compensated(ctx: Context, host: FakeHost, argument: Any) -> Any:
    return ctx.run(host.tasks["work"].s(), compensate=host.tasks["undo"].s(argument))


@pytest.mark.parametrize("call", [run, gather, map_, compensated])
def test_the_same_task_called_after_a_refusal_is_told_from_the_refused_call(
    past: Past, host: FakeHost, call: Callable[[Context, FakeHost, Any], Any]
) -> None:
    def workflow(ctx: Context) -> Any:
        refused = 0
        for argument in (TOO_LARGE, TOO_LARGE, "fits"):
            try:
                return [refused, call(ctx, host, argument), ctx.run(host.tasks["mail"].s())]
            except errors.PayloadTooLarge:
                refused += 1
        return None

    decision = past.decide(workflow)
    assert asks(decision)[0] == f"patch {REFUSED}"
    assert set(asks(decision)[1:]) == {"step work"}
    grown(past, workflow)
    assert asks(past.decide(workflow)) == ["step mail"]
    assert result_of(grown(past, workflow).decide(workflow))[0] == 2


def test_a_child_started_after_a_refusal_is_named_for_its_own_number(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with contextlib.suppress(errors.PayloadTooLarge):
            ctx.run(host.tasks["deliver"].s(TOO_LARGE))
        return ctx.start(host.tasks["deliver"].s()).instance_id

    command = past.decide(workflow).records[1].command
    assert isinstance(command, StartChild)
    assert command.child_id == "order-1:1:1~g1"
    assert result_of(grown(past, workflow).decide(workflow)) == "order-1:1:1~g1"


def test_what_was_refused_and_fits_by_now_takes_the_mark_for_its_own(past: Past, host: FakeHost) -> None:
    past.asked(REFUSED, Kind.PATCH, outcome=Outcome.SUCCEEDED).asked("work").succeeded(1, 7)
    assert result_of(past.decide(lambda ctx: run(ctx, host, "fits"))) == 7


def test_nothing_is_marked_where_no_call_follows_the_refused_one(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
            run(ctx, host, TOO_LARGE)

    past.asked("charge", scope="1.", compensation=Compensation("refund")).succeeded(0)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]
    past.undoing(0, "refund", scope="1.").succeeded(1)
    assert failure_of(past.decide(workflow)).failure.type == "orchestrator.errors.PayloadTooLarge"


def test_a_wait_after_a_refusal_needs_no_mark(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with contextlib.suppress(errors.PayloadTooLarge):
            run(ctx, host, TOO_LARGE)
        ctx.sleep(5)
        return run(ctx, host, "fits")

    assert asks(past.decide(workflow)) == ["timer timer"]
    assert asks(past.timer().fired(0).decide(workflow)) == ["step work"]
    assert result_of(past.asked("work").succeeded(1, 3).decide(workflow)) == 3


def test_a_refusal_is_remembered_over_a_wait_that_asks_for_nothing(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["charge"].s())
        with contextlib.suppress(errors.PayloadTooLarge):
            run(ctx, host, TOO_LARGE)
        handle.get()
        return run(ctx, host, "fits")

    past.asked("charge")
    assert waits_for(past.decide(workflow)) == [0]
    assert asks(past.succeeded(0).decide(workflow)) == [f"patch {REFUSED}", "step work"]


def test_an_unknown_task_is_not_left_to_the_workflow(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with contextlib.suppress(errors.UnknownTask):
            ctx.run(host.tasks["work"].s(), compensate=type(host.tasks["undo"])("nobody").s())

    assert "nobody" in refusal_of(past.decide(workflow))
