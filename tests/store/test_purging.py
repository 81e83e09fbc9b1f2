"""Purging: what goes, what stays, and what late messages of a purged instance find."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection, func, insert, select, update

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Kind, State
from orchestrator.runtime import retention
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.retention import BATCH, BATCH_RECORDS, Retention
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.starter import IfPurged, NewInstance, Purged, Starter
from orchestrator.store import claiming, due, history, instances, purging, tables
from orchestrator.store.claiming import Claimant
from orchestrator.store.engine import Store
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Parent, Status
from orchestrator.store.purging import Criteria

from .locks import before_commit, before_statement
from .test_compensations import failed_refund, operator_of
from .world import BEGINNING, FAILS, LOST, World, at_once, join, step, succeeds

Worlds = Callable[..., World]

BELONGINGS = (tables.history, tables.attribute, tables.message, tables.subscription, tables.finish, tables.run)
FINAL = [status for status in Status if status.is_final]
NOW = BEGINNING + timedelta(days=30)
ANY = Criteria(NOW, tuple(FINAL))
REUSED = NewInstance("order-1", "g2", "one", None, "{}", "{}")


def insert_ended(
    connection: Connection,
    instance_id: str,
    *,
    days_ago: float = 10,
    status: Status = Status.COMPLETED,
    parent: tuple[str, str] | None = None,
    records: int = 1,
    **values: Any,
) -> None:
    """Insert an instance that has ended, with records, and nothing owed."""
    ended_at = NOW - timedelta(days=days_ago)
    assert instances.insert_instance(
        connection,
        instance_id=instance_id,
        generation="g1",
        workflow="checkout",
        queue=None,
        arguments="{}",
        request=None,
        now=ended_at,
        pass_due_at=ended_at,
        parent=Parent(*parent, 0, 0, parent[0]) if parent else None,
        values={"status": status, "ended_at": ended_at, "pass_due_at": None, **values},
    )
    history.insert_rows(connection, [record(instance_id, seq) for seq in range(records)])


def record(instance_id: str, seq: int, **values: Any) -> dict[str, Any]:
    own = {"instance_id": instance_id, "generation": "g1", "run": 0, "seq": seq}
    command = {"kind": Kind.STEP, "name": "work", "scope": "", "after_order": 0, "scheduled_at": BEGINNING}
    return {**own, **command, "state": State.SETTLED, **values}


def add_ended(store: Store, *instance_ids: str, **values: Any) -> None:
    with store.begin("test") as connection:
        for instance_id in instance_ids:
            insert_ended(connection, instance_id, **values)


def purge(store: Store, older_than: Any = timedelta(days=1), statuses: Any = None) -> int:
    return purge_as_counted(retention_of(store), older_than, statuses)


def retention_of(store: Store) -> Retention:
    return Retention(store, Settings(), lambda: NOW)


def purge_as_counted(retention: Retention, older_than: Any, statuses: Any) -> int:
    """Purge, and see that it deletes as many as it was said that it would."""
    counted = retention.count(older_than, statuses)
    assert retention.purge(older_than, statuses) == counted
    return counted


def ids(store: Store) -> set[str]:
    with store.read("look") as connection:
        return set(connection.execute(select(tables.instance.c.id)).scalars())


def count_rows(store: Store, table: Any, instance_id: str) -> int:
    own = select(func.count()).select_from(table).where(table.c.instance_id == instance_id)
    with store.read("look") as connection:
        return int(connection.execute(own).scalar_one())


def ended(world: World) -> None:
    """Say that what follows the end of the instance has been told."""
    with world.store.begin("finished") as connection:
        instances.delete_finish(connection, world.instance_id, world.generation)


def purge_world(world: World) -> int:
    world.clock.advance(1)
    return purge_as_counted(Retention(world.store, world.settings, world.clock), timedelta(0), None)


def one(ctx: Context) -> Any:
    return ctx.run(step("work"))


# --- what goes ----------------------------------------------------------------------------------------------------


def add_belongings(connection: Connection, own: str) -> None:
    """Give an instance what instances have, of two runs; nothing is owed."""
    history.insert_rows(connection, [record(own, 0), {**record(own, 0), "run": 1}, record(own, -1)])
    instances.set_attributes(connection, own, {"customer": "ada", "city": "London"})
    run = {"instance_id": own, "generation": "g1", "run": 0, "input": "{}"}
    connection.execute(insert(tables.run), {**run, "started_at": BEGINNING, "ended_at": BEGINNING})
    subscription = {"instance_id": own, "generation": "g1", "channel": "news", "mode": "all", "created_at": BEGINNING}
    connection.execute(insert(tables.subscription), subscription)
    message = {"address": own, "instance_id": own, "generation": "g1", "kind": "message", "channel": "news"}
    unread = [{**message, "message_id": each, "sent_at": BEGINNING, "attempts": 0} for each in ("m-1", None)]
    connection.execute(insert(tables.message), unread)


def test_an_instance_goes_with_all_that_belongs_to_it_and_no_other(store: Store) -> None:
    with store.begin("test") as connection:
        for own, status in (("order-1", Status.COMPLETED), ("Order-1", Status.RUNNING), ("order-12", Status.BLOCKED)):
            insert_ended(connection, own, status=status, records=0)
            add_belongings(connection, own)
    owed = [table for table in BELONGINGS if table is not tables.finish]
    before = [count_rows(store, table, "Order-1") for table in owed]
    assert all(before)
    assert purge(store) == 1
    assert ids(store) == {"Order-1", "order-12"}
    assert [count_rows(store, table, "order-1") for table in BELONGINGS] == [0] * len(BELONGINGS)
    assert [count_rows(store, table, "Order-1") for table in owed] == before
    assert [count_rows(store, table, "order-12") for table in owed] == before


@pytest.mark.parametrize(
    ("older_than", "left"),
    [
        (timedelta(days=10), {"5", "10"}),
        (timedelta(days=9, hours=23), {"5"}),
        (timedelta(0), set()),
        (timedelta.max, {"5", "10", "20"}),
        (NOW - timedelta(days=10), {"5", "10"}),
        ((NOW - timedelta(days=10)).astimezone(timezone(timedelta(hours=9))), {"5", "10"}),
        (datetime(1, 1, 1, tzinfo=UTC), {"5", "10", "20"}),
        (NOW + timedelta(days=1), set()),
    ],
)
def test_an_instance_goes_by_when_it_ended(store: Store, older_than: Any, left: set[str]) -> None:
    for days in (5, 10, 20):
        add_ended(store, str(days), days_ago=days)
    assert purge(store, older_than) == 3 - len(left)
    assert ids(store) == left


def test_no_instance_goes_that_has_not_ended(store: Store) -> None:
    for status in Status:
        add_ended(store, status, status=status)  # one that was turned to again keeps the instant of its end
    assert purge(store) == len(FINAL)
    assert ids(store) == set(Status) - set(FINAL)


@pytest.mark.parametrize("statuses", ["COMPLETED", ["COMPLETED"], (Status.COMPLETED,)])
def test_only_the_statuses_named_go(store: Store, statuses: Any) -> None:
    for status in FINAL:
        add_ended(store, status, status=status)
    assert purge(store, statuses=statuses) == 1
    assert ids(store) == set(FINAL) - {"COMPLETED"}
    assert purge(store, statuses=[]) == 0


@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "COMPENSATING", "BLOCKED", "ENDED", "completed"])
def test_other_statuses_are_refused(store: Store, status: str) -> None:
    add_ended(store, "order-1")
    with pytest.raises(errors.InvalidOperation, match=status):
        purge(store, statuses=["COMPLETED", status])
    assert ids(store) == {"order-1"}


@pytest.mark.parametrize("older_than", [timedelta(seconds=-1), 3600, "90 days", None, NOW.date()])
def test_an_age_that_is_none_is_refused(store: Store, older_than: Any) -> None:
    with pytest.raises(errors.InvalidOperation, match="older_than"):
        purge(store, older_than)


def test_a_datetime_without_a_time_zone_is_refused(store: Store) -> None:
    with pytest.raises(errors.NaiveDatetime, match="older_than"):
        purge(store, NOW.replace(tzinfo=None))


# --- what stays ---------------------------------------------------------------------------------------------------


def test_an_instance_stays_until_its_callbacks_have_been_told(world: Worlds) -> None:
    started = world(one=one)
    started.start("one")
    started.run(0, succeeds())
    assert started.status() is Status.COMPLETED
    assert purge_world(started) == 0
    ended(started)
    assert purge_world(started) == 1
    assert ids(started.store) == set()


def test_an_instance_stays_while_an_operator_repairs_it(world: Worlds) -> None:
    started = failed_refund(world)
    ended(started)
    operator_of(started).retry_compensation(started.instance, 3)
    assert purge_world(started) == 0  # published
    row = started.take(-1)
    assert purge_world(started) == 0  # an attempt of it runs
    started.end(row, succeeds())
    assert started.status() is Status.COMPENSATED
    assert purge_world(started) == 1


def test_an_instance_stays_while_an_attempt_of_it_may_be_alive(store: Store) -> None:
    add_ended(store, "stopped", status=Status.TERMINATED)
    add_ended(store, "held", status=Status.TERMINATED)
    with store.begin("test") as connection:
        claimed = {"state": State.TIMED_OUT, "claim_incarnation": "w-1", "claim_process": 1}
        history.insert_rows(connection, [record("stopped", 1, **claimed), record("held", 1, state=State.HELD)])
    assert purge(store) == 1
    assert ids(store) == {"stopped"}
    with store.begin("test") as connection:
        connection.execute(update(tables.history).values(state=State.SETTLED, claim_incarnation=None))
    assert purge(store) == 1


def test_parents_go_first_and_all_their_children_with_them(store: Store) -> None:
    for depth in range(5):  # each ended before its parent
        parent = (f"depth-{depth - 1}", "g1") if depth else None
        add_ended(store, f"depth-{depth}", days_ago=10 + depth, parent=parent)
    assert purge(store) == 5
    assert ids(store) == set()


@pytest.mark.parametrize("status", [Status.RUNNING, Status.BLOCKED, Status.COMPENSATING, Status.PENDING])
def test_no_descendant_of_an_unfinished_instance_goes(store: Store, status: Status) -> None:
    add_ended(store, "root", status=status)
    add_ended(store, "child", parent=("root", "g1"))
    add_ended(store, "grandchild", parent=("child", "g1"))
    assert purge(store) == 0


def test_children_stay_with_a_parent_that_stays(store: Store) -> None:
    add_ended(store, "recent", days_ago=0.5)
    add_ended(store, "failed", status=Status.FAILED)
    add_ended(store, "of-recent", parent=("recent", "g1"))
    add_ended(store, "of-failed", parent=("failed", "g1"))
    assert purge(store, statuses="COMPLETED") == 0


def test_the_parent_of_another_life_keeps_nothing(store: Store) -> None:
    add_ended(store, "root", status=Status.RUNNING)
    add_ended(store, "child", parent=("root", "g0"))
    assert purge(store) == 1


def test_what_could_not_be_undone_does_not_go_by_itself(store: Store) -> None:
    add_ended(store, "failed", status=Status.COMPENSATION_FAILED)
    add_ended(store, "named", not_undone="[]")
    add_ended(store, "completed")
    Retention(store, Settings(retention=timedelta(days=1)), lambda: NOW).purge_expired()
    assert ids(store) == {"failed", "named"}
    assert purge(store) == 2


def test_nothing_goes_by_itself_unless_a_retention_is_set(store: Store) -> None:
    add_ended(store, "completed")
    Retention(store, Settings(), lambda: NOW).purge_expired()
    assert ids(store) == {"completed"}


# --- at the same time ---------------------------------------------------------------------------------------------


def test_an_instance_that_is_turned_to_after_it_was_found_stays(world: Worlds) -> None:
    started = failed_refund(world)
    ended(started)
    criteria = Criteria(started.clock() + timedelta(seconds=1), tuple(FINAL))
    with started.store.read("find") as connection:
        assert set(purging.list_purgeable(connection, criteria, ["order-1"])) == {"order-1"}
    operator_of(started).retry_compensation(started.instance, 3)
    with started.store.begin("purge") as connection:
        assert purging.purge_instances(connection, criteria, ["order-1"], started.clock()) == 0
    assert len(started.rows()) == 6


def test_an_instance_that_somebody_has_locked_is_left_for_later(store: Store) -> None:
    if store.is_sqlite:
        pytest.skip("who writes to SQLite has locked everything")
    add_ended(store, "order-1", "order-2", "order-3")
    with store.begin("repair") as connection:
        instances.lock_instance(connection, "order-2")
        assert retention_of(store).purge(timedelta(days=1), None) == 2
        assert ids(store) == {"order-2"}
    assert purge(store) == 1


def test_of_4_that_purge_at_once_each_counts_its_own(store: Store) -> None:
    add_ended(store, *(f"order-{number}" for number in range(250)))
    purged = at_once(*[lambda: retention_of(store).purge(timedelta(days=1), None)] * 4)
    assert sum(purged) == 250
    assert ids(store) == set()


def test_a_start_message_that_meets_a_purge_under_way_does_not_begin_the_instance_anew(world: Worlds) -> None:
    """The id is free as soon as the purge commits, and the start task waits for just that."""
    started = world(one=one)
    store = started.store
    add_ended(store, "order-1")
    starter = Starter(started.coordinator, None, None, None)  # type: ignore[arg-type]
    came_to: list[object] = []

    def start() -> None:
        try:
            came_to.append(starter._insert(REUSED, IfPurged.REFUSE))
        except Purged as purged:
            came_to.append(type(purged))

    late = threading.Thread(target=start, daemon=True)

    def start_meanwhile() -> None:
        late.start()
        late.join(0.3)
        assert came_to == []

    before_commit(store, start_meanwhile, "purge")
    assert purge(store) == 1
    join([late])
    assert came_to == [Purged]
    assert ids(store) == set()


# --- the id -------------------------------------------------------------------------------------------------------


def test_a_purge_leaves_the_id_behind_until_it_is_used_again(world: Worlds) -> None:
    started = world(one=one)
    starter = Starter(started.coordinator, None, None, None)  # type: ignore[arg-type]

    def start(if_purged: IfPurged) -> bool:
        return starter._insert(REUSED, if_purged)

    def is_purged() -> bool:
        with started.store.read("look") as connection:
            return purging.is_purged(connection, "order-1")

    for _life in range(2):
        assert start(IfPurged.FORGET)
        assert not is_purged()
        with started.store.begin("test") as connection:
            values = {"status": Status.COMPLETED, "ended_at": BEGINNING}
            connection.execute(update(tables.instance).values(**values))
        assert purge(started.store) == 1
        assert is_purged()
        with pytest.raises(Purged):
            start(IfPurged.REFUSE)
        assert ids(started.store) == set()


def test_an_id_that_was_used_again_by_other_means_is_purged_again(store: Store) -> None:
    for _life in range(2):
        add_ended(store, "order-1", "order-2")
        assert purge(store) == 2
    with store.read("look") as connection:
        assert connection.execute(select(func.count()).select_from(tables.purged)).scalar_one() == 2


# --- messages that come late --------------------------------------------------------------------------------------


def two(ctx: Context) -> Any:
    return ctx.gather(step("charge"), step("work"), return_exceptions=True)


def claim(world: World, row: HistoryRow) -> object:
    with world.store.begin("claim") as connection:
        return claiming.claim(connection, row.key, row.name, row.dispatch, Claimant("worker-1", 1), world.clock(), "{}")


def release(world: World, row: HistoryRow) -> object:
    asked = {"celery_retries": 1}
    return world.coordinator.release(row.key, row.attempt, delay_seconds=0, failure=None, values=asked)


def poll_publication(world: World, row: HistoryRow) -> object:
    now = world.clock()
    with world.store.begin("publish") as connection:
        due.take_back_publication(connection, row, now, now)
        return due.postpone_publication(connection, row, now, now, now)


def poll_finish(world: World, row: HistoryRow) -> object:
    now = world.clock()
    with world.store.begin("finish") as connection:
        instances.delete_finish(connection, row.instance_id, row.generation)
        return instances.postpone_finish(connection, row.instance_id, row.generation, now, now)


def poll_pass(world: World, row: HistoryRow) -> object:
    now = world.clock()
    owed = instances.OwedPass(row.instance_id, row.generation, "two", None, now, 1)
    with world.store.begin("publish-pass") as connection:
        instances.take_back_pass(connection, owed, now, now)
        return instances.postpone_pass(connection, owed, now)


#: What is done about a step that was running when its instance was last seen.
LATE: dict[str, Callable[[World, HistoryRow], object]] = {
    "claim": claim,
    "succeeded": lambda world, row: world.coordinator.end_attempt(row.key, row.attempt, succeeds("late")),
    "failed": lambda world, row: world.coordinator.end_attempt(row.key, row.attempt, FAILS),
    "lost": lambda world, row: world.coordinator.end_attempt(row.key, row.attempt, LOST, makes_pass=False),
    "retry": release,
    "foreign": lambda world, row: world.coordinator.end_foreign(row.key, row.dispatch, succeeds("late")),
    "advance": lambda world, row: world.coordinator.advance(row.instance_id, row.generation),
    "time-out": lambda world, row: world.coordinator.time_out(row.key),
    "pass-on": lambda world, row: world.coordinator.pass_on(row.key, row.dispatch),
    "give-up-publishing": lambda world, row: world.coordinator.give_up_publishing(row, FAILS.failure),
    "publication": poll_publication,
    "owed-pass": poll_pass,
    "finish": poll_finish,
}


def dump(store: Store) -> list[list[Any]]:
    with store.read("look") as connection:
        return [
            [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in tables.metadata.sorted_tables
        ]


@pytest.mark.parametrize("is_used_again", [False, True], ids=["purged", "used-again"])
def test_what_comes_late_finds_nothing_of_a_purged_instance(world: Worlds, is_used_again: bool) -> None:
    started = world(two=two)
    started.start("two")
    before = started.row(1)
    running = started.take(0)
    started.end(running, succeeds())
    started.run(1, succeeds())
    ended(started)
    assert purge_world(started) == 1
    if is_used_again:
        started.generation = "0123456789abcdef"
        with started.store.begin("start") as connection:
            purging.forget_purged(connection, "order-1")
        started.start("two")
    kept = dump(started.store)
    for name, come in LATE.items():
        for row in (before, running):
            assert come(started, row) in (None, False, Outbox(), (False, Outbox())), name
            assert dump(started.store) == kept, name
    if is_used_again:
        started.run(0, succeeds())
        started.run(1, succeeds())
        assert started.status() is Status.COMPLETED


def test_a_used_id_finds_nothing_of_its_old_life(world: Worlds) -> None:
    started = world(one=one)
    started.start("one")
    started.run(0, succeeds("old"))
    ended(started)
    old_key = started.row(0).key
    assert purge_world(started) == 1
    started.generation = "0123456789abcdef"
    started.start("one")
    assert [row.state for row in started.rows()] == [State.SCHEDULED]
    assert started.row(0).key.idempotency_key != old_key.idempotency_key
    with started.store.read("look") as connection:
        assert history.find_row(connection, StepKey("order-1", old_key.generation, 0, 0)) is None


# --- in batches ---------------------------------------------------------------------------------------------------


def test_no_transaction_deletes_too_many_instances_or_records(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH_RECORDS", 20)
    with store.begin("test") as connection:
        for number in range(2 * BATCH + 1):
            insert_ended(connection, f"order-{number:04}", records=30 if number == 3 else 5)
    deleted: list[int] = []
    original = purging.purge_instances

    def purge_instances(connection: Connection, criteria: Criteria, batch: list[str], now: datetime) -> int:
        deleted.append(sum(purging.list_purgeable(connection, criteria, batch).values()))
        return original(connection, criteria, batch, now)

    monkeypatch.setattr(purging, "purge_instances", purge_instances)
    assert purge(store) == 2 * BATCH + 1
    assert sorted(set(deleted))[-2:] == [20, 30]  # an instance is not divided
    assert ids(store) == set()


def test_thousands_go_in_seconds_and_others_write_meanwhile(store: Store) -> None:
    count = 2000
    with store.begin("test") as connection:
        for number in range(count):
            insert_ended(connection, f"order-{number:04}", records=3, days_ago=2 + number / count)
    statements: list[str] = []
    before_statement(store, lambda statement: statements.append(statement.split(None, 1)[0].upper()))
    waited: list[float] = []
    is_over = threading.Event()

    def write() -> None:
        for number in range(10_000):
            if is_over.wait(0.01):
                return
            began = time.monotonic()
            add_ended(store, f"recent-{number}", days_ago=0.5, records=0)
            waited.append(time.monotonic() - began)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    began = time.monotonic()
    assert purge(store) == count
    seconds = time.monotonic() - began
    is_over.set()
    join([writer])
    assert seconds < 60
    assert statements.count("DELETE") < count  # not one by one
    assert len(waited) >= 3, "nobody else could write"
    assert max(waited) < 10


def test_a_turn_of_the_poller_is_bounded_and_the_next_one_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "TURN_SECONDS", 1e-9)  # one page
    add_ended(store, *(f"order-{number}" for number in range(BATCH + 50)))
    by_itself = Retention(store, Settings(retention=timedelta(days=1)), lambda: NOW)
    by_itself.purge_expired()
    assert len(ids(store)) == 50
    by_itself.purge_expired()
    assert ids(store) == set()
    add_ended(store, "later")
    by_itself.purge_expired()
    assert ids(store) == {"later"}  # it looks once a minute


def test_an_instance_of_more_records_than_a_batch_goes(store: Store) -> None:
    add_ended(store, "large", records=BATCH_RECORDS + 1)
    assert purge(store) == 1
    assert count_rows(store, tables.history, "large") == 0
