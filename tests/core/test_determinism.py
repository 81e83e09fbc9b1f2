"""What makes every replay alike: derived values, locals, patches, sticky suspension; and what tells that one is not."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Broken, Decision, Diverged, Kind, Outcome, State, Waiting

from .driver import STARTED_AT
from .host import FakeHost
from .past import Past, asks, failure_of, plan, result_of, waits_for

# --- time, randomness, ids --------------------------------------------------------------------------------------------


def test_now_is_the_time_of_the_last_outcome_delivered(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        times = [ctx.now()]
        for _ in range(2):
            ctx.run(host.tasks["work"].s())
            times.append(ctx.now())
        return [(time - STARTED_AT) // timedelta(minutes=1) for time in times]

    past.asked("work").succeeded(0).asked("work").succeeded(1)
    assert result_of(past.decide(workflow)) == [0, 1, 2]


def test_now_never_goes_back(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        first = ctx.run(host.tasks["work"].s()), ctx.now()
        second = ctx.run(host.tasks["work"].s()), ctx.now()
        return first[1] <= second[1]

    past.asked("work").succeeded(0).asked("work").succeeded(1)
    past.inbox[1] = replace(past.inbox[1], at=STARTED_AT - timedelta(days=1))
    assert result_of(past.decide(workflow)) is True


def draws(ctx: Context) -> Any:
    return [ctx.random(), ctx.random(), str(ctx.uuid4()), str(ctx.uuid4()), str(ctx.uuid4("a")), str(ctx.uuid4("b"))]


def test_random_and_uuids_are_the_same_on_every_replay_and_differ_from_each_other(past: Past) -> None:
    first, again = result_of(past.decide(draws)), result_of(past.decide(draws))
    assert first == again
    assert len(set(first)) == 6
    assert all(0 <= number < 1 for number in first[:2])
    assert all(uuid.UUID(text).version == 4 for text in first[2:])


def test_random_and_uuids_are_those_of_the_run(past: Past, host: FakeHost) -> None:
    other = Past(host, run=2)
    mine, theirs = result_of(past.decide(draws)), result_of(other.decide(draws))
    assert not set(mine) & set(theirs)


def test_the_uuid_of_a_key_does_not_depend_on_when_it_is_asked_for(past: Past) -> None:
    early = result_of(past.decide(lambda ctx: [str(ctx.uuid4("a")), str(ctx.uuid4())]))
    late = result_of(past.decide(lambda ctx: list(reversed([str(ctx.uuid4()), str(ctx.uuid4("a"))]))))
    assert early == late


# --- locals -----------------------------------------------------------------------------------------------------------


def read_rate() -> float:
    return 1.5


def read_nothing() -> float:
    raise LookupError("no rate today")


def misspelt() -> float:
    return read_raet()  # type: ignore[name-defined,no-any-return]  # noqa: F821


def test_a_local_runs_once_and_its_result_is_recorded(past: Past, host: FakeHost) -> None:
    decision = past.decide(lambda ctx: ctx.local(read_rate))
    assert asks(decision) == ["local read_rate"]
    assert (decision.records[0].outcome, decision.records[0].result) == (Outcome.SUCCEEDED, "1.5")
    assert result_of(decision) == 1.5
    past.asked("read_rate", Kind.LOCAL, state=State.SETTLED, outcome=Outcome.SUCCEEDED, result="2.5")
    assert result_of(past.decide(lambda ctx: ctx.local(read_rate))) == 2.5
    assert host.performed == ["read_rate"]


def test_a_local_that_raises_is_recorded_and_raised_as_a_failed_step(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.local(read_nothing)
        except errors.StepFailed as failed:
            assert isinstance(failed, LookupError)
            return failed.message

    decision = past.decide(workflow)
    assert (decision.records[0].outcome, result_of(decision)) == (Outcome.FAILED, "no rate today")


def test_a_typo_in_a_local_blocks(past: Past) -> None:
    assert isinstance(past.decide(lambda ctx: ctx.local(misspelt)).ending, Broken)


def test_ctx_is_refused_inside_a_local(past: Past, host: FakeHost) -> None:
    decision = past.decide(lambda ctx: ctx.local(lambda: ctx.run(host.tasks["work"])))
    assert isinstance(decision.ending, Broken)
    assert "ctx.local" in decision.ending.failure.message
    assert asks(decision) == []


def test_ctx_works_again_after_a_local(past: Past, host: FakeHost) -> None:
    decision = past.decide(lambda ctx: (ctx.local(read_rate), ctx.run(host.tasks["work"])))
    assert asks(decision) == ["local read_rate", "step work"]


def test_a_local_has_to_be_a_function(past: Past) -> None:
    assert isinstance(past.decide(lambda ctx: ctx.local(partial(read_rate))).ending, Broken)


# --- patches ----------------------------------------------------------------------------------------------------------


def patched_twice(host: FakeHost) -> Any:
    def workflow(ctx: Context) -> Any:
        is_new = ctx.patched("insure")
        if is_new:
            ctx.run(host.tasks["mail"].s())
        ctx.run(host.tasks["work"].s())
        return [is_new, ctx.patched("insure")]

    return workflow


def test_a_new_run_takes_the_new_path_and_remembers(past: Past, host: FakeHost) -> None:
    assert asks(past.decide(patched_twice(host))) == ["patch insure", "step mail"]
    past.asked("insure", Kind.PATCH, state=State.SETTLED, outcome=Outcome.SUCCEEDED)
    past.asked("mail").succeeded(1).asked("work").succeeded(2)
    assert result_of(past.decide(patched_twice(host))) == [True, True]


def test_a_run_that_went_past_keeps_to_the_old_path(past: Past, host: FakeHost) -> None:
    past.asked("work").succeeded(0)
    decision = past.decide(patched_twice(host))
    assert result_of(decision) == [False, False]
    assert asks(decision) == []


# --- replaying --------------------------------------------------------------------------------------------------------


def test_a_pass_is_replaying_until_it_comes_to_what_no_pass_has_seen(past: Past, host: FakeHost) -> None:
    seen: list[bool] = []

    def workflow(ctx: Context) -> Any:
        seen.append(ctx.is_replaying)
        for _ in range(2):
            ctx.run(host.tasks["work"].s())
            seen.append(ctx.is_replaying)

    def passes() -> list[bool]:
        seen.clear()
        past.decide(workflow)
        return list(seen)

    assert passes() == [False]
    past.asked("work").seen_order = 0
    assert passes() == [True]
    past.succeeded(0)
    assert passes() == [True, False]
    past.asked("work").succeeded(1).seen_order = 1
    assert passes() == [True, True, False]


def test_each_line_is_logged_once_over_all_passes(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.logger.info("begin")
        try:
            ctx.run(host.tasks["work"].s())
            ctx.logger.info("worked")
        finally:
            # a suspended pass comes by here as well
            ctx.logger.info("cleanup")

    past.decide(workflow)
    past.asked("work").seen_order = 0
    past.succeeded(0).decide(workflow)
    assert host.log.lines == ["begin", "worked", "cleanup"]


def test_attributes_and_progress_are_what_the_pass_set_last(past: Past) -> None:
    def workflow(ctx: Context) -> None:
        ctx.set_attributes(customer=7, region="eu")
        ctx.set_attributes(region="us")
        ctx.set_progress("half way")

    decision = past.decide(workflow)
    assert (decision.attributes, decision.progress) == ({"customer": 7, "region": "us"}, "half way")


# --- sticky suspension ------------------------------------------------------------------------------------------------


def in_finally(ctx: Context, host: FakeHost) -> Any:
    try:
        ctx.run(host.tasks["work"].s())
    finally:
        ctx.run(host.tasks["mail"].s())


def in_with(ctx: Context, host: FakeHost) -> Any:
    with ctx.saga():
        ctx.run(host.tasks["work"].s())


def in_broad_except(ctx: Context, host: FakeHost) -> Any:
    try:
        ctx.run(host.tasks["work"].s())
    except BaseException:
        ctx.run(host.tasks["mail"].s())


def returning_a_value(ctx: Context, host: FakeHost) -> Any:
    try:
        ctx.run(host.tasks["work"].s())
    except BaseException:
        return "done"


def raising_another(ctx: Context, host: FakeHost) -> Any:
    try:
        ctx.run(host.tasks["work"].s())
    finally:
        raise ValueError("cleanup failed")


def misspelling_it(ctx: Context, host: FakeHost) -> Any:
    try:
        ctx.run(host.tasks["work"].s())
    finally:
        misspelt()


def raising_no_exception(ctx: Context, host: FakeHost) -> Any:
    class Interrupt(BaseException):
        pass

    try:
        ctx.run(host.tasks["work"].s())
    except BaseException:
        raise Interrupt from None


def using_everything(ctx: Context, host: FakeHost) -> Any:
    handle = ctx.start(host.tasks["work"].s())
    calls: list[Callable[[], Any]] = [
        handle.get,
        handle.ready,
        handle.cancel,
        lambda: handle.error,
        lambda: ctx.start(host.tasks["mail"]),
        lambda: ctx.start(None),
        lambda: ctx.gather(handle),
        lambda: ctx.wait(handle, count=99),
        lambda: ctx.map(host.tasks["mail"], [1], concurrency=1),
        lambda: ctx.saga().__enter__(),
        lambda: ctx.compensate(host.tasks["undo"]),
        lambda: ctx.accept(handle),
        ctx.commit,
        lambda: ctx.sleep(1),
        lambda: ctx.timer(1),
        ctx.now,
        ctx.random,
        ctx.uuid4,
        lambda: ctx.local(read_rate),
        lambda: ctx.patched("late"),
        lambda: ctx.set_attributes(late=True),
        lambda: ctx.set_progress("late"),
    ]
    try:
        handle.get()
    except BaseException as suspension:
        for call in calls:
            with pytest.raises(type(suspension)):
                call()
    return "swallowed"


@pytest.mark.parametrize(
    "body",
    [
        in_finally,
        in_with,
        in_broad_except,
        returning_a_value,
        raising_another,
        misspelling_it,
        raising_no_exception,
        using_everything,
    ],
)
def test_nothing_that_a_suspended_function_does_has_any_effect(past: Past, host: FakeHost, body: Any) -> None:
    decision = past.decide(lambda ctx: body(ctx, host))
    assert asks(decision) == ["step work"]
    assert waits_for(decision) == [0]
    assert (decision.withdrawals, decision.attributes, decision.progress) == ((), {}, None)
    assert host.performed == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["live", "suspended"])
def test_an_interrupted_process_decides_nothing(
    past: Past, host: FakeHost, interrupt: type[BaseException], when: str
) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            if when == "suspended":
                ctx.run(host.tasks["work"].s())
        finally:
            raise interrupt

    with pytest.raises(interrupt):
        past.decide(workflow)


# --- divergence -------------------------------------------------------------------------------------------------------


def diverged(decision: Decision) -> Diverged:
    assert isinstance(decision.ending, Diverged), decision.ending
    assert (decision.records, decision.withdrawals) == ((), ())
    return decision.ending


def test_another_name_is_divergence(past: Past, host: FakeHost) -> None:
    ending = diverged(past.asked("charge").decide(lambda ctx: ctx.run(host.tasks["reserve"].s())))
    assert (ending.seq, ending.recorded, ending.requested) == (0, "step charge", "step reserve")


def test_another_kind_is_divergence(past: Past) -> None:
    ending = diverged(past.timer().decide(lambda ctx: ctx.patched("x") or ctx.local(read_rate)))
    assert (ending.recorded, ending.requested) == ("timer timer", "local read_rate")


def test_another_scope_is_divergence(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        with ctx.saga():
            ctx.run(host.tasks["work"].s())

    ending = diverged(past.asked("work").decide(workflow))
    assert (ending.recorded, ending.requested) == ("step work", "step work in scope 1.")


def test_undoing_another_step_is_divergence(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.run(host.tasks["work"].s())
        ctx.run(host.tasks["work"].s())
        raise ValueError

    past.asked("work", compensation=plan("undo")).succeeded(0)
    past.asked("work", compensation=plan("undo")).succeeded(1)
    ending = diverged(past.undoing(0, "undo").decide(workflow))
    assert (ending.recorded, ending.requested) == (
        "compensation undo undoing step 0",
        "compensation undo undoing step 1",
    )


@pytest.mark.parametrize("ends", ["returning", "raising", "waiting"])
def test_asking_for_less_than_history_holds_is_divergence(past: Past, host: FakeHost, ends: str) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["work"].s())
        if ends == "raising":
            raise ValueError
        if ends == "waiting":
            ctx.run(host.tasks["mail"].s())

    past.asked("work").succeeded(0)
    if ends == "waiting":
        past.asked("mail")
    ending = diverged(past.asked("charge").decide(workflow))
    assert (ending.recorded, ending.requested) == ("step charge", "nothing more")


def test_waiting_past_the_point_where_history_asked_is_divergence(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.gather(host.tasks["work"].s(), host.tasks["work"].s())

    past.asked("work").asked("work").succeeded(0).asked("charge").succeeded(2)
    ending = diverged(past.decide(workflow))
    assert (ending.seq, ending.recorded) == (2, "step charge")


def test_divergence_names_the_record_that_should_have_come_next(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.gather(host.tasks["work"].s(), host.tasks["work"].s())

    past.asked("work").asked("work").succeeded(0).asked("charge").asked("ship").succeeded(3)
    ending = diverged(past.decide(workflow))
    assert (ending.seq, ending.recorded) == (2, "step charge")


def test_user_code_never_sees_divergence_and_nothing_is_undone(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.run(host.tasks["charge"].s())
            try:
                ctx.run(host.tasks["ship"].s())
            except BaseException:
                ctx.run(host.tasks["mail"].s())
        return "done"

    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0).asked("work", scope="1.")
    assert diverged(past.decide(workflow)).seq == 1


# --- programming errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [NameError, AttributeError, TypeError, ImportError, ModuleNotFoundError, RecursionError, MemoryError]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_programming_error_blocks_and_undoes_nothing(
    past: Past, host: FakeHost, error: type[Exception], nested: bool
) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s())
        if not nested:
            raise error("typo")
        try:
            with ctx.saga():
                ctx.run(host.tasks["charge"].s())
                ctx.start(host.tasks["mail"].s())
                raise error("typo")
        except BaseException:
            ctx.run(host.tasks["ship"].s())

    past.asked("reserve", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(1) if nested else None
    decision = past.decide(workflow)
    assert isinstance(decision.ending, Broken)
    assert (decision.ending.failure.type, decision.ending.failure.message) == (f"builtins.{error.__name__}", "typo")
    # not even what was asked for before the typo is written: mended code may never ask for it
    assert (decision.records, decision.withdrawals) == ((), ())


def test_a_step_that_raised_a_type_error_is_a_failure_like_any_other(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.run(host.tasks["charge"].s())
            ctx.run(host.tasks["ship"].s())

    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0)
    past.asked("ship", scope="1.").failed(1, TypeError)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]
    past.undoing(0, "refund", scope="1.").succeeded(2)
    assert "TypeError" in failure_of(past.decide(workflow)).failure.type


def test_a_result_that_cannot_be_encoded_blocks(past: Past) -> None:
    assert isinstance(past.decide(lambda _ctx: object()).ending, Broken)


def test_what_could_not_be_undone_is_known_to_a_pass_that_breaks(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            with ctx.saga():
                ctx.run(host.tasks["charge"].s())
                raise ValueError
        except errors.CompensationFailed:
            misspelt()

    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0)
    past.undoing(0, "refund", scope="1.").failed(1)
    decision = past.decide(workflow)
    assert isinstance(decision.ending, Broken)
    assert [entry.undoes for entry in decision.not_undone] == [0]


def test_waiting_knows_whether_the_root_scope_is_being_undone(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["charge"].s())
        raise ValueError

    past.asked("charge", compensation=plan("refund"))
    ending = past.decide(workflow).ending
    assert isinstance(ending, Waiting)
    assert not ending.is_compensating
    ending = past.succeeded(0).decide(workflow).ending
    assert isinstance(ending, Waiting)
    assert ending.is_compensating
