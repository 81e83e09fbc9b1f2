"""Connections and transactions: settings in force, forks, outages, and URLs that cannot be used."""

from __future__ import annotations

import functools
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import exc, make_url, text

from orchestrator.errors import ConfigurationError, StoreUnreachable
from orchestrator.store import workers
from orchestrator.store.engine import Conflict, Store, is_transient
from orchestrator.store.workers import Worker

from .processes import fork, wait_for
from .world import BEGINNING, PATIENCE_SECONDS

OpenStore = Callable[..., Store]

SERVERS = ("postgresql", "mysql")


def scalar(store: Store, statement: str) -> object:
    with store.begin("look") as connection:
        return connection.execute(text(statement)).scalar()


def add_worker(store: Store, name: str) -> None:
    with store.begin("hire") as connection:
        new = Worker(name, "node", os.getpid(), "0", 0, BEGINNING, BEGINNING, (), (), ())
        workers.insert_worker(connection, new)


def list_workers(store: Store) -> set[str]:
    with store.read("look") as connection:
        return {worker.incarnation for worker in workers.list_workers(connection)}


# --- settings in force --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("databases", SERVERS, indirect=True)
def test_a_second_statement_sees_what_was_committed_since_the_first(store: Store) -> None:
    with store.begin("first") as connection:
        before = len(workers.list_workers(connection))
        add_worker(store, "worker-1")
        assert (before, len(workers.list_workers(connection))) == (0, 1)


def test_what_a_statement_was_given_is_in_no_error(store: Store) -> None:
    statement = text("INSERT INTO nowhere VALUES (:card)")
    with pytest.raises(exc.SQLAlchemyError) as refused, store.begin("refused") as connection:
        connection.execute(statement, {"card": "4000-secret"})
    assert "nowhere" in str(refused.value)
    assert "4000-secret" not in str(refused.value)


def test_read_committed_is_what_the_postgresql_session_says(postgresql_url: str, open_store: OpenStore) -> None:
    assert scalar(open_store(postgresql_url), "SHOW transaction_isolation") == "read committed"


def test_read_committed_is_what_the_mysql_session_says(mysql_url: str, open_store: OpenStore) -> None:
    store = open_store(mysql_url)
    is_mariadb = "mariadb" in str(scalar(store, "SELECT @@version")).lower()
    variable = "tx_isolation" if is_mariadb else "transaction_isolation"
    assert scalar(store, f"SELECT @@{variable}") == "READ-COMMITTED"


def test_postgresql_ends_transactions_that_idle_longer_than_the_limit(
    postgresql_url: str, open_store: OpenStore
) -> None:
    store = open_store(postgresql_url, idle_limit_seconds=7.5)
    assert scalar(store, "SHOW idle_in_transaction_session_timeout") == "7500ms"
    assert scalar(store, "SHOW tcp_user_timeout") in ("7500", "7500ms")


def test_mysql_ends_transactions_that_idle_longer_than_the_limit(mysql_url: str, open_store: OpenStore) -> None:
    store = open_store(mysql_url, idle_limit_seconds=7)
    is_mariadb = "mariadb" in str(scalar(store, "SELECT @@version")).lower()
    assert scalar(store, f"SELECT @@{'idle_transaction_timeout' if is_mariadb else 'wait_timeout'}") == 7


@pytest.mark.parametrize("databases", SERVERS, indirect=True)
def test_a_frozen_transaction_is_ended_by_the_server_and_its_lock_is_free(
    store_url: str, open_store: OpenStore
) -> None:
    frozen = open_store(store_url, idle_limit_seconds=1)
    add_worker(frozen, "worker-1")
    with pytest.raises(exc.DBAPIError) as ended, frozen.begin("freeze") as connection:
        assert workers.beat(connection, "worker-1", BEGINNING)
        with open_store(store_url).begin("beat") as other:
            # waits for the row until the server has ended the transaction that holds it
            assert workers.beat(other, "worker-1", BEGINNING)
        connection.execute(text("SELECT 1"))
    assert is_transient(ended.value)
    with frozen.read("look") as connection:
        assert workers.list_beats(connection) == {"worker-1": 1}


def test_options_in_the_url_stay_in_force(postgresql_url: str, open_store: OpenStore) -> None:
    url = make_url(postgresql_url).update_query_dict({"options": "-c search_path=elsewhere"})
    store = open_store(url.render_as_string(hide_password=False), migrate=False)
    assert scalar(store, "SHOW search_path") == "elsewhere"
    assert scalar(store, "SHOW idle_in_transaction_session_timeout") == "15s"


def test_an_sqlite_store_writes_ahead_and_syncs_every_commit(sqlite_url: str, open_store: OpenStore) -> None:
    store = open_store(sqlite_url)
    assert (scalar(store, "PRAGMA journal_mode"), scalar(store, "PRAGMA synchronous")) == ("wal", 2)


def test_sqlite_readers_do_not_wait_for_a_writer(sqlite_url: str, open_store: OpenStore) -> None:
    store = open_store(sqlite_url)
    with store.begin("write") as connection:
        workers.beat(connection, "worker-1", BEGINNING)
        assert list_workers(store) == set()


# --- forks --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_store_used_before_a_fork_works_in_4_children_and_the_parent(store: Store) -> None:
    add_worker(store, "parent-before")
    stopping = threading.Event()
    busy = threading.Thread(target=lambda: use_until(store, stopping), daemon=True)
    busy.start()  # as a worker's poller does: another thread uses the store at the moment of the fork
    children = [fork(functools.partial(add_worker, store, f"child-{number}")) for number in range(4)]
    add_worker(store, "parent-after")
    assert [wait_for(child) for child in children] == [0] * 4
    stopping.set()
    busy.join(PATIENCE_SECONDS)
    assert list_workers(store) == {"parent-before", "parent-after", *(f"child-{number}" for number in range(4))}


def use_until(store: Store, stopping: threading.Event) -> None:
    while not stopping.is_set():
        list_workers(store)


# --- outages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "mysql+pymysql"])
def test_an_unreachable_store_is_named_without_its_password_and_says_why(scheme: str, open_store: OpenStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = taken.getsockname()[1]
        store = open_store(f"{scheme}://shop:hunter2@127.0.0.1:{port}/sagas")
        with pytest.raises(StoreUnreachable) as caught, store.read("look"):
            pass
    message = str(caught.value)
    assert f"{scheme}://shop:***@127.0.0.1:{port}/sagas" in message
    assert "refused" in message
    assert "hunter2" not in message
    assert is_transient(caught.value)


def test_an_unreachable_sqlite_file_is_named(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(f"sqlite:///{tmp_path}/missing/sagas.db")
    with pytest.raises(StoreUnreachable, match=r"missing/sagas\.db: unable to open database file"), store.read("look"):
        pass


def test_a_store_that_was_unreachable_is_found_when_it_is_there(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(f"sqlite:///{tmp_path}/later/sagas.db")
    with pytest.raises(StoreUnreachable), store.read("look"):
        pass
    (tmp_path / "later").mkdir()
    assert list_workers(store) == set()


def test_a_transaction_is_repeated_while_the_database_says_try_again(sqlite_url: str, open_store: OpenStore) -> None:
    tries: list[int] = []

    def conflicts_twice() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise Conflict
        return "done"

    assert open_store(sqlite_url).retrying(conflicts_twice, patience_seconds=PATIENCE_SECONDS) == "done"
    assert len(tries) == 3


def test_what_repeating_cannot_mend_is_raised_at_once(store: Store) -> None:
    tries: list[int] = []

    def asks_for_a_missing_table() -> None:
        tries.append(1)
        scalar(store, "SELECT count(*) FROM orchestrator_missing")

    with pytest.raises(exc.DBAPIError, match="orchestrator_missing"):
        store.retrying(asks_for_a_missing_table, patience_seconds=PATIENCE_SECONDS)
    assert len(tries) == 1


# --- URLs that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_sqlite_in_memory_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="in memory is one process's own"):
        Store(url)


@pytest.mark.parametrize(
    "url",
    [
        "sagas.db",
        "postgres://shop:hunter2@localhost/sagas",
        "postgresql+missing://shop:hunter2@localhost/sagas",
        "mysql+mysqldb://shop:hunter2@localhost/sagas",  # a driver that is not installed
        "postgresql+asyncpg://shop:hunter2@localhost/sagas",
        "sqlite+aiosqlite:///sagas.db",
        "oracle://shop:hunter2@localhost/sagas",
        "postgresql://shop:hunter2@localhost:port/sagas",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used") as caught:
        Store(url)
    assert "hunter2" not in str(caught.value)


def test_the_description_hides_the_password(open_store: OpenStore) -> None:
    assert (
        open_store("postgresql+psycopg://shop:hunter2@db/sagas").describe() == "postgresql+psycopg://shop:***@db/sagas"
    )
