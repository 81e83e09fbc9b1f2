"""The caller's transaction as we find it: what is taken for one, and what follows its commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from orchestrator.errors import InvalidOperation
from orchestrator.runtime.callers import after_commit, tells_of_commits, writing
from orchestrator.store import outbox
from orchestrator.store.engine import Store
from orchestrator.store.tables import subscription
from tests.servers import Databases
from tests.store.world import BEGINNING


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.dispose()


@pytest.fixture
def engine(store_url: str) -> Iterator[Engine]:
    """An engine of the caller's, made without knowing of us."""
    engine = create_engine(store_url)
    yield engine
    engine.dispose()


def connection_of(session: Any, store: Store) -> Connection:
    with writing(session, store) as connection:
        return connection


def write(connection: Connection, name: str) -> None:
    # as we do it, in a savepoint
    with connection.begin_nested():
        values = {"instance_id": name, "channel": "c", "generation": "1", "mode": "m", "created_at": BEGINNING}
        connection.execute(insert(subscription).values(**values))


def written(store: Store) -> list[str]:
    with store.read("look") as connection:
        return list(connection.execute(text("SELECT instance_id FROM orchestrator_subscription ORDER BY 1")).scalars())


# --- what is taken ------------------------------------------------------------------------------------------------


def test_a_session_a_scoped_session_and_a_connection_are_taken(store: Store, engine: Engine) -> None:
    with Session(engine) as session:
        write(connection_of(session, store), "session")
        session.commit()
    scoped = scoped_session(sessionmaker(engine))
    write(connection_of(scoped, store), "scoped")
    scoped.commit()
    scoped.remove()
    with engine.connect() as connection:
        assert connection_of(connection, store) is connection
        write(connection, "connection")
        connection.commit()
    assert written(store) == ["connection", "scoped", "session"]


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_what_is_written_first_in_a_transaction_is_rolled_back_with_it(store: Store, engine: Engine, kind: str) -> None:
    own: Any = Session(engine) if kind == "session" else engine.connect()
    with own:
        write(connection_of(own, store), "first")
        assert written(store) == []
        own.rollback()
        write(connection_of(own, store), "second")
        own.commit()
    assert written(store) == ["second"]


def test_anything_else_is_refused_by_the_name_of_its_type(sqlite_url: str) -> None:
    class AsyncSession:  # SQLAlchemy's own is no kind of Session either, and cannot be imported without greenlet
        pass

    store, engine = Store(sqlite_url), create_engine(sqlite_url)
    raw = sqlite3.connect(":memory:")
    for given, name in [
        (engine, "sqlalchemy.engine.base.Engine"),
        (raw, "sqlite3.Connection"),
        (AsyncSession(), r"tests.runtime.*\.AsyncSession"),
        (sessionmaker(engine), "sqlalchemy.orm.session.sessionmaker"),
        ("session", "builtins.str"),
    ]:
        with pytest.raises(InvalidOperation, match=rf"session is a {name}; a SQLAlchemy Session, .* is taken"):
            connection_of(given, store)
    with pytest.raises(InvalidOperation, match="bound to no single database"):
        connection_of(Session(), store)
    raw.close()
    engine.dispose()
    store.dispose()


def test_another_kind_of_database_is_refused(sqlite_url: str, postgresql_url: str) -> None:
    store, engine = Store(postgresql_url), create_engine(sqlite_url)
    with Session(engine) as session, pytest.raises(InvalidOperation, match=r"on a sqlite database, and the store post"):
        connection_of(session, store)
    engine.dispose()


def test_another_database_of_the_same_kind_is_refused(sqlite_url: str, tmp_path: Path) -> None:
    store, engine = Store(sqlite_url), create_engine(f"sqlite:///{tmp_path}/other.db")
    with Session(engine) as session, pytest.raises(InvalidOperation, match=r"on the database '.*other.db'"):
        connection_of(session, store)
    engine.dispose()
    store.dispose()


def test_another_database_that_has_such_tables_too_is_refused(databases: Databases, store: Store) -> None:
    other = databases.create()
    engine = create_engine(other)
    name = engine.url.database
    with Session(engine) as session, pytest.raises(InvalidOperation, match=f"on the database '{name}', and the store"):
        connection_of(session, store)
    engine.dispose()
    databases.drop(other)


def test_autocommit_is_refused(store: Store, store_url: str, engine: Engine) -> None:
    always = create_engine(store_url, isolation_level="AUTOCOMMIT")
    for own in (always, engine.execution_options(isolation_level="AUTOCOMMIT")):
        with own.connect() as connection, pytest.raises(InvalidOperation, match="in autocommit mode"):
            connection_of(connection, store)
    always.dispose()


def test_the_tables_are_made_when_they_are_first_needed(empty_store_url: str) -> None:
    store, engine = Store(empty_store_url), create_engine(empty_store_url)
    with Session(engine) as session:
        write(connection_of(session, store), "first")
        session.commit()
    assert written(store) == ["first"]
    engine.dispose()
    store.dispose()


def test_missing_tables_are_named_and_not_waited_for_while_sqlite_is_locked(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    store, engine = Store(url), create_engine(url)
    with Session(engine) as session:
        session.execute(text("CREATE TABLE own (id INTEGER)"))
        session.execute(text("INSERT INTO own VALUES (1)"))
        with pytest.raises(InvalidOperation, match="are not in the database of session"):
            connection_of(session, store)
    engine.dispose()
    store.dispose()


def test_the_first_use_of_a_store_does_not_wait_for_the_lock_of_its_caller(store_url: str, engine: Engine) -> None:
    store = Store(store_url)
    with Session(engine) as session:
        session.execute(text("DELETE FROM orchestrator_subscription"))
        write(connection_of(session, store), "first")
        session.commit()
    assert written(store) == ["first"]
    store.dispose()


def test_missing_tables_are_named_where_nobody_may_make_them(empty_store_url: str) -> None:
    store, engine = Store(empty_store_url, migrate=False), create_engine(empty_store_url)
    with Session(engine) as session, pytest.raises(InvalidOperation, match="are not in the database of session"):
        connection_of(session, store)
    engine.dispose()
    store.dispose()


# --- what follows the commit --------------------------------------------------------------------------------------


@pytest.fixture
def sqlite_engine(sqlite_url: str) -> Iterator[Engine]:
    engine = create_engine(sqlite_url)

    @event.listens_for(engine, "connect")
    def leave_beginning_to_us(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    yield engine
    engine.dispose()


@pytest.fixture
def session(sqlite_engine: Engine) -> Iterator[Session]:
    with Session(sqlite_engine) as session:
        session.connection()
        yield session


@pytest.fixture
def done() -> list[str]:
    return []


def noting(done: list[str], what: str) -> Callable[[], None]:
    return lambda: done.append(what)


def test_it_is_done_once_in_order_when_the_transaction_has_committed(session: Session, done: list[str]) -> None:
    after_commit(session, noting(done, "first"))
    after_commit(session, noting(done, "second"))
    session.flush()
    assert done == []
    session.commit()
    assert done == ["first", "second"]
    session.connection()
    session.commit()
    assert done == ["first", "second"]


@pytest.mark.parametrize("how", ["rollback", "close", "exception", "failed commit"])
def test_it_is_not_done_when_the_transaction_is_given_up(session: Session, done: list[str], how: str) -> None:
    after_commit(session, noting(done, how))
    match how:
        case "rollback":
            session.rollback()
        case "close":
            session.close()
        case "exception":
            session.rollback()
            with pytest.raises(LookupError), session.begin():
                after_commit(session, noting(done, how))
                raise LookupError
        case _:
            event.listen(session, "before_commit", fail, once=True)
            with pytest.raises(LookupError):
                session.commit()
            session.rollback()
    session.connection()
    session.commit()
    assert done == []


def fail(*_args: Any) -> None:
    raise LookupError


def test_the_end_of_a_savepoint_is_not_the_commit(session: Session, done: list[str]) -> None:
    with session.begin_nested():
        after_commit(session, noting(done, "inner"))
        with session.begin_nested():
            after_commit(session, noting(done, "innermost"))
    assert done == []
    session.commit()
    assert done == ["inner", "innermost"]


def test_what_was_asked_for_within_a_savepoint_goes_with_it(session: Session, done: list[str]) -> None:
    after_commit(session, noting(done, "before"))
    outer = session.begin_nested()
    after_commit(session, noting(done, "outer"))
    with session.begin_nested():
        after_commit(session, noting(done, "released, then rolled back with the one around it"))
    outer.rollback()
    with session.begin_nested():
        after_commit(session, noting(done, "another"))
    session.commit()
    assert done == ["before", "another"]


def test_it_is_done_when_the_session_has_let_its_connection_go(session: Session, sqlite_url: str) -> None:
    store = Store(sqlite_url)

    def write_elsewhere() -> None:
        with store.begin("elsewhere") as connection:
            outbox.insert_enqueued(connection, "1", "{}", BEGINNING, BEGINNING)

    session.execute(text("DELETE FROM orchestrator_subscription"))
    after_commit(session, write_elsewhere)
    session.commit()
    with store.read("look") as connection:
        assert len(outbox.list_due_enqueued(connection, BEGINNING, 10)) == 1
    store.dispose()


def test_what_it_raises_does_not_reach_the_caller(
    session: Session, done: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    after_commit(session, fail)
    after_commit(session, noting(done, "the next"))
    session.commit()
    assert done == ["the next"]
    assert "what was to follow a commit failed" in caplog.text


def test_a_session_listens_once_however_often_it_is_rolled_back(session: Session) -> None:
    def count() -> int:
        return len(list(session.dispatch.after_commit)) + len(list(session.dispatch.after_transaction_end))

    after_commit(session, fail)
    listeners = count()
    for _ in range(20):
        session.connection()
        after_commit(session, fail)
        session.rollback()
    assert count() == listeners == 2


def test_connections_do_not_tell_of_their_commits(sqlite_engine: Engine, done: list[str]) -> None:
    with sqlite_engine.begin() as connection:
        after_commit(connection, noting(done, "connection"))
        assert not tells_of_commits(connection)
        # its commit is not the one that counts
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            after_commit(session, noting(done, "session"))
            assert not tells_of_commits(session)
            session.commit()
    assert done == []
