"""Migrations of our tables, by Alembic, with a version table of our own; safe when many processes start at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, Table, column, inspect, select, table, text

from orchestrator.store.tables import VERSION_TABLE, metadata

#: The newest revision under ``versions/``; a test compares.
HEAD = "0003"
_LOCK = 0x53414741  # "SAGA": the number of PostgreSQL's advisory lock


def upgrade(engine: Engine) -> None:
    """Bring the schema to ``HEAD``; do nothing where it is there already."""
    # a look takes no lock: it may be a caller's transaction, waiting for this, that holds SQLite's only one
    looking = engine.execution_options(orchestrator_immediate=False)
    with looking.connect() as connection, connection.begin():
        if is_current(connection):
            return
    with engine.connect() as connection, _alone(connection), connection.begin():
        revision = find_revision(connection)
        if revision is None and connection.dialect.name in ("mysql", "mariadb"):
            _clear_away(connection)
        if not _is_current(revision):
            _run(connection)


def is_current(connection: Connection) -> bool:
    """Tell whether the tables that a connection sees are those of ``HEAD``, or newer ones."""
    return _is_current(find_revision(connection))


def _is_current(revision: str | None) -> bool:
    """Tell whether there is nothing to do: revisions are numbers, and a newer one is left to the code it belongs to."""
    return revision is not None and revision >= HEAD


def find_revision(connection: Connection) -> str | None:
    """Return the schema's revision, ``None`` for an empty database."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(select(column("version_num")).select_from(table(VERSION_TABLE))).scalar()


def _clear_away(connection: Connection) -> None:
    """Drop the tables that a first migration left when its process was killed: MySQL commits each one by itself."""
    for left in metadata.sorted_tables:
        if inspect(connection).has_table(left.name) and _is_empty(connection, left):
            left.drop(connection)


def _is_empty(connection: Connection, left: Table) -> bool:
    # what it was made by may be older than ``left``: no column of it is named
    return connection.execute(select(text("1")).select_from(left).limit(1)).first() is None


def _run(connection: Connection) -> None:
    with _hushed(logging.getLogger("alembic")):
        # imported late: Alembic is needed once in the life of a database, its import is not cheap
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _hushed(logger: logging.Logger) -> Iterator[None]:
    """Have only warnings logged, unless somebody is debugging: a dozen lines would greet the first start."""
    level = logger.level
    if not logger.isEnabledFor(logging.DEBUG):
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Keep other processes out while the schema changes; SQLite's ``BEGIN IMMEDIATE`` does so by itself."""
    match connection.dialect.name:
        case "postgresql":
            take, leave = f"SELECT pg_advisory_lock({_LOCK})", f"SELECT pg_advisory_unlock({_LOCK})"
        case "mysql" | "mariadb":
            take, leave = (
                "SELECT GET_LOCK('orchestrator_migrations', 60)",
                "SELECT RELEASE_LOCK('orchestrator_migrations')",
            )
        case _:
            yield
            return
    with connection.begin():
        while connection.execute(text(take)).scalar() == 0:
            pass  # MySQL gives up waiting after its timeout, and says so only here
    try:
        yield
    finally:
        with connection.begin():
            connection.execute(text(leave))
