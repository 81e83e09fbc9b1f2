"""Timers: they fire in order, once, in batches, and what is waited for is counted as if they fired one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select

from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State
from orchestrator.runtime.timers import Timers, fire_timers
from orchestrator.store import due, history, instances, timers
from orchestrator.store.engine import Conflict, Store
from orchestrator.store.instances import Status
from orchestrator.store.tables import history as history_table
from orchestrator.store.tables import instance as instance_table

from .crowds import multiply
from .locks import engine_of
from .processes import fork, wait_for
from .world import BEGINNING, World, at_once, step, succeeds

Worlds = Callable[..., World]


def nap(ctx: Context) -> None:
    ctx.sleep(60)


def all_of(*durations: float) -> Callable[[Context], None]:
    """Wait for timers of all these durations."""

    def workflow(ctx: Context) -> None:
        ctx.gather(*(ctx.timer(duration) for duration in durations))

    return workflow


def set_instance(world: World, instance_id: str, **values: Any) -> None:
    with world.store.begin("test") as connection:
        connection.execute(instance_table.update().where(instance_table.c.id == instance_id), values)


def count_fired(world: World) -> dict[str, int]:
    """Return how many orders each instance has given away, as ``id: orders``."""
    with world.store.read("look") as connection:
        rows = connection.execute(select(instance_table.c.id, instance_table.c.next_order))
        return {row[0]: row[1] - 1 for row in rows}


def before_locks(store: Store, function: Callable[[], object]) -> None:
    """Call ``function`` once, after the due timers were found and before their instances are locked."""
    pending = [function]

    def executes(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        asks = "BEGIN IMMEDIATE" if store.is_sqlite else "SKIP LOCKED"
        if pending and asks in statement:
            pending.pop()()

    event.listen(engine_of(store), "before_cursor_execute", executes)


# --- when, and in which order -------------------------------------------------------------------------------------


def test_a_timer_fires_when_it_is_due_and_not_before(world: Worlds) -> None:
    started = world(nap=nap)
    started.start("nap")
    started.clock.advance(59.999999)
    started.fire_timers()
    assert (started.row(0).state, started.instance.version) == (State.SCHEDULED, 2)
    started.clock.advance(0.000001)
    started.fire_timers()
    row = started.row(0)
    assert (row.state, row.outcome, row.due_at) == (State.SETTLED, Outcome.SUCCEEDED, None)
    assert (row.settled_order, row.settled_at) == (1, started.clock())
    # the poller runs no workflow code
    assert (started.status(), started.passes_owed, started.instance.pass_publications) == (Status.RUNNING, 1, 1)
    assert started.instance.pass_due_at == started.clock() + timedelta(seconds=started.settings.publish_grace)
    assert (started.instance.last_at, started.instance.version) == (started.clock(), 3)
    started.advance()
    assert started.status() is Status.COMPLETED


def test_a_timer_fires_once(world: Worlds) -> None:
    started = world(nap=lambda ctx: (ctx.sleep(60), ctx.sleep(60)))
    started.start("nap")
    started.clock.advance(60)
    for _ in range(2):
        started.fire_timers()
    assert started.passes_owed == 1
    started.advance()
    assert started.row(1).due_at == started.clock() + timedelta(seconds=60)


def test_timers_are_not_among_what_is_due_one_by_one(world: Worlds) -> None:
    started = world(nap=nap)
    started.start("nap")
    started.clock.advance(60)
    with started.store.read("due") as connection:
        assert due.list_due_records(connection, started.clock(), 10) == []
        assert due.find_next_due(connection) == started.clock()
    started.time_out(0)
    assert started.row(0).state is State.SCHEDULED


@pytest.mark.parametrize("batch", [2, 500])
def test_timers_fire_in_the_order_in_which_they_are_due(
    world: Worlds, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.runtime.timers.BATCH", batch)
    started = world(fan=all_of(30, 10, 20, 10, 90, 10))
    started.start("fan")
    started.clock.advance(60)
    started.fire_timers()
    assert [row.settled_order for row in started.rows()] == [5, 1, 4, 2, None, 3]
    assert (started.instance.next_order, started.instance.waiting, started.passes_owed) == (6, 1, 0)


def test_nothing_is_settled_before_what_was_settled_last(world: Worlds) -> None:
    started = world(nap=nap)
    started.start("nap")
    started.clock.advance(60)
    later = started.clock() + timedelta(seconds=5)  # another machine's clock is ahead
    set_instance(started, "order-1", last_at=later)
    started.fire_timers()
    assert (started.row(0).settled_at, started.instance.last_at) == (later, later)


@pytest.mark.parametrize("count", [3, 25], ids=["row-by-row", "set-based"])
def test_instances_that_differ_fire_each_for_itself(world: Worlds, count: int) -> None:
    started = world(fan=all_of(20, 10))
    started.start("fan")
    names = multiply(started.store, "order-1", count)
    set_instance(started, names[1], next_order=8)
    set_instance(started, names[2], last_at=BEGINNING + timedelta(hours=1))
    started.clock.advance(60)
    started.fire_timers()
    assert count_fired(started) == {name: 9 if name == names[1] else 2 for name in names}
    assert started.passes_owed == count
    for name, orders in ((names[0], [2, 1]), (names[1], [9, 8])):
        started.instance_id = name
        assert [row.settled_order for row in started.rows()] == orders
    started.instance_id = names[2]
    assert {row.settled_at for row in started.rows()} == {BEGINNING + timedelta(hours=1)}


# --- counting -----------------------------------------------------------------------------------------------------


def test_the_last_of_a_gather_owes_the_pass(world: Worlds) -> None:
    started = world(fan=all_of(10, 20, 30))
    started.start("fan")
    for seconds, waiting in ((20, 1), (10, 0)):
        started.clock.advance(seconds)
        assert started.instance.pass_due_at is None
        started.fire_timers()
        assert started.instance.waiting == waiting
    assert started.passes_owed == 1
    started.advance()
    assert started.status() is Status.COMPLETED


def test_a_timeout_ends_a_wait_by_itself(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        timers = [ctx.timer(60) for _ in range(5)]
        done, pending = ctx.wait(*timers, count=5, timeout=60)
        return [len(done), len(pending)]

    started = world(wait=workflow)
    started.start("wait")
    set_due(started, 5, seconds=59)
    started.clock.advance(60)
    started.fire_timers()
    # the others fire with it: they are outcomes of their own, and count for nothing any more
    assert [row.settled_order for row in started.rows()] == [2, 3, 4, 5, 6, 1]
    assert (started.instance.waiting, started.passes_owed) == (0, 1)
    started.advance()
    assert started.instance.result == "[0,5]"


def set_due(world: World, seq: int, *, seconds: float) -> None:
    with world.store.begin("test") as connection:
        history.note_on_row(connection, world.row(seq), {"due_at": BEGINNING + timedelta(seconds=seconds)})


def test_what_nobody_waits_for_yet_is_counted_by_nobody(world: Worlds) -> None:
    def workflow(ctx: Context) -> None:
        timers = [ctx.timer(60), ctx.timer(60)]
        ctx.run(step("work"))
        ctx.gather(*timers)

    started = world(work=workflow)
    started.start("work")
    started.clock.advance(60)
    started.fire_timers()
    assert (started.instance.waiting, started.passes_owed) == (1, 0)
    started.run(2, succeeds())
    assert started.status() is Status.COMPLETED


# --- instances that make no passes --------------------------------------------------------------------------------


def test_a_blocked_instance_is_counted_down_and_owes_no_pass(world: Worlds) -> None:
    started = world(nap=nap)
    started.start("nap")
    set_instance(started, "order-1", status=Status.BLOCKED)
    started.clock.advance(60)
    started.fire_timers()
    assert (started.row(0).outcome, started.instance.waiting) == (Outcome.SUCCEEDED, 0)
    assert (started.passes_owed, started.instance.pass_due_at) == (0, None)


@pytest.mark.parametrize("over", [{"status": Status.TERMINATED}, {"run": 1}], ids=["ended", "another-run"])
def test_a_timer_that_outlived_its_run_is_withdrawn(world: Worlds, over: dict[str, Any]) -> None:
    started = world(nap=nap)
    started.start("nap")
    set_instance(started, "order-1", **over)
    before = started.instance
    started.clock.advance(60)
    started.fire_timers()
    row = started.row(0)
    assert (row.state, row.outcome, row.settled_order, row.due_at) == (State.SETTLED, Outcome.WITHDRAWN, None, None)
    after = started.instance
    assert (after.next_order, after.last_at, after.waiting) == (before.next_order, before.last_at, before.waiting)
    assert (after.version, started.passes_owed) == (before.version + 1, 0)


# --- against others -----------------------------------------------------------------------------------------------


def test_a_locked_instance_is_left_for_later_and_keeps_nobody_waiting(
    world: Worlds, store_url: str, open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.runtime.timers.BATCH", 2)
    started = world(fan=all_of(*[10] * 5))
    if started.store.is_sqlite:
        pytest.skip("SQLite has no locks of rows: who writes keeps all others out")
    started.start("fan")
    multiply(started.store, "order-1", 3)
    started.clock.advance(60)
    with open_store(store_url).begin("hold") as connection:
        assert instances.lock_instance(connection, "order-1") is not None
        started.fire_timers()
        assert count_fired(started) == {"order-1": 0, "order-1-1": 5, "order-1-2": 5}
    started.fire_timers()
    assert count_fired(started) == {"order-1": 5, "order-1-1": 5, "order-1-2": 5}


def test_a_timer_that_was_withdrawn_before_its_lock_is_left_alone(world: Worlds) -> None:
    def workflow(ctx: Context) -> None:
        ctx.wait(step("work"), timeout=60)
        ctx.run(step("charge"))

    started = world(work=workflow)
    started.start("work")
    running = started.take(0)
    started.clock.advance(60)
    before_locks(started.store, lambda: started.end(running, succeeds()))
    started.fire_timers()
    assert started.states() == ["work succeeded", "timer withdrawn", "charge scheduled"]
    assert (started.instance.next_order, started.passes_owed) == (2, 0)


def test_what_another_poller_fired_before_the_lock_is_left_alone(
    world: Worlds, store_url: str, open_store: Callable[..., Store]
) -> None:
    started = world(fan=all_of(10, 10))
    started.start("fan")
    started.clock.advance(60)
    other = Timers(started.coordinator_of("worker-1", open_store(store_url)))
    before_locks(started.store, other.fire)
    started.fire_timers()
    assert [row.settled_order for row in started.rows()] == [1, 2]
    # the other one publishes it
    assert (started.passes_owed, other.has_unpublished) == (0, True)


def test_a_timer_that_changed_under_the_lock_is_tried_again(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    started = world(nap=nap)
    started.start("nap")
    started.clock.advance(60)
    update_instances, tries = timers.update_instances, []

    def conflicts_once(*arguments: Any) -> None:
        tries.append(arguments)
        if len(tries) == 1:
            raise Conflict
        update_instances(*arguments)

    monkeypatch.setattr(timers, "update_instances", conflicts_once)
    started.fire_timers()
    assert (len(tries), started.row(0).settled_order, started.instance.next_order) == (2, 1, 2)


@pytest.mark.parametrize("count", [1, 25], ids=["row-by-row", "set-based"])
def test_what_is_not_as_it_was_read_is_not_written(world: Worlds, count: int) -> None:
    started = world(nap=nap)
    started.start("nap")
    names = multiply(started.store, "order-1", count)
    started.clock.advance(60)
    with started.store.read("look") as connection:
        locked = {each.id: each for each in instances.list_instances(connection).instances}
        rows = timers.list_due_timers(connection, names, started.clock(), count)
    fired = [fire_timers(locked[row.instance_id], [row], started.clock(), started.clock()) for row in rows]
    with started.store.begin("test") as connection:
        history.note_on_row(connection, rows[-1], {"dispatch": 2})
    with pytest.raises(Conflict), started.store.begin("fire-timers") as connection:
        timers.settle_timers(connection, fired)
    assert set(count_fired(started).values()) == {0}


def fire_until_none_is_due(firing: Timers) -> int:
    """Poll as a worker does; return how many passes this poller was left to publish."""
    published: list[str] = []
    while True:
        firing.fire()
        firing.publish(lambda instance_id, *_: published.append(instance_id), 60.0)
        with firing.store.read("look") as connection:
            is_due = select(history_table.c.seq).where(history_table.c.due_at.is_not(None)).limit(1)
            if connection.execute(is_due).first() is None:
                return len(published)


@pytest.mark.parametrize("others", ["threads", "processes"])
def test_pollers_at_once_fire_each_timer_once(
    world: Worlds, store_url: str, open_store: Callable[..., Store], others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.runtime.timers.BATCH", 20)
    started = world(fan=all_of(10, 20, 10))
    started.start("fan")
    names = multiply(started.store, "order-1", 150)
    started.clock.advance(60)
    started.store.dispose()  # a fork carries no connection over

    def poll() -> int:
        return fire_until_none_is_due(Timers(started.coordinator_of("worker-1", open_store(store_url))))

    if others == "threads":
        assert sum(at_once(poll, poll, poll)) == len(names)
    else:
        assert [wait_for(child) for child in [fork(poll) for _ in range(3)]] == [0, 0, 0]
    assert count_fired(started) == dict.fromkeys(names, 3)
    with started.store.read("look") as connection:
        for name in names:
            rows = history.load_rows(connection, name, 0)
            assert [row.settled_order for row in rows] == [1, 3, 2]
            found = instances.find_instance(connection, name)
            assert found is not None
            assert (found.waiting, found.pass_publications, found.pass_due_at is None) == (0, 1, False)


def test_timers_and_settling_steps_do_not_stop_each_other(
    world: Worlds, store_url: str, open_store: Callable[..., Store]
) -> None:
    """Both count the same wait down, under the same lock: one of them makes the pass or owes it."""

    def workflow(ctx: Context) -> None:
        ctx.gather(step("work"), *(ctx.timer(60) for _ in range(3)))

    started = world(both=workflow)
    started.start("both")
    names = multiply(started.store, "order-1", 12)
    started.clock.advance(60)
    firing = Timers(started.coordinator_of("worker-1", open_store(store_url)))
    stop = threading.Event()

    def fire() -> None:
        while not stop.is_set():
            firing.fire()

    def settle() -> None:
        try:
            for name in names:
                started.instance_id = name
                started.run(3, succeeds())  # begun by gather, after the timers
        finally:
            stop.set()

    at_once(fire, settle)
    firing.fire()
    for name in names:
        started.instance_id = name
        assert sorted(row.settled_order or 0 for row in started.rows()) == [1, 2, 3, 4]
        if started.instance.pass_due_at is not None:
            started.advance()
        assert started.status() is Status.COMPLETED


# --- publishing ---------------------------------------------------------------------------------------------------


def unpublished(world: Worlds, count: int) -> tuple[World, Timers]:
    started = world(nap=nap)
    started.start("nap")
    multiply(started.store, "order-1", count)
    started.clock.advance(60)
    firing = Timers(started.coordinator)
    firing.fire()
    return started, firing


def test_publishing_gives_up_its_turn_and_goes_on_in_the_next(world: Worlds) -> None:
    _, firing = unpublished(world, 3)
    published: list[str] = []
    firing.publish(lambda instance_id, *_: published.append(instance_id), 0.0)
    assert (published, firing.has_unpublished) == ([], True)
    firing.publish(lambda instance_id, *_: published.append(instance_id), 60.0)
    assert (sorted(published), firing.has_unpublished) == (["order-1", "order-1-1", "order-1-2"], False)


def test_passes_that_could_not_be_published_are_owed_still(world: Worlds) -> None:
    started, firing = unpublished(world, 3)

    def refuse(*_arguments: Any) -> None:
        raise OSError

    with pytest.raises(OSError):
        firing.publish(refuse, 60.0)
    assert not firing.has_unpublished
    started.clock.advance(started.settings.publish_grace)
    with started.store.read("owed") as connection:
        assert len(instances.list_owed_passes(connection, started.clock(), 10)) == 3
