"""Bodies whose writes commit together with what becomes of their step, on each store."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, delete, exc, insert, select, text, update
from sqlalchemy.orm import Session

from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State
from orchestrator.errors import SecondWriter, TransactionEnded
from orchestrator.runtime.transactional import PURPOSE, GivenUp, TransactionalBodies
from orchestrator.store import tables
from orchestrator.store.engine import Store
from orchestrator.store.history import HistoryRow

from .locks import before_commit, lose_answer
from .world import World, at_once, step

metadata = MetaData()
#: The user's own: nothing about it would notice a row that is there twice.
entry = Table("entry", metadata, Column("name", String(40)), mysql_engine="InnoDB")
account = Table(
    "account", metadata, Column("id", Integer, primary_key=True), Column("cents", Integer), mysql_engine="InnoDB"
)

Body = Callable[..., Any]

#: What is the same for every store is tried on one; what SQLite does not know, on the others.
on_sqlite = pytest.mark.parametrize("shared_databases", ["sqlite"], indirect=True)
on_servers = pytest.mark.parametrize("shared_databases", ["postgresql", "mysql"], indirect=True)


class Bank:
    """A world with a table of the user's, and one step that is to be run."""

    def __init__(self, world: World, bodies_store: Store) -> None:
        self.world = world
        self.store = bodies_store
        self.bodies = TransactionalBodies(bodies_store, world.coordinator)
        with world.store.begin("create") as connection:
            metadata.create_all(connection)
            connection.execute(insert(account), [{"id": 1, "cents": 100}, {"id": 2, "cents": 100}])
        world.start("pay")

    def run(self, row: HistoryRow, body: Body) -> Any:
        committed = self.bodies.run_step(row, body, json.dumps)
        self.world.publish(committed.change.outbox)
        return committed.result

    def entries(self) -> list[str]:
        with self.world.store.read("look") as connection:
            return list(connection.scalars(select(entry.c.name)))


def pays(ctx: Context) -> Any:
    return ctx.run(step("charge"))


@pytest.fixture
def store_url(shared_url: str) -> str:
    """One database of each kind for all tests here, which leave it empty."""
    return shared_url


@pytest.fixture
def open_bank(
    world: Callable[..., World], store_url: str, open_store: Callable[..., Store]
) -> Iterator[Callable[[Body], Bank]]:
    store = open_store(store_url, migrate=False)
    yield lambda workflow: Bank(world(pay=workflow), store)
    with store.begin("empty") as connection:
        for table in reversed([*tables.metadata.sorted_tables, *metadata.sorted_tables]):
            connection.execute(delete(table))


@pytest.fixture
def bank(open_bank: Callable[[Body], Bank]) -> Bank:
    return open_bank(pays)


def write(session: Session, name: str = "paid") -> str:
    session.execute(insert(entry).values(name=name))
    return name


# --- together -----------------------------------------------------------------------------------------------------


def test_what_a_body_wrote_commits_with_its_outcome_and_leaves_the_pass_owed(bank: Bank) -> None:
    seen: list[Any] = []

    def body(session: Session) -> str:
        write(session)
        seen.append((bank.entries(), bank.world.row(0).state) if not bank.store.is_sqlite else None)
        return "c-1"

    assert bank.run(bank.world.take(0), body) == "c-1"
    assert seen in ([([], State.RUNNING)], [None])
    row = bank.world.row(0)
    assert (bank.entries(), row.outcome, row.result) == (["paid"], Outcome.SUCCEEDED, '"c-1"')
    assert bank.world.passes_owed == 1
    bank.world.advance()
    assert bank.world.instance.result == '"c-1"'


class Declined(Exception):
    pass


def test_what_a_body_wrote_before_it_raised_is_rolled_back(bank: Bank) -> None:
    def body(session: Session) -> None:
        write(session)
        session.commit()
        raise Declined

    with pytest.raises(Declined):
        bank.run(bank.world.take(0), body)
    assert (bank.entries(), bank.world.row(0).state) == ([], State.RUNNING)


@on_sqlite
def test_a_result_that_cannot_be_encoded_takes_the_writes_with_it(bank: Bank) -> None:
    with pytest.raises(TypeError):
        bank.run(bank.world.take(0), lambda session: {write(session): object()})
    assert bank.entries() == []


def test_a_body_may_commit_and_roll_back_its_session(bank: Bank) -> None:
    def body(session: Session) -> None:
        write(session, "first")
        session.commit()
        write(session, "second")
        session.rollback()
        with session.begin():
            write(session, "third")

    bank.run(bank.world.take(0), body)
    assert sorted(bank.entries()) == ["first", "third"]


def test_an_attempt_that_was_given_up_before_its_body_does_not_run_it(bank: Bank) -> None:
    row = bank.world.take(0)
    bank.world.lose(row)
    with pytest.raises(GivenUp):
        bank.run(row, lambda session: pytest.fail("it ran"))
    assert bank.world.row(0).strays is None


def test_an_attempt_that_was_given_up_while_its_body_ran_leaves_nothing(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bank.world.take(0)
    if bank.store.is_sqlite:  # nobody can give it up while the body runs: it is as if it had been just before
        bank.world.lose(row)
        monkeypatch.setattr(type(bank.world.coordinator), "is_held", staticmethod(lambda *_args: True))

    def body(session: Session) -> str:
        if not bank.store.is_sqlite:
            bank.world.lose(row)
        return write(session)

    with pytest.raises(GivenUp):
        bank.run(row, body)
    assert (bank.entries(), bank.world.row(0).strays) == ([], None)
    monkeypatch.undo()
    bank.run(bank.world.take(0), write)
    assert (bank.entries(), bank.world.row(0).attempt) == (["paid"], 2)


@on_sqlite
def test_what_a_body_wrote_after_its_step_timed_out_is_told_beside_the_outcome(
    open_bank: Callable[[Body], Bank],
) -> None:
    bank = open_bank(lambda ctx: ctx.run(step("charge"), timeout=60))
    row = bank.world.take(0)
    bank.world.clock.advance(60)
    bank.world.time_out(0)
    bank.run(row, write)
    after = bank.world.row(0)
    assert (after.outcome, after.late_outcome, after.late_result) == (Outcome.UNKNOWN, Outcome.SUCCEEDED, '"paid"')
    assert bank.entries() == ["paid"]


# --- the database -------------------------------------------------------------------------------------------------


def lost_connection() -> Exception:
    return exc.OperationalError("COMMIT", {}, ConnectionError("the connection was lost"))


def counting(body: Body) -> tuple[Body, list[int]]:
    runs: list[int] = []

    def counted(session: Session) -> Any:
        runs.append(len(runs))
        return body(session)

    return counted, runs


def test_a_body_whose_commit_had_no_answer_does_not_run_again(bank: Bank) -> None:
    body, runs = counting(write)
    lose_answer(bank.store, lost_connection(), PURPOSE)
    assert bank.run(bank.world.take(0), body) == "paid"
    assert (bank.entries(), len(runs), bank.world.row(0).outcome) == (["paid"], 1, Outcome.SUCCEEDED)
    assert bank.world.passes_owed == 1


def test_a_body_whose_commit_failed_runs_again(bank: Bank) -> None:
    body, runs = counting(write)

    def fail() -> None:
        raise lost_connection()

    before_commit(bank.store, fail, PURPOSE)
    bank.run(bank.world.take(0), body)
    assert (bank.entries(), len(runs)) == (["paid"], 2)


def test_a_body_whose_attempt_was_given_up_while_the_database_was_away_does_not_run_again(bank: Bank) -> None:
    body, runs = counting(write)
    row = bank.world.take(0)
    retrying = bank.store.retrying

    def with_a_loss_meanwhile(function: Callable[[], Any], *, patience_seconds: float) -> Any:
        def once() -> Any:
            try:
                return function()
            except exc.OperationalError:
                bank.world.lose(row)
                raise

        return retrying(once, patience_seconds=patience_seconds)

    def fail() -> None:
        raise lost_connection()

    bank.store.retrying = with_a_loss_meanwhile  # type: ignore[method-assign]
    before_commit(bank.store, fail, PURPOSE)
    with pytest.raises(GivenUp):
        bank.run(row, body)
    assert (bank.entries(), len(runs)) == ([], 1)


def kill_own_connection(session: Session) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    else:
        session.execute(text(f"KILL {session.scalar(text('SELECT CONNECTION_ID()'))}"))


@on_servers
@pytest.mark.parametrize("is_swallowed", [False, True], ids=["raised", "swallowed"])
def test_a_body_that_loses_its_connection_runs_again(bank: Bank, is_swallowed: bool) -> None:
    def dies_once(session: Session) -> str:
        write(session)
        if len(runs) == 1:
            try:
                kill_own_connection(session)
                session.execute(text("SELECT 1"))
            except exc.DBAPIError:
                if not is_swallowed:
                    raise
        return "paid"

    body, runs = counting(dies_once)
    assert bank.run(bank.world.take(0), body) == "paid"
    assert (bank.entries(), len(runs)) == (["paid"], 2)


@on_servers
@pytest.mark.parametrize("is_swallowed", [False, True], ids=["raised", "swallowed"])
def test_of_two_bodies_in_a_deadlock_both_take_effect_once(
    open_bank: Callable[[Body], Bank], is_swallowed: bool
) -> None:
    """MariaDB rolls all of a transaction back; a body that goes on must not commit the second half of its work."""
    bank = open_bank(lambda ctx: ctx.gather(step("charge"), step("charge")))
    meet = threading.Barrier(2)

    def transfer(session: Session, giver: int, taker: int) -> str:
        write(session, f"{giver} to {taker}")
        session.execute(update(account).where(account.c.id == giver).values(cents=account.c.cents - 10))
        if not meet.broken:
            meet.wait(10)
        try:
            session.execute(update(account).where(account.c.id == taker).values(cents=account.c.cents + 10))
        except exc.OperationalError:
            meet.abort()
            if not is_swallowed:
                raise
            with contextlib.suppress(exc.SQLAlchemyError):
                session.rollback()
            write(session, "what follows")
        else:
            meet.abort()
        return "moved"

    def moves(seq: int, giver: int, taker: int) -> None:
        row = bank.world.take(seq)
        bank.bodies.run_step(row, functools.partial(transfer, giver=giver, taker=taker), json.dumps)

    at_once(lambda: moves(0, 1, 2), lambda: moves(1, 2, 1))
    assert sorted(bank.entries()) == ["1 to 2", "2 to 1"]
    with bank.world.store.read("look") as connection:
        assert list(connection.scalars(select(account.c.cents))) == [100, 100]
    assert [row.outcome for row in bank.world.rows()] == [Outcome.SUCCEEDED] * 2


@on_sqlite
def test_a_broken_rule_of_the_users_fails_the_body(bank: Bank) -> None:
    body, runs = counting(lambda session: session.execute(insert(account).values(id=1)))
    with pytest.raises(exc.IntegrityError):
        bank.run(bank.world.take(0), body)
    assert len(runs) == 1


def by_session(session: Session) -> Any:
    return session


def by_connection(session: Session) -> Any:
    return session.get_bind()


@pytest.mark.parametrize("through", [by_session, by_connection])
def test_an_error_that_a_body_swallowed_does_not_take_its_writes_unseen(bank: Bank, through: Body) -> None:
    """PostgreSQL takes the COMMIT of a transaction in which a statement failed, and rolls back."""

    def swallows(session: Session) -> str:
        used = through(session)
        write(used)
        try:
            used.execute(insert(account).values(id=1))
        except exc.IntegrityError:
            return "swallowed"
        raise AssertionError("there was no error")

    body, runs = counting(swallows)
    row = bank.world.take(0)
    if bank.store.backend == "postgresql":
        with pytest.raises(exc.SQLAlchemyError):
            bank.run(row, body)
        assert (bank.entries(), bank.world.row(0).state) == ([], State.RUNNING)
    else:
        bank.run(row, body)
        assert (bank.entries(), bank.world.row(0).state) == (["paid"], State.SETTLED)
    assert len(runs) == 1


def test_an_error_inside_a_savepoint_may_be_swallowed(bank: Bank) -> None:
    def body(session: Session) -> str:
        try:
            with session.begin_nested():
                session.execute(insert(account).values(id=1))
        except exc.IntegrityError:
            return write(session)
        raise AssertionError("there was no error")

    assert bank.run(bank.world.take(0), body) == "paid"
    assert bank.entries() == ["paid"]


@on_sqlite
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
@pytest.mark.parametrize("through", [by_session, by_connection])
def test_a_body_that_ends_the_transaction_itself_leaves_doubt(bank: Bank, through: Body, end: str) -> None:
    def body(session: Session) -> None:
        write(through(session))
        getattr(session.get_bind(), end)()

    with pytest.raises(TransactionEnded):
        bank.run(bank.world.take(0), body)
    assert bank.world.row(0).state is State.RUNNING


def test_another_write_to_the_store_is_refused_where_it_would_wait_for_itself(
    bank: Bank, store_url: str, open_store: Callable[..., Store]
) -> None:
    other = open_store(store_url)

    def body(session: Session) -> None:
        write(session)
        with other.begin("other"):
            pass

    if bank.store.is_sqlite:
        with pytest.raises(SecondWriter):
            bank.run(bank.world.take(0), body)
    else:
        bank.run(bank.world.take(0), body)
    with other.begin("afterwards"):
        pass


# --- no step ------------------------------------------------------------------------------------------------------


@on_sqlite
def test_a_body_alone_commits_at_its_end_and_takes_others_with_it(bank: Bank) -> None:
    def body(session: Session) -> str:
        write(session, "outer")
        return str(bank.bodies.run_alone("inner", lambda session: write(session, "inner")))

    assert bank.bodies.run_alone("outer", body) == "inner"
    assert sorted(bank.entries()) == ["inner", "outer"]

    def fails(session: Session) -> None:
        body(session)
        raise Declined

    with pytest.raises(Declined):
        bank.bodies.run_alone("outer", fails)
    assert len(bank.entries()) == 2
