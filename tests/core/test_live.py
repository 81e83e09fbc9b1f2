"""A live pass: a workflow function that stands where it waits (that it decides as ``decide()`` does: ``twin.py``)."""

from __future__ import annotations

import decimal
import gc
import json
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from greenlet import getcurrent, greenlet

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.live import CannotGoOn, LivePass
from orchestrator.core.records import (
    Broken,
    Completed,
    Decision,
    Diverged,
    Event,
    Kind,
    Outcome,
    Record,
    Settled,
    StartChild,
    State,
    UndoRequested,
    Waiting,
)
from orchestrator.core.replay import decide

from .driver import STARTED_AT
from .host import FakeHost
from .past import Past, Workflow, asks, failure_of, result_of, waits_for


@dataclass
class Standing:
    """A live pass over a past, which is written as the pass decides."""

    past: Past
    workflow: Workflow
    live: LivePass = field(init=False)
    known: list[Record] = field(default_factory=list)
    given: int = 0

    def __post_init__(self) -> None:
        self.live = LivePass(self.workflow, (), {}, self.past.history(), self.past.host)

    def begin(self) -> Decision:
        self._look()
        return self._write(self.live.decide())

    def go_on(self) -> Decision:
        changed = [r for i, r in enumerate(self.past.records) if i >= len(self.known) or self.known[i] != r]
        events = self.past.inbox[self.given :]
        self._look()
        return self._write(self.live.go_on(changed, events, passed_order=self.past.seen_order))

    def succeed(self, seq: int, result: Any = None) -> Decision:
        self.past.succeeded(seq, result)
        return self.go_on()

    def _look(self) -> None:
        self.known, self.given = list(self.past.records), len(self.past.inbox)

    def _write(self, decision: Decision) -> Decision:
        self.past.seen_order = len(self.past.inbox)
        for new in decision.records:
            command = new.command
            self.past.asked(
                command.name,
                command.kind,
                scope=command.scope,
                after_order=new.after_order,
                undoes=command.undoes,
                outcome=new.outcome,
                result=new.result,
                failure=new.failure,
                state=State.SCHEDULED if new.outcome is None else State.SETTLED,
                compensation=getattr(command, "compensation", None),
                child_id=command.child_id if isinstance(command, StartChild) else None,
            )
        return decision


def standing(past: Past, workflow: Workflow) -> Standing:
    """Return a live pass that has begun and waits."""
    one = Standing(past, workflow)
    one.begin()
    assert one.live.is_waiting
    return one


def work(ctx: Context, host: FakeHost, *args: Any) -> Any:
    return ctx.run(host.tasks["work"].s(*args))


# --- going on -----------------------------------------------------------------------------------------------------


def test_it_decides_first_as_decide_does_and_then_goes_on(past: Past, host: FakeHost) -> None:
    calls: list[int] = []

    def workflow(ctx: Context) -> Any:
        calls.append(1)
        return [work(ctx, host, number) for number in range(3)]

    one = Standing(past, workflow)
    first = one.begin()
    assert first == decide(workflow, (), {}, Past(host).history(), host)
    assert one.live.is_waiting
    calls.clear()
    assert asks(one.succeed(0, "a")) == ["step work"]
    assert waits_for(one.succeed(1, "b")) == [2]
    assert result_of(one.succeed(2, "c")) == ["a", "b", "c"]
    assert not one.live.is_waiting
    assert calls == []


def test_it_costs_what_is_new(past: Past, host: FakeHost) -> None:
    decoded: list[str] = []
    decode = host.decode

    def counting(payload: str, name: str, returns: object) -> Any:
        decoded.append(payload)
        return decode(payload, name, returns)

    host.decode = counting  # type: ignore[method-assign]
    one = standing(past, lambda ctx: [work(ctx, host) for _ in range(300)])
    for seq in range(300):
        decision = one.succeed(seq, seq)
        assert decoded == [str(seq)]
        decoded.clear()
    assert result_of(decision) == list(range(300))


def test_it_may_begin_at_any_point_of_a_history(past: Past, host: FakeHost) -> None:
    past.asked("work").succeeded(0, 1).asked("work")
    one = standing(past, lambda ctx: [work(ctx, host), work(ctx, host)])
    assert result_of(one.succeed(1, 2)) == [1, 2]


def test_several_events_are_taken_in_by_one_pass(past: Past, host: FakeHost) -> None:
    one = standing(past, lambda ctx: [ctx.gather(*[host.tasks["work"].s()] * 3), work(ctx, host)])
    past.succeeded(2, "c").succeeded(0, "a").succeeded(1, "b")
    assert asks(one.go_on()) == ["step work"]
    assert result_of(one.succeed(3, "d")) == [["a", "b", "c"], "d"]


def test_it_goes_on_over_what_another_process_has_decided(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        results = [work(ctx, host), ctx.run(host.tasks["deliver"].s())]
        ctx.sleep_until(STARTED_AT)
        ctx.logger.info(f"replaying: {ctx.is_replaying}")
        return [*results, work(ctx, host)]

    one = standing(past, workflow)
    past.succeeded(0, 1).child("deliver").succeeded(1, 2)
    past.timer(outcome=Outcome.SUCCEEDED, state=State.SETTLED).asked("work")
    past.seen_order = 2
    assert asks(one.go_on()) == []
    assert host.log.lines == []
    assert result_of(one.succeed(3, 3)) == [1, 2, 3]


def test_what_was_recorded_as_a_child_elsewhere_is_one_from_then_on(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return [ctx.run(host.tasks["mail"].s()), ctx.start(host.tasks["mail"].s()).get()]

    one = standing(past.child("mail"), workflow)
    assert asks(one.succeed(0)) == ["child mail"]
    other = Past(host)
    two = standing(other, lambda ctx: [work(ctx, host), *workflow(ctx)])
    other.succeeded(0).child("mail").succeeded(1)
    assert asks(two.go_on()) == ["child mail"]


def test_an_error_that_is_being_handled_is_the_same_after_the_wait(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            raise KeyError("first")
        except KeyError:
            work(ctx, host)
            raise

    one = standing(past, workflow)
    try:
        raise ValueError("of the caller")
    except ValueError:
        decision = one.succeed(0)
    assert failure_of(decision).failure.type == "builtins.KeyError"


def test_an_error_of_the_caller_is_no_context_of_what_the_function_raises(past: Past, host: FakeHost) -> None:
    raised: list[BaseException] = []

    def workflow(ctx: Context) -> Any:
        work(ctx, host)
        raised.append(RuntimeError())
        raise raised[0]

    one = standing(past, workflow)
    try:
        raise ValueError("of the caller")
    except ValueError:
        one.succeed(0)
    assert raised[0].__context__ is None


def test_it_may_wait_in_any_depth_of_calls(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return sorted([3, 1, 2], key=lambda number: (work(ctx, host, number), number))

    one = standing(past, workflow)
    one.succeed(0, 5)
    one.succeed(1, 5)
    assert result_of(one.succeed(2, 1)) == [2, 1, 3]


def test_what_it_has_decided_does_not_change_later(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        for number in range(3):
            ctx.set_attributes(number=number)
            work(ctx, host)

    one = Standing(past, workflow)
    first = one.begin()
    second = one.succeed(0)
    assert (first.attributes, second.attributes) == ({"number": 0}, {"number": 1})
    assert [len(first.records), len(second.records)] == [1, 1]


def test_it_stops_for_good_where_history_is_another_one(past: Past, host: FakeHost) -> None:
    ended: list[str] = []

    def workflow(ctx: Context) -> Any:
        try:
            work(ctx, host)
            work(ctx, host)
        finally:
            ended.append("ended")

    one = standing(past, workflow)
    past.succeeded(0).asked("mail")
    assert one.go_on().ending == Diverged(1, "step mail", "step work")
    assert (one.live.is_waiting, ended) == (False, ["ended"])
    two = standing(Past(host), workflow)
    two.past.succeeded(0).asked("work").asked("mail")
    assert two.go_on().ending == Diverged(2, "step mail", "nothing more")
    assert (two.live.is_waiting, ended) == (False, ["ended"] * 2)


def test_a_mistake_of_the_code_breaks_the_pass_off(past: Past, host: FakeHost) -> None:
    one = standing(past, lambda ctx: work(ctx, host).nothing)
    assert isinstance(one.succeed(0, 1).ending, Broken)
    assert not one.live.is_waiting


# --- letting go ---------------------------------------------------------------------------------------------------


def in_finally(ctx: Context, host: FakeHost, log: list[str]) -> None:
    try:
        work(ctx, host)
    finally:
        log.append("ended")


def calling_in_finally(ctx: Context, host: FakeHost, log: list[str]) -> None:
    try:
        work(ctx, host)
    finally:
        log.append("ended")
        ctx.run(host.tasks["mail"].s())
        log.append("never")


def in_with(ctx: Context, host: FakeHost, log: list[str]) -> None:
    with ctx.saga():
        in_finally(ctx, host, log)


def in_broad_except(ctx: Context, host: FakeHost, log: list[str]) -> None:
    try:
        work(ctx, host)
    except BaseException:
        log.append("ended")
        ctx.logger.info("never")
    for _ in range(3):
        try:
            ctx.run(host.tasks["mail"].s())
            log.append("never")
        except BaseException:
            ctx.logger.info("never")


def returning_in_finally(ctx: Context, host: FakeHost, log: list[str]) -> Any:
    try:
        work(ctx, host)
    finally:
        log.append("ended")
        return 7  # noqa: B012


def raising_in_finally(error: BaseException) -> Callable[[Context, FakeHost, list[str]], None]:
    def workflow(ctx: Context, host: FakeHost, log: list[str]) -> None:
        try:
            work(ctx, host)
        finally:
            log.append("ended")
            raise error

    return workflow


def while_undoing(ctx: Context, host: FakeHost, log: list[str]) -> None:
    try:
        with ctx.saga():
            ctx.compensate(host.tasks["undo"].s())
            raise KeyError
    finally:
        log.append("ended")


WAYS = {
    "finally": in_finally,
    "a call in finally": calling_in_finally,
    "with": in_with,
    "broad except": in_broad_except,
    "return in finally": returning_in_finally,
    "error in finally": raising_in_finally(ValueError()),
    "exit in finally": raising_in_finally(SystemExit(1)),
    "interrupt in finally": raising_in_finally(KeyboardInterrupt()),
    "generator exit in finally": raising_in_finally(GeneratorExit()),
    "undoing": while_undoing,
}


@pytest.mark.parametrize("way", WAYS)
def test_letting_go_ends_the_function_and_nothing_comes_of_it(past: Past, host: FakeHost, way: str) -> None:
    log: list[str] = []
    one = standing(past, lambda ctx: WAYS[way](ctx, host, log))
    assert log == []
    before = len(past.records)
    one.live.let_go()
    assert log == ["ended"]
    assert not one.live.is_waiting
    assert (host.log.lines, len(past.records)) == ([], before)
    one.live.let_go()
    assert log == ["ended"]
    past.succeeded(before - 1)
    with pytest.raises(CannotGoOn):
        one.go_on()


@pytest.mark.parametrize("way", ["finally", "a call in finally", "with", "broad except", "undoing"])
def test_blocks_around_a_wait_run_once_when_it_goes_on(past: Past, host: FakeHost, way: str) -> None:
    log: list[str] = []

    def workflow(ctx: Context) -> Any:
        return WAYS[way](ctx, host, log)

    one = standing(past, workflow)
    decision = one.succeed(len(past.records) - 1)
    while isinstance(decision.ending, Waiting):
        decision = one.succeed(len(past.records) - 1)
    seen = list(log)
    log.clear()
    assert past.decide(workflow).ending == decision.ending
    assert seen == log


def test_one_that_has_ended_or_has_not_begun_has_nothing_to_let_go(past: Past, host: FakeHost) -> None:
    one = Standing(past, lambda ctx: work(ctx, host))
    one.live.let_go()
    one.begin()
    assert isinstance(one.succeed(0).ending, Completed)
    one.live.let_go()


def test_one_that_is_forgotten_runs_nothing_behind_anybody_s_back(past: Past, host: FakeHost) -> None:
    log: list[str] = []
    one = standing(past, lambda ctx: in_finally(ctx, host, log))
    del one
    gc.collect()
    assert log == []


@pytest.mark.parametrize("ends", [True, False])
def test_one_that_has_ended_or_was_let_go_is_garbage(past: Past, host: FakeHost, ends: bool) -> None:
    class Held: ...

    refs: list[weakref.ref[Held]] = []

    def workflow(ctx: Context) -> None:
        held = Held()
        refs.append(weakref.ref(held))
        work(ctx, host)

    one = standing(past, workflow)
    assert refs[0]() is not None
    if ends:
        one.succeed(0)
    else:
        one.live.let_go()
    del one
    gc.collect()
    assert refs[0]() is None


# --- what is none of ours -----------------------------------------------------------------------------------------


class Interrupted(BaseException): ...


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Interrupted(), GeneratorExit()])
@pytest.mark.parametrize("late", [False, True])
def test_an_interruption_comes_out_where_it_was_made_to_go_on(
    past: Past, host: FakeHost, error: BaseException, late: bool
) -> None:
    def workflow(ctx: Context) -> Any:
        if late:
            work(ctx, host)
        raise error

    one = Standing(past, workflow)
    if late:
        one.begin()
        past.succeeded(0)
    here = getcurrent()
    with pytest.raises(type(error)) as caught:
        one.go_on() if late else one.begin()
    assert caught.value is error
    assert getcurrent() is here
    assert not one.live.is_waiting
    one.live.let_go()
    with pytest.raises(CannotGoOn):
        one.go_on()


def test_an_interruption_in_a_host_that_the_function_swallows_is_the_callers_affair(past: Past, host: FakeHost) -> None:
    def interrupted(_name: str) -> None:
        raise Interrupted

    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["mail"].s())
        except Interrupted:
            work(ctx, host)

    one = Standing(past, workflow)
    host.check_known = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted):
        one.begin()
    assert not one.live.is_waiting


# --- context variables --------------------------------------------------------------------------------------------

request: ContextVar[str] = ContextVar("request")
locale: ContextVar[str] = ContextVar("locale", default="en")


def called_with(value: str | None, call: Callable[[], Any]) -> Any:
    """Make a call in a context of its own, in which ``request`` is ``value``, or not set at all."""

    def run() -> Any:
        if value is not None:
            request.set(value)
        return call()

    return copy_context().run(run)


def test_what_the_caller_has_set_is_seen_whenever_it_goes_on(past: Past, host: FakeHost) -> None:
    seen: list[str] = []

    def workflow(ctx: Context) -> None:
        for _ in range(4):
            seen.append(request.get("none"))
            work(ctx, host)

    one = Standing(past, workflow)
    called_with("first", one.begin)
    for seq, value in enumerate(("second", None, "fourth")):
        past.succeeded(seq)
        called_with(value, one.go_on)
    assert seen == ["first", "second", "none", "fourth"]


def test_what_the_function_has_set_stays_and_is_not_seen_outside(past: Past, host: FakeHost) -> None:
    seen: list[Any] = []

    def workflow(ctx: Context) -> None:
        token = locale.set("fr")
        request.set("mine")
        with decimal.localcontext() as precise:
            precise.prec = 3
            work(ctx, host)
            seen.extend([locale.get(), request.get(), str(decimal.Decimal(1) / 3)])
        work(ctx, host)
        locale.reset(token)
        seen.extend([locale.get(), str(decimal.Decimal(1) / 4)])

    one = Standing(past, workflow)
    called_with("theirs", one.begin)
    assert (locale.get(), request.get("none"), decimal.getcontext().prec) == ("en", "none", 28)
    past.succeeded(0)
    called_with("theirs", one.go_on)
    one.succeed(1)
    assert seen == ["fr", "mine", "0.333", "en", "0.25"]
    assert (locale.get(), request.get("none")) == ("en", "none")


def test_what_the_caller_sets_anew_goes_before_what_the_function_has_set(past: Past, host: FakeHost) -> None:
    seen: list[str] = []

    def workflow(ctx: Context) -> None:
        request.set("mine")
        work(ctx, host)
        seen.append(request.get())

    one = Standing(past, workflow)
    called_with("first", one.begin)
    past.succeeded(0)
    called_with("second", one.go_on)
    assert seen == ["second"]


def test_what_it_lets_go_of_ends_as_the_last_caller_had_it(past: Past, host: FakeHost) -> None:
    seen: list[str] = []

    def workflow(ctx: Context) -> None:
        try:
            work(ctx, host)
        finally:
            seen.append(request.get())

    one = Standing(past, workflow)
    called_with("in a pass", one.begin)
    called_with("cleaning up", one.live.let_go)
    assert seen == ["in a pass"]


# --- threads and greenlets ----------------------------------------------------------------------------------------


def in_thread(call: Callable[[], Any]) -> list[Any]:
    came: list[Any] = []

    def run() -> None:
        try:
            came.append(call())
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return came


def test_it_goes_on_only_in_its_own_thread(past: Past, host: FakeHost) -> None:
    log: list[str] = []
    one = standing(past, lambda ctx: in_finally(ctx, host, log))
    past.succeeded(0)
    (error,) = in_thread(lambda: one.live.go_on(past.records, past.inbox, passed_order=0))
    assert isinstance(error, CannotGoOn)
    assert "another thread" in str(error)
    assert in_thread(one.live.let_go) == [None]
    assert (log, one.live.is_waiting) == ([], True)
    assert isinstance(one.go_on().ending, Completed)


def test_it_belongs_to_the_thread_in_which_it_began(past: Past, host: FakeHost) -> None:
    one = Standing(past, lambda ctx: work(ctx, host))
    in_thread(one.begin)
    past.succeeded(0)
    with pytest.raises(CannotGoOn, match="another thread"):
        one.go_on()
    one.live.let_go()


def test_another_greenlet_of_the_thread_may_go_on_with_it(past: Past, host: FakeHost) -> None:
    one = Standing(past, lambda ctx: [work(ctx, host), work(ctx, host)])
    came: list[Decision] = []
    greenlet(lambda: came.append(one.begin())).switch()
    past.succeeded(0)
    greenlet(lambda: came.append(one.go_on())).switch()
    assert [asks(decision) for decision in came] == [["step work"], ["step work"]]
    assert isinstance(one.succeed(1).ending, Completed)


def test_a_wait_in_a_greenlet_that_the_function_has_made_ends_the_pass_as_ever(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return greenlet(lambda: work(ctx, host)).switch()

    one = Standing(past, workflow)
    assert waits_for(one.begin()) == [0]
    assert not one.live.is_waiting


def test_one_may_be_made_inside_another(past: Past, host: FakeHost) -> None:
    other = Past(host)
    inner = Standing(other, lambda ctx: work(ctx, host))

    def workflow(ctx: Context) -> Any:
        return [work(ctx, host), ctx.local(lambda: waits_for(inner.begin()))]

    one = standing(past, workflow)
    assert result_of(one.succeed(0, 1)) == [1, [0]]
    assert isinstance(inner.succeed(0).ending, Completed)


def test_many_may_stand_at_a_time(host: FakeHost) -> None:
    many = [standing(Past(host), lambda ctx: [work(ctx, host), work(ctx, host)]) for _ in range(200)]
    for one in many:
        one.succeed(0, 1)
    for one in reversed(many):
        assert result_of(one.succeed(1, 2)) == [1, 2]


def test_a_recursion_that_is_too_deep_is_that_of_the_function(past: Past, host: FakeHost) -> None:
    def endless(depth: int) -> int:
        return endless(depth + 1) + 1

    def workflow(ctx: Context) -> Any:
        work(ctx, host)
        return endless(0)

    one = standing(past, workflow)
    assert isinstance(one.succeed(0).ending, Broken)


# --- when it cannot go on -----------------------------------------------------------------------------------------


def two_steps(ctx: Context, host: FakeHost) -> Any:
    first = ctx.start(host.tasks["work"].s())
    ctx.local(int)
    return [first.get(), ctx.run(host.tasks["mail"].s())]


def record(seq: int, name: str = "work", **fields: Any) -> Record:
    fields.setdefault("kind", Kind.LOCAL if seq == 1 else Kind.STEP)
    if seq == 1:
        fields = {"outcome": Outcome.SUCCEEDED, "result": "0", "state": State.SETTLED, **fields}
        name = "int"
    return Record(seq, name=name, scope="", **fields)


DONE = record(0, state=State.SETTLED, outcome=Outcome.SUCCEEDED, result="1")
SETTLED = Settled(1, STARTED_AT, 0)

BAD_NEWS: dict[str, tuple[list[Record], list[Event], str]] = {
    "not written": ([DONE], [SETTLED], "record 1 was settled by its last decision"),
    "nothing written": ([], [SETTLED], "was settled by its last decision"),
    "another record": ([replace(DONE, name="mail"), record(1)], [SETTLED], "not what it has asked for"),
    "another scope": ([replace(DONE, scope="1."), record(1)], [SETTLED], "not what it has asked for"),
    "asked for later": ([replace(DONE, after_order=1), record(1)], [SETTLED], "not what it has asked for"),
    "another result": ([DONE, record(1, result="7")], [SETTLED], "another result"),
    "another outcome": ([DONE, record(1, outcome=Outcome.FAILED)], [SETTLED], "another outcome"),
    "a gap": ([DONE, record(1), record(3)], [SETTLED], "record 2 has not come in"),
    "no outcome": ([record(0), record(1)], [SETTLED], "whose outcome has not come in"),
    "nothing known of it": ([DONE, record(1)], [SETTLED, Settled(2, STARTED_AT, 9)], "whose outcome has not come in"),
    "out of order": ([DONE, record(1)], [SETTLED, SETTLED], "comes after 1"),
    "an undo": ([DONE, record(1)], [SETTLED, UndoRequested(2, STARTED_AT)], "it has completed elsewhere"),
}


@pytest.mark.parametrize("way", BAD_NEWS)
def test_it_does_not_go_on_with_what_does_not_follow(past: Past, host: FakeHost, way: str) -> None:
    changed, events, message = BAD_NEWS[way]
    ended: list[str] = []

    def workflow(ctx: Context) -> Any:
        try:
            return two_steps(ctx, host)
        finally:
            ended.append("ended")

    live = LivePass(workflow, (), {}, past.history(), host)
    assert asks(live.decide()) == ["step work", "local int"]
    with pytest.raises(CannotGoOn, match=message):
        live.go_on(changed, events, passed_order=0)
    assert (live.is_waiting, ended) == (False, ["ended"])


def test_it_goes_on_with_what_does_follow(past: Past, host: FakeHost) -> None:
    live = LivePass(lambda ctx: two_steps(ctx, host), (), {}, past.history(), host)
    live.decide()
    assert asks(live.go_on([DONE, record(1)], [SETTLED], passed_order=0)) == ["step mail"]
    # the same once more does no harm, nor does what has not changed
    again = replace(record(2, "mail"), after_order=1)
    assert waits_for(live.go_on([DONE, record(1), again], [], passed_order=1)) == [2]
    done = replace(again, state=State.SETTLED, outcome=Outcome.SUCCEEDED, result="2")
    assert result_of(live.go_on([again, done], [Settled(2, STARTED_AT, 2)], passed_order=1)) == [1, 2]


def test_it_begins_once(past: Past, host: FakeHost) -> None:
    one = standing(past, lambda ctx: work(ctx, host))
    with pytest.raises(CannotGoOn, match="begun already"):
        one.live.decide()
    assert isinstance(one.succeed(0).ending, Completed)


def test_one_that_has_completed_and_is_undone_does_not_stand(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.compensate(host.tasks["undo"].s())

    assert isinstance(Standing(past, workflow).begin().ending, Completed)
    one = Standing(past.undo(), workflow)
    assert asks(one.begin()) == ["compensation undo of 0"]
    assert not one.live.is_waiting


def test_a_withdrawal_of_its_own_may_come_in_again(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        held, slow = ctx.start(host.tasks["mail"].s()), ctx.start(host.tasks["work"].s())
        try:
            ctx.sleep(5)
        except errors.WorkflowCancelled:
            held.cancel()
            return [slow.get(), ctx.now().isoformat()]

    one = standing(past, workflow)
    past.running(1).cancel()
    decision = one.go_on()
    (timer, step) = decision.withdrawals
    assert (timer.seq, timer.event, step.seq) == (2, None, 0)
    past.stopped(2).change(0, state=State.SETTLED, outcome=Outcome.WITHDRAWN)
    assert step.event is not None
    past.inbox.append(step.event)
    last = one.succeed(1, 7)
    assert result_of(last) == json.loads(past.decide(workflow).ending.result)  # type: ignore[union-attr]


def test_the_context_of_a_pass_is_no_use_once_it_was_let_go(past: Past, host: FakeHost) -> None:
    contexts: list[Context] = []

    def workflow(ctx: Context) -> Any:
        contexts.append(ctx)
        work(ctx, host)

    one = standing(past, workflow)
    one.live.let_go()
    with pytest.raises(BaseException) as caught:
        contexts[0].now()
    assert type(caught.value).__name__ == "Suspension"
