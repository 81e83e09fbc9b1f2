"""A settlement that locks its instance with its first write: it reads nothing again, or is made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Connection, ForeignKey, Integer, MetaData, Table, bindparam, exc, make_url, text

from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State
from orchestrator.runtime.change import MOST_PLAIN_ROWS, Change
from orchestrator.runtime.executing import Executing
from orchestrator.runtime.offering import Offer
from orchestrator.runtime.remembered import Memory
from orchestrator.store import history, instances, tables
from orchestrator.store.claiming import Claimant
from orchestrator.store.compiled import Together
from orchestrator.store.engine import Store, current_purpose
from orchestrator.store.instances import Status
from orchestrator.store.prepared import Batch, Prepared, may_run_alone

from .locks import before_statement
from .world import FAILS, World, step, succeeds

Worlds = Callable[..., World]


def two_in_a_row(ctx: Context) -> Any:
    ctx.run(step("reserve"), compensate=step("release"))
    return ctx.run(step("charge"), compensate=step("refund"))


def statements_of(world: World, purpose: str) -> list[str]:
    """Return a list to which each statement that is executed for ``purpose`` is added."""
    found: list[str] = []
    before_statement(world.store, lambda sql: found.append(sql) if current_purpose.get() == purpose else None)
    return found


def cancel(world: World) -> None:
    """Cancel an instance, and make the pass in which it learns of it."""
    world.cancel("the customer")
    world.advance()


def test_a_settlement_reads_nothing_where_nothing_has_changed(world: Worlds) -> None:
    started = world(buy=lambda ctx: [ctx.run(step(name)) for name in ("reserve", "charge", "ship")])
    started.start("buy")
    started.run(0, succeeds("r-1"))
    row = started.take(1)
    executed = statements_of(started, "settle")
    assert started.end(row, succeeds("c-1"))
    assert started.states() == ["reserve succeeded", "charge succeeded", "ship scheduled"]
    assert not [sql for sql in executed if sql.lstrip().startswith("SELECT")], executed


def test_an_end_that_nobody_is_told_of_is_written_with_the_last_step_alone(world: Worlds) -> None:
    started = world(buy=two_in_a_row)
    started.coordinator.owes_telling = lambda _instance: False
    started.start("buy")
    started.run(0, succeeds("r-1"))
    row = started.take(1)
    executed = statements_of(started, "settle")
    assert started.end(row, succeeds("c-1"))
    assert started.status() is Status.COMPLETED
    written = [sql.split()[:2] for sql in executed if "BEGIN" not in sql]
    assert written == [["UPDATE", "orchestrator_instance"], ["UPDATE", "orchestrator_history"]]


@pytest.mark.parametrize("is_remembered", [True, False])
def test_an_instance_that_has_subscribed_leaves_no_subscription_behind(world: Worlds, is_remembered: bool) -> None:
    def listens(ctx: Context) -> None:
        ctx.subscribe("news")
        for name in ("reserve", "charge"):
            ctx.run(step(name))

    started = world(buy=listens)
    started.start("buy")
    started.run(1, succeeds())
    if not is_remembered:
        started.coordinator.memory = Memory(0)
    started.run(2, succeeds())
    assert started.status() is Status.COMPLETED
    with started.store.read("look") as connection:
        assert connection.execute(tables.subscription.select()).all() == []


def test_a_settlement_whose_instance_has_changed_is_made_again(world: Worlds) -> None:
    started = world(buy=two_in_a_row)
    started.start("buy")
    row = started.take(0)
    cancel(started)
    assert started.row(0).is_draining
    assert started.end(row, succeeds("r-1"))
    assert started.states()[0] == "reserve succeeded"
    assert started.status() is Status.COMPENSATING


def test_a_step_that_was_given_up_and_taken_again_is_not_settled_by_the_first_attempt(world: Worlds) -> None:
    started = world(buy=two_in_a_row)
    started.start("buy")
    first = started.take(0)
    started.lose(first)
    started.take(0)
    assert not started.end(first, succeeds("r-1"))
    assert (started.row(0).state, started.row(0).attempt, started.row(0).outcome) == (State.RUNNING, 2, None)


def test_a_step_whose_instance_was_deleted_meanwhile_is_held_no_longer(world: Worlds) -> None:
    started = world(buy=two_in_a_row)
    started.start("buy")
    row = started.take(0)
    with started.store.begin("delete") as connection:
        for table in (tables.history, tables.instance):
            connection.execute(table.delete())
    assert not started.end(row, succeeds("r-1"))


def test_two_that_end_at_once_are_both_counted(world: Worlds) -> None:
    started = world(buy=lambda ctx: [each.get() for each in [ctx.start(step("reserve")), ctx.start(step("charge"))]])
    started.start("buy")
    rows = [started.take(seq) for seq in (0, 1)]
    for row in rows:  # both have read what their instance was before either ended
        assert started.end(row, succeeds("x"))
    assert (started.status(), started.result()) == (Status.COMPLETED, ["x", "x"])


@pytest.mark.parametrize("after", [0, 1], ids=["before its first statement", "between its statements"])
def test_a_cancellation_within_a_claim_is_not_missed_by_the_settlement(world: Worlds, after: int) -> None:
    started = world(buy=two_in_a_row)
    started.start("buy")
    statements: list[str] = []

    def cancels(sql: str) -> None:
        if current_purpose.get() == "claim":
            statements.append(sql)
            if len(statements) == after + 1:
                cancel(started)

    before_statement(started.store, cancels)
    row = started.claim(0, dispatch=1)
    if len(statements) <= after:  # one statement was all there was
        cancel(started)
    if row is None:
        assert started.row(0).outcome is Outcome.WITHDRAWN
        return
    assert started.row(0).is_draining
    started.end(row, FAILS)
    assert (started.row(0).state, started.row(0).attempt) == (State.SETTLED, 1), "it was tried again"
    assert started.status() is Status.CANCELLED


def test_what_a_process_keeps_of_what_it_was_handed_is_what_was_committed(world: Worlds) -> None:
    started = world(buy=two_in_a_row)
    started.start("buy")
    row = started.take(0)
    offer = Offer(Claimant("worker-1", 1), Executing(), lambda _row: True)
    _, outbox = started.coordinator.end_attempt(
        row.key, row.attempt, succeeds("r-1"), offer=offer, held=started.held(row)
    )
    handed = outbox.handed
    assert handed is not None
    with started.store.read("look") as connection:
        assert handed.row == history.find_row(connection, handed.row.key)
        assert handed.instance == instances.find_instance(connection, started.instance_id)
    executed = statements_of(started, "settle")
    ended, _ = started.coordinator.end_attempt(handed.row.key, 1, succeeds("c-1"), held=handed)
    assert ended
    assert (started.status(), started.result()) == (Status.COMPLETED, "c-1")
    assert not [sql for sql in executed if "FOR UPDATE" in sql], executed


def test_a_settlement_of_one_statement_whose_answer_was_lost_has_taken_effect(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = world(buy=two_in_a_row)
    started.start("buy")
    row = started.take(0)
    run, lost = Together.run, []

    def loses(self: Together, connection: Connection, parameters: Any) -> bool:
        assert run(self, connection, parameters)
        lost.append(self)
        raise exc.OperationalError("", {}, Exception("server closed the connection"))

    monkeypatch.setattr(Together, "run", loses)
    was_held, outbox = started.coordinator.end_attempt(row.key, row.attempt, succeeds("r-1"), held=started.held(row))
    if started.store.backend == "postgresql":
        assert len(lost) == 1
    assert was_held
    assert [step.seq for step in outbox.steps] == [1]
    assert started.row(0).strays is None


def test_one_statement_writes_all_or_nothing(store: Store) -> None:
    with store.begin("x", locks_late=True) as connection:
        if not may_run_alone(connection):
            pytest.skip("here several writes are several statements")
    started = World(store, buy=two_in_a_row)
    started.start("buy")
    instance, row = started.instance, started.row(0)
    for seen, changed, dispatch in ((instance, row, 7), (instance.changed({"version": 99}), row, row.dispatch)):
        with store.begin("x", locks_late=True) as connection:
            batch = Batch(connection)
            instances.change_instance(batch, seen, {"progress": "changed"})
            history.change_row(batch, changed.changed({"dispatch": dispatch}), {"strays": "changed"})
            history.insert_row(batch, {name: getattr(row, name) for name in row.__slots__} | {"seq": 1})
            assert not batch.run_alone()
    assert (started.instance, started.rows()) == (instance, [row])


def test_a_write_that_is_guarded_waits_for_its_guard(store: Store) -> None:
    started = World(store, buy=two_in_a_row)
    started.start("buy")
    row = started.row(0)
    with store.begin("x") as connection:
        batch = Batch(connection)
        instances.change_instance(batch, started.instance.changed({"version": 99}), {"progress": "changed"})
        history.change_row(batch, row, {"strays": "changed"})
        assert not batch.run_guarded()
        assert history.find_row(connection, row.key) == row


def test_a_change_of_many_records_is_no_statement_of_its_own(world: Worlds) -> None:
    started = world(buy=two_in_a_row)
    started.start("buy")
    row = started.row(0)
    change = Change()
    for seq in range(MOST_PLAIN_ROWS):
        change.change_row(row.changed({"seq": seq}), {"strays": None})
    assert change.is_plain
    change.change_row(row.changed({"seq": MOST_PLAIN_ROWS}), {"strays": None})
    assert not change.is_plain


def test_what_is_a_transaction_of_its_own_is_isolated_like_the_others(store_url: str, open_store: Any) -> None:
    if not store_url.startswith("postgresql"):
        pytest.skip("others have no statements that are transactions, or one isolation for all")
    name = make_url(store_url).database
    with open_store(store_url).begin("x") as connection:
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'"))
    for options in ({}, {"locks_late": True}):
        with open_store(store_url).begin("x", **options) as connection:
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"


def test_an_error_of_a_commit_that_comes_with_the_last_row_is_one_of_sqlalchemys(tmp_path: Path) -> None:
    metadata = MetaData()
    parent = Table("parent", metadata, Column("id", Integer, primary_key=True))
    key = ForeignKey(parent.c.id, deferrable=True, initially="DEFERRED")
    child = Table("child", metadata, Column("id", Integer, key, primary_key=True))
    store = Store(f"sqlite:///{tmp_path}/x.db")
    with store.begin("x") as connection:
        metadata.create_all(connection)
    insertion = Prepared(child.insert().values(id=bindparam("given")).returning(child.c.id))
    with pytest.raises(exc.IntegrityError), store.begin("x", locks_late=True) as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        insertion.first(connection, {"given": 1})
    store.dispose()
