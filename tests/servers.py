"""The servers that tests run against, and databases of their own on them.

Servers are found through the environment, on the loopback by default, and are taken to be there for tests alone.  What
does not answer is skipped by name, or fails the run where ``ORCHESTRATOR_TEST_REQUIRE`` names it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, Protocol

import pytest
from sqlalchemy import URL, Engine, create_engine, exc, inspect, make_url, text
from sqlalchemy.pool import NullPool

from orchestrator.store.engine import Store
from orchestrator.store.tables import VERSION_TABLE, metadata

DEFAULTS = {
    "postgresql": "postgresql+psycopg://postgres@127.0.0.1:5432/test",
    "mysql": "mysql+pymysql://root@127.0.0.1:3306/test",
    "redis": "redis://127.0.0.1:6379",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
}


def address_of(server: str) -> str:
    """Return the URL under which a server is looked for."""
    return os.environ.get(f"ORCHESTRATOR_TEST_{server.upper()}", DEFAULTS[server])


def is_required(server: str) -> bool:
    names = os.environ.get("ORCHESTRATOR_TEST_REQUIRE", "")
    return server in (name.strip() for name in names.split(","))


def report_missing(server: str, reason: object) -> NoReturn:
    """Skip the test for want of a server, or fail it if that server has to be there."""
    message = f"{server}: {reason}"
    if is_required(server):
        pytest.fail(f"{message} (ORCHESTRATOR_TEST_REQUIRE names it)", pytrace=False)
    pytest.skip(message)


class Databases(Protocol):
    """Makes databases for tests, one kind of them."""

    def create(self, *, migrated: bool = True) -> str:
        """Return the URL of a new database, with our tables in it or empty."""

    def drop(self, url: str) -> None:
        """Let go of a database, whoever is still connected to it."""

    def recycle(self, url: str) -> None:
        """Let go of a migrated database whose tables are as they were made; another test may have it, emptied."""

    def close(self) -> None:
        """Let go of what was kept to make databases quickly."""


def migrate(url: str) -> None:
    store = Store(url)
    try:
        with store.read("migrate"):
            pass
    finally:
        store.dispose()


class SqliteFiles:
    """Copies of a file that was migrated once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._template = directory / "template.db"
        migrate(f"sqlite:///{self._template}")
        with closing(sqlite3.connect(self._template)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def create(self, *, migrated: bool = True) -> str:
        path = self._directory / f"{secrets.token_hex(6)}.db"
        if migrated:
            shutil.copyfile(self._template, path)
        return f"sqlite:///{path}"

    def drop(self, url: str) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{make_url(url).database}{suffix}").unlink(missing_ok=True)

    recycle = drop

    def close(self) -> None:
        self.drop(f"sqlite:///{self._template}")


class _OnServer:
    """Databases with names drawn at random; making one takes a server much longer than emptying it."""

    #: Who is connected to a database, and how one of them is ended.
    sessions: str
    end_session: str

    def __init__(self, address: str) -> None:
        self._url = make_url(address)
        arguments: dict[str, Any] = {"connect_timeout": 3}
        self._engine: Engine = create_engine(
            self._url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=arguments
        )
        self._execute("SELECT 1")
        self._spare: list[str] = []

    def create(self, *, migrated: bool = True) -> str:
        if migrated and self._spare:
            return self._spare.pop()
        return self._create(migrated=migrated)

    def _create(self, *, migrated: bool) -> str:
        raise NotImplementedError

    def drop(self, url: str) -> None:
        raise NotImplementedError

    def recycle(self, url: str) -> None:
        self._end_sessions(make_url(url).database or "")
        engine = create_engine(url, poolclass=NullPool)
        with engine.begin() as connection:
            for table in set(inspect(connection).get_table_names()) - {VERSION_TABLE, *metadata.tables}:
                connection.execute(text(f"DROP TABLE {table}"))  # the test's own
            for ours in reversed(metadata.sorted_tables):
                connection.execute(ours.delete())
        self._spare.append(url)

    def _end_sessions(self, database: str) -> None:
        with self._engine.connect() as connection:
            for number in connection.execute(text(self.sessions), {"database": database}).scalars().all():
                with contextlib.suppress(exc.OperationalError):  # it has gone meanwhile
                    connection.execute(text(self.end_session), {"number": number})

    def close(self) -> None:
        for url in self._spare:
            self.drop(url)

    def _execute(self, *statements: str) -> None:
        with self._engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def _new_name(self) -> str:
        return f"orchestrator_test_{secrets.token_hex(6)}"

    def _url_of(self, name: str) -> str:
        return _full(self._url.set(database=name))


class PostgresqlDatabases(_OnServer):
    """Clones of a template database that was migrated once."""

    sessions = "SELECT pid FROM pg_stat_activity WHERE datname = :database"
    end_session = "SELECT pg_terminate_backend(:number)"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._template = self._new_name()
        self._execute(f"CREATE DATABASE {self._template}")
        migrate(self._url_of(self._template))

    def _create(self, *, migrated: bool) -> str:
        name = self._new_name()
        self._execute(
            f"CREATE DATABASE {name} TEMPLATE {self._template if migrated else 'template0'}",
            # nobody pulls the plug of a test's machine; who kills a process loses nothing by it
            f"ALTER DATABASE {name} SET synchronous_commit = off",
        )
        return self._url_of(name)

    def drop(self, url: str) -> None:
        self._execute(f"DROP DATABASE IF EXISTS {make_url(url).database} WITH (FORCE)")

    def close(self) -> None:
        super().close()
        self.drop(self._url_of(self._template))


class MysqlDatabases(_OnServer):
    """Replays the DDL of a database that was migrated once."""

    sessions = "SELECT id FROM information_schema.processlist WHERE db = :database"
    end_session = "KILL :number"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        template = self.create(migrated=False)
        try:
            migrate(template)
            self._ddl = self._dump(make_url(template).database or "")
        finally:
            self.drop(template)

    def _dump(self, database: str) -> list[str]:
        with self._engine.connect() as connection:
            tables = [VERSION_TABLE, *metadata.tables]
            ddl = [connection.execute(text(f"SHOW CREATE TABLE {database}.{table}")).one()[1] for table in tables]
            revision = connection.execute(text(f"SELECT version_num FROM {database}.{VERSION_TABLE}")).scalar()
        return [*ddl, f"INSERT INTO {VERSION_TABLE} VALUES ('{revision}')"]

    def _create(self, *, migrated: bool) -> str:
        name = self._new_name()
        self._execute(f"CREATE DATABASE {name}")
        if migrated:
            self._execute(f"USE {name}", *self._ddl)
        return self._url_of(name)

    def drop(self, url: str) -> None:
        self._execute(f"DROP DATABASE IF EXISTS {make_url(url).database}")


def find_databases(server: str) -> Databases:
    """Return what makes databases on a server; skip the test if it does not answer."""
    try:
        return PostgresqlDatabases(address_of(server)) if server == "postgresql" else MysqlDatabases(address_of(server))
    except exc.OperationalError as error:
        report_missing(server, f"{_masked(make_url(address_of(server)))} does not answer: {error.orig}")


def _full(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _masked(url: URL) -> str:
    return url.render_as_string(hide_password=True)
