"""What the clock brings: timers, timeouts, expiry, publications, and giving up on them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import RetryPolicy
from orchestrator.core.context import Context
from orchestrator.core.records import Failure, Kind, Outcome, State
from orchestrator.store import due, instances
from orchestrator.store.due import DueRecord
from orchestrator.store.instances import Status

from .world import BEGINNING, FAILS, World, step, succeeds

Worlds = Callable[..., World]


def one_step(ctx: Context, **options: Any) -> Any:
    return ctx.run(step("charge"), **options)


def list_due(world: World) -> list[DueRecord]:
    with world.store.read("due") as connection:
        return due.list_due_records(connection, world.clock(), 100)


def find_next(world: World) -> Any:
    with world.store.read("due") as connection:
        return due.find_next_due(connection)


# --- timers (test_timers.py has how they fire) -------------------------------------------------------------------


def never_waited_for(ctx: Context) -> None:
    ctx.timer(60)
    ctx.run(step("charge"), compensate=False)
    ctx.timer(60)


@pytest.mark.parametrize("ended", [succeeds(), FAILS], ids=["ends-well", "fails"])
def test_a_timer_that_nobody_waited_for_is_not_due_after_the_end(world: Worlds, ended: Any) -> None:
    started = world(nap=never_waited_for)
    started.start("nap")
    started.run(0 if started.row(0).name == "charge" else 1, ended)
    assert started.instance.status.is_final
    assert {row.due_at for row in started.rows()} == {None}
    assert {row.outcome for row in started.rows() if row.kind is Kind.TIMER} == {Outcome.WITHDRAWN}


# --- timeouts -----------------------------------------------------------------------------------------------------


def test_a_step_that_timed_out_before_it_began_never_begins(world: Worlds) -> None:
    started = world(pay=lambda ctx: one_step(ctx, timeout=60, compensate=step("refund")))
    started.start("pay")
    started.clock.advance(60)
    started.time_out(0)
    assert started.row(0).outcome is Outcome.WITHDRAWN
    assert started.claim(0, dispatch=1) is None
    started.advance()
    assert (started.status(), len(started.rows())) == (Status.FAILED, 1)


def catches_timeout(ctx: Context) -> str:
    try:
        ctx.run(step("charge"), timeout=60, compensate=step("refund"))
    except TimeoutError as error:
        ctx.accept(error)  # type: ignore[arg-type]
        return "gave up"
    return "paid"


def test_a_step_that_timed_out_while_it_ran_keeps_its_claim(world: Worlds) -> None:
    started = world(pay=lambda ctx: one_step(ctx, timeout=60, compensate=step("refund")))
    started.start("pay")
    running = started.take(0)
    started.clock.advance(60)
    started.time_out(0)
    row = started.row(0)
    assert (row.state, row.outcome, row.claim_incarnation) == (State.TIMED_OUT, Outcome.UNKNOWN, "worker-1")
    assert (row.is_timed_out, row.due_at, list_due(started)) == (True, None, [])
    started.advance()
    # it may still take effect: nothing is undone before it has ended
    assert (started.status(), len(started.rows())) == (Status.COMPENSATING, 1)
    started.clock.advance(5)
    assert started.end(running, succeeds("c-1"))
    row = started.row(0)
    assert (row.state, row.outcome, row.late_outcome, row.late_result) == (
        State.SETTLED,
        Outcome.UNKNOWN,
        Outcome.SUCCEEDED,
        '"c-1"',
    )
    assert (row.late_order, row.late_at) == (2, started.clock())
    undoing = started.run(1, succeeds())
    assert undoing.arguments == '{"args":["c-1"],"kwargs":{}}'
    assert started.status() is Status.COMPENSATED


@pytest.mark.parametrize(
    ("end", "late", "is_undone"),
    [("succeeds", Outcome.SUCCEEDED, True), ("fails", Outcome.FAILED, True), ("is lost", Outcome.UNKNOWN, True)],
    ids=["succeeds", "fails", "lost"],
)
def test_what_a_late_attempt_came_to_is_kept_beside_the_outcome(
    world: Worlds, end: str, late: Outcome, is_undone: bool
) -> None:
    started = world(pay=lambda ctx: one_step(ctx, timeout=60, compensate=step("refund")))
    started.start("pay")
    running = started.take(0)
    started.clock.advance(60)
    started.time_out(0)
    started.advance()
    if end == "is lost":
        started.lose(running)
        started.advance()
    else:
        started.end(running, succeeds() if end == "succeeds" else FAILS)
    assert (started.row(0).outcome, started.row(0).late_outcome) == (Outcome.UNKNOWN, late)
    assert [row.name for row in started.rows()] == ["charge", "refund"]


def test_a_late_outcome_is_nobodys_concern_where_the_workflow_took_the_doubt_on(world: Worlds) -> None:
    started = world(pay=catches_timeout)
    started.start("pay")
    running = started.take(0)
    started.clock.advance(60)
    started.time_out(0)
    started.advance()
    assert started.instance.result == '"gave up"'
    assert started.end(running, succeeds("c-1"))
    assert (started.row(0).late_outcome, started.instance.status) == (Outcome.SUCCEEDED, Status.COMPLETED)


def test_a_timeout_counts_from_the_first_dispatch_through_all_retries(world: Worlds) -> None:
    retry = RetryPolicy(jitter=0, initial_interval=timedelta(seconds=50))
    started = world(pay=lambda ctx: one_step(ctx, timeout=60, retry=retry))
    started.start("pay")
    started.clock.advance(30)
    started.run(0, FAILS)
    assert started.row(0).due_at == BEGINNING + timedelta(seconds=60)
    started.clock.advance(30)
    started.time_out(0)
    # an attempt was made, and it is known to have failed
    assert started.row(0).outcome is Outcome.FAILED


def test_an_expired_step_is_withdrawn_and_one_that_began_in_time_is_not(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        steps = [step("work", number, expires=60) for number in range(2)]
        return ctx.gather(*steps, return_exceptions=True) and None

    started = world(fan=workflow)
    started.start("fan")
    running = started.take(0)
    started.clock.advance(60)
    for seq in (0, 1):
        started.time_out(seq)
    assert started.states() == ["work running", "work withdrawn"]
    assert started.end(running, succeeds())
    assert started.status() is Status.COMPLETED


# --- publications -------------------------------------------------------------------------------------------------


def test_what_was_published_is_due_again_after_the_grace(world: Worlds) -> None:
    started = world(pay=one_step)
    started.start("pay")
    grace = timedelta(seconds=started.settings.publish_grace)
    assert (started.row(0).publications, started.row(0).due_at) == (1, BEGINNING + grace)
    assert find_next(started) == BEGINNING + grace
    started.take(0)
    assert find_next(started) is None


def test_a_countdown_holds_the_first_publication_back(world: Worlds) -> None:
    started = world(pay=lambda ctx: ctx.run(step("charge", countdown=90), timeout=60))
    started.start("pay")
    row = started.row(0)
    assert (started.published, row.publications, row.dispatched_at) == ([], 0, None)
    assert (row.due_at, row.timeout_at) == (BEGINNING + timedelta(seconds=90), BEGINNING + timedelta(seconds=150))


def test_an_eta_holds_a_maps_item_back_also_when_it_is_let_go_later(world: Worlds) -> None:
    eta = BEGINNING + timedelta(hours=2)

    def workflow(ctx: Context) -> None:
        ctx.map(step("work", eta=eta), range(2), concurrency=1)

    started = world(map=workflow)
    started.start("map")
    assert started.row(0).due_at == eta
    started.run(0, succeeds())
    assert (started.row(1).state, started.row(1).due_at, started.published) == (State.SCHEDULED, eta, [])


def test_one_poller_takes_a_publication_on(world: Worlds) -> None:
    started = world(pay=one_step)
    started.start("pay")
    row, later = started.row(0), BEGINNING + timedelta(hours=1)
    taken = []
    for _ in range(2):
        with started.store.begin("publish") as connection:
            taken.append(due.postpone_publication(connection, row, later, later, BEGINNING))
    assert taken == [True, False]
    assert (started.row(0).publications, started.row(0).due_at) == (2, later)
    started.take(0)
    with started.store.begin("publish") as connection:
        assert not due.postpone_publication(connection, started.row(0), later, later, BEGINNING)


@pytest.mark.parametrize("countdown", [None, 10], ids=["at-once", "later"])
def test_a_foreign_step_that_was_published_is_due_at_its_timeout_only(world: Worlds, countdown: int | None) -> None:
    signature = step("charge", countdown=countdown) if countdown else step("charge")
    started = world(pay=lambda ctx: ctx.run(signature, foreign=True, timeout=3600))
    started.start("pay")
    started.clock.advance(countdown or 0)
    if countdown is not None:
        later = started.clock() + timedelta(seconds=30)
        with started.store.begin("publish") as connection:
            assert due.postpone_publication(connection, started.row(0), later, later, started.clock())
    assert (started.row(0).publications, started.row(0).due_at) == (1, started.row(0).timeout_at)
    started.clock.advance(3600)
    started.time_out(0)
    # nobody claims it, so nobody will tell whether it is still running anywhere
    assert (started.row(0).state, started.row(0).outcome) == (State.SETTLED, Outcome.UNKNOWN)


def test_a_step_that_was_published_in_vain_is_unknown(world: Worlds) -> None:
    started = world(pay=lambda ctx: one_step(ctx, compensate=step("refund")))
    started.start("pay")
    row = started.row(0)
    started.publish(started.coordinator.give_up_publishing(row, Failure("orchestrator.errors.NeverClaimed", (), "no")))
    assert (started.row(0).outcome, started.passes_owed) == (Outcome.UNKNOWN, 1)
    assert started.claim(0, dispatch=1) is None


def test_a_step_that_was_claimed_meanwhile_is_not_given_up(world: Worlds) -> None:
    started = world(pay=one_step)
    started.start("pay")
    row = started.row(0)
    started.take(0)
    started.publish(started.coordinator.give_up_publishing(row, Failure("orchestrator.errors.NeverClaimed", (), "no")))
    assert started.row(0).state is State.RUNNING


def test_a_step_that_no_worker_knows_is_passed_on_and_then_withdrawn(world: Worlds) -> None:
    started = world(pay=lambda ctx: one_step(ctx, compensate=step("refund")))
    started.start("pay")
    key = started.row(0).key
    for publications in range(1, started.settings.max_publications + 1):
        assert started.row(0).publications == publications
        started.publish(started.coordinator.pass_on(key, 1))
        row = started.row(0)
        if row.state is State.SCHEDULED:
            assert row.due_at is not None
            later = row.due_at + timedelta(seconds=30)
            with started.store.begin("publish") as connection:
                assert due.postpone_publication(connection, row, later, later, started.clock())
    assert started.row(0).outcome is Outcome.WITHDRAWN
    started.advance()
    assert started.status() is Status.FAILED


def test_an_owed_pass_is_taken_on_by_one_poller(world: Worlds) -> None:
    recorded = world(pay=one_step)
    recorded.record("pay")
    with recorded.store.read("owed") as connection:
        [owed] = instances.list_owed_passes(connection, recorded.clock(), 10)
    later, taken = recorded.clock() + timedelta(seconds=30), []
    for _ in range(2):
        with recorded.store.begin("publish") as connection:
            taken.append(instances.postpone_pass(connection, owed, later))
    assert taken == [True, False]
    assert (find_next(recorded), recorded.instance.pass_publications) == (later, 1)


def test_what_an_ending_owes_is_paid_once_at_a_time(world: Worlds) -> None:
    started = world(pay=one_step)
    started.start("pay")
    started.run(0, succeeds())
    started.clock.advance(60)
    with started.store.read("due") as connection:
        [(instance_id, generation, attempts, due_at)] = instances.list_due_finishes(connection, started.clock(), 10)
    assert (instance_id, generation, attempts) == ("order-1", started.generation, 0)
    later, taken = started.clock() + timedelta(seconds=30), []
    for _ in range(2):
        with started.store.begin("finish") as connection:
            taken.append(instances.postpone_finish(connection, instance_id, generation, due_at, later))
    assert taken == [True, False]
    with started.store.begin("finish") as connection:
        instances.delete_finish(connection, instance_id, "0" * 16)
    assert find_next(started) == later
    with started.store.begin("finish") as connection:
        instances.delete_finish(connection, instance_id, generation)
    assert find_next(started) is None
