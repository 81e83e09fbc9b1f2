"""A step that is not the last one waited for: one less to wait for, and nothing is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import exc

from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State
from orchestrator.runtime.counting import count_off
from orchestrator.store import counting
from orchestrator.store.instances import Status
from orchestrator.store.prepared import may_run_alone

from .locks import before_commit, before_statement, lose_answer
from .world import FAILS, World, at_once, step, succeeds

Worlds = Callable[..., World]


def gather(ctx: Context, width: int) -> Any:
    return ctx.gather(*(step("work", number) for number in range(width)))


def fanned_out(world: Worlds, width: int = 3) -> World:
    started = world(fan=gather)
    started.start("fan", width)
    return started


def count(started: World, seq: int, value: object = None) -> bool:
    """Take a step and count it off, and do nothing else where that cannot be done."""
    return count_off(started.coordinator, started.take(seq), succeeds(value)) is not None


def test_all_but_the_last_are_counted_off_in_the_order_in_which_they_end(world: Worlds) -> None:
    started = fanned_out(world)
    version = started.instance.version
    assert [count(started, seq, seq) for seq in (2, 0)] == [True, True]
    assert (started.instance.waiting, started.instance.version) == (1, version + 2)
    assert [row.settled_order for row in started.rows()] == [2, None, 1]
    assert [row.state for row in started.rows()] == [State.SETTLED, State.SCHEDULED, State.SETTLED]
    row = started.take(1)
    assert count_off(started.coordinator, row, succeeds(1)) is None
    assert started.end(row, succeeds(1))
    assert (started.status(), started.result()) == (Status.COMPLETED, [0, 1, 2])
    assert len(started.workflows.passes) == 2


def test_it_reads_nothing(world: Worlds) -> None:
    started = fanned_out(world)
    executed: list[str] = []
    row = started.take(0)
    held = started.held(row)
    before_statement(started.store, executed.append)
    started.coordinator.end_attempt(row.key, row.attempt, succeeds(0), held=held)
    read = [sql for sql in executed if sql.lstrip().startswith("SELECT")]
    assert len(read) == (1 if started.store.backend == "mysql" else 0), read  # which has no RETURNING
    assert started.row(0).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
def test_on_postgresql_it_is_one_statement(world: Worlds) -> None:
    started = fanned_out(world)
    with started.store.begin("look", locks_late=True) as connection:
        assert may_run_alone(connection)
    assert count(started, 0)
    assert started.instance.waiting == 2


def test_its_instants_never_go_back(world: Worlds) -> None:
    started = fanned_out(world)
    started.clock.advance(60)
    assert count(started, 0)
    started.clock.advance(-30)
    assert count(started, 1)
    first, second = started.row(0), started.row(1)
    assert second.settled_at == first.settled_at == started.instance.last_at


def test_an_attempt_that_was_given_up_counts_nothing_off(world: Worlds) -> None:
    started = fanned_out(world)
    first = started.take(0)
    started.lose(first)
    started.take(0)
    assert count_off(started.coordinator, first, succeeds(0)) is None
    assert (started.instance.waiting, started.row(0).state) == (3, State.RUNNING)
    assert not started.end(first, succeeds(0))


def test_nothing_is_counted_off_another_wait(world: Worlds) -> None:
    def waits(ctx: Context) -> Any:
        slow, *others = [ctx.start(step("work", number)) for number in range(4)]
        ctx.wait(slow, *others, count=4, timeout=60)
        return [*ctx.gather(*others), slow.get()]

    started = world(fan=waits)
    started.start("fan")
    slow = started.take(0)
    started.clock.advance(60)
    started.fire_timers()
    started.go_on()
    assert started.instance.waiting == 3
    assert count_off(started.coordinator, slow, succeeds(0)) is None
    assert started.end(slow, succeeds(0))
    assert started.instance.waiting == 3
    for seq in (1, 2, 3):
        started.run(seq, succeeds(seq))
    assert (started.status(), started.result()) == (Status.COMPLETED, [1, 2, 3, 0])


def test_a_failure_is_counted_by_a_change(world: Worlds) -> None:
    started = fanned_out(world)
    assert count(started, 0)
    assert started.end(started.take(1), FAILS)
    assert (started.row(1).outcome, started.instance.waiting) == (Outcome.FAILED, 1)


def test_a_step_past_its_timeout_is_not_counted_off(world: Worlds) -> None:
    def waits(ctx: Context) -> Any:
        ctx.gather(*(ctx.start(step("work"), timeout=60) for _ in range(3)), return_exceptions=True)

    started = world(fan=waits)
    started.start("fan")
    late = started.take(0)
    started.clock.advance(60)
    started.time_out(0)
    assert count_off(started.coordinator, late, succeeds(0)) is None
    assert started.end(late, succeeds(0))
    assert (started.row(0).late_outcome, started.instance.waiting) == (Outcome.SUCCEEDED, 2)


def test_the_next_item_of_a_map_is_let_go(world: Worlds) -> None:
    started = world(fan=lambda ctx: ctx.map(step("work"), range(4), concurrency=2))
    started.start("fan")
    assert not count(started, 0)
    assert started.end(started.row(0), succeeds(0))
    assert started.row(2).state is State.SCHEDULED


def test_one_whose_answer_was_lost_is_known_for_its_own(world: Worlds) -> None:
    started = fanned_out(world)
    lose_answer(started.store, exc.OperationalError("COMMIT", {}, ConnectionError("lost")), "settle")
    assert count(started, 0)
    assert (started.instance.waiting, started.row(0).outcome, started.row(0).strays) == (2, Outcome.SUCCEEDED, None)


def test_one_that_was_rolled_back_by_the_database_is_made_by_a_change(world: Worlds) -> None:
    started = fanned_out(world)

    def fail() -> None:
        raise exc.OperationalError("COMMIT", {}, ConnectionError("deadlock"))

    before_statement(started.store, lambda _statement: None)  # of two statements, which are not committed yet
    before_commit(started.store, fail, "settle")
    row = started.take(0)
    assert started.end(row, succeeds(0))
    assert (started.instance.waiting, started.row(0).outcome) == (2, Outcome.SUCCEEDED)


def test_an_error_of_its_own_is_logged_and_fails_no_step(
    world: Worlds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = fanned_out(world)
    monkeypatch.setattr(counting, "count_off", lambda *_args, **_options: 1 // 0)
    row = started.take(0)
    held = started.held(row)
    was_held, _ = started.coordinator.end_attempt(row.key, row.attempt, succeeds(0), held=held)
    assert was_held
    assert (started.instance.waiting, started.row(0).outcome) == (2, Outcome.SUCCEEDED)
    assert "step 0 could not be counted off" in caplog.text


def test_many_that_end_at_once_are_all_counted_and_one_pass_follows(world: Worlds) -> None:
    started = fanned_out(world, width=24)
    rows = [started.take(seq) for seq in range(24)]
    assert at_once(*(lambda row=row: started.end(row, succeeds(row.seq)) for row in rows)) == [True] * 24
    assert (started.status(), started.result()) == (Status.COMPLETED, list(range(24)))
    assert sorted(row.settled_order or 0 for row in started.rows()) == list(range(1, 25))
