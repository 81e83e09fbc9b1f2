"""Django's own connection as the caller's transaction: what SQLAlchemy may do with it, and what it may not.

Nothing of Django is imported here: whoever passes one of its connections has done so.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, exc, make_url
from sqlalchemy.pool import NullPool

from orchestrator.errors import InvalidOperation
from orchestrator.store.engine import Store

#: The drivers that Django uses, and SQLAlchemy's name for each.
DRIVERS = {
    "sqlite3": "sqlite+pysqlite",
    "psycopg": "postgresql+psycopg",
    "psycopg2": "postgresql+psycopg2",
    "MySQLdb": "mysql+mysqldb",
    "pymysql": "mysql+pymysql",  # after its install_as_MySQLdb()
}

#: The connection that is lent at this moment, for the pool that asks for one.
_lent: ContextVar[_Lent] = ContextVar("lent_connection")

#: What SQLAlchemy learned about the databases that connections were lent of, by the name and address of each.
_engines: weakref.WeakKeyDictionary[Store, dict[tuple[object, ...], Engine]] = weakref.WeakKeyDictionary()


def find_wrapper(session: object) -> Any:
    """Return Django's ``DatabaseWrapper`` if ``session`` is one, or ``django.db.connection``; else ``None``."""
    base, proxies = sys.modules.get("django.db.backends.base.base"), sys.modules.get("django.utils.connection")
    if base is None or proxies is None:
        return None
    if isinstance(session, proxies.ConnectionProxy):  # django.db.connection is each thread's own
        session = session._connections[session._alias]
    return session if isinstance(session, base.BaseDatabaseWrapper) else None


def find_driver(wrapper: Any) -> str | None:
    """Return SQLAlchemy's name for the database and driver of a Django connection, ``None`` if we know neither."""
    module = getattr(getattr(wrapper, "Database", None), "__name__", "")
    return DRIVERS.get(module.partition(".")[0])


@contextmanager
def lent(wrapper: Any, store: Store) -> Iterator[Connection]:
    """Have SQLAlchemy write by Django's connection; its transaction stays Django's to commit and to roll back.

    Raises ``InvalidOperation`` where no transaction is open.  A database error breaks Django's transaction as one of
    its own queries would, and is raised as Django's own.
    """
    driver = _check(wrapper)
    raw = wrapper.connection
    token = _lent.set(_Lent(raw, wrapper.Database))
    try:
        engine = _engine_of(wrapper, driver, store)
        with engine.connect() as connection:
            yield connection
    except exc.DBAPIError as error:
        if wrapper.in_atomic_block:
            # as its own queries do: an atomic block that swallowed this would otherwise commit what is left, and
            # PostgreSQL answers the COMMIT of a failed transaction with a rollback that nobody is told of
            wrapper.needs_rollback = True
        if error.orig is None:
            raise
        with wrapper.wrap_database_errors:
            raise error.orig from error
    finally:
        _lent.reset(token)


def _check(wrapper: Any) -> str:
    what = f"session is Django's connection {wrapper.alias!r}"
    driver = find_driver(wrapper)
    if driver is None:
        engine = wrapper.settings_dict.get("ENGINE")
        raise InvalidOperation(f"{what}, whose ENGINE {engine!r} is of no database that a store can be on")
    wrapper.ensure_connection()
    wrapper.validate_thread_sharing()
    if not wrapper.in_atomic_block and wrapper.get_autocommit():
        raise InvalidOperation(
            f"{what}, and no transaction is open on it: call this within transaction.atomic(), "
            "or leave session out, and it is durable at once"
        )
    wrapper.validate_no_broken_transaction()
    return driver


def _engine_of(wrapper: Any, driver: str, store: Store) -> Engine:
    # not by the alias alone: tests under Django give it other databases
    key = (driver, wrapper.alias, *(str(wrapper.settings_dict.get(name)) for name in ("NAME", "HOST", "PORT")))
    engines = _engines.setdefault(store, {})
    found = engines.get(key)
    return engines.setdefault(key, _make_engine(driver)) if found is None else found


def _make_engine(driver: str) -> Engine:
    """Return an engine for connections that are lent; made without ``create_engine``, which would set them up."""
    url = make_url(f"{driver}://")
    kind = url.get_dialect()
    own: dict[str, Any] = {"use_native_hstore": False} if kind.name == "postgresql" else {}
    dialect = kind(dbapi=kind.import_dbapi(), **own)  # type: ignore[call-arg]
    pool = NullPool(_lent.get, reset_on_return=None, dialect=dialect)
    engine = Engine(pool, dialect, url)
    with engine.connect() as connection:
        dialect.initialize(connection)
    return engine


class _Lent:
    """Django's DBAPI connection, less what would end its transaction."""

    def __init__(self, raw: Any, module: Any) -> None:
        self._raw = raw
        self._open = _CURSORS[module.__name__.partition(".")[0]]
        self._module = module

    def cursor(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._open(self._raw, self._module)

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


# --- cursors that give what SQLAlchemy expects, whatever Django or its OPTIONS have set up --------------------------


def _sqlite_cursor(raw: Any, _module: Any) -> Any:
    cursor = raw.cursor()
    cursor.row_factory = _as_stored
    return cursor


def _as_stored(_cursor: Any, row: tuple[Any, ...]) -> tuple[Any, ...]:
    # Django's connections parse what is declared a DATETIME, and so would SQLAlchemy, which wants text
    return tuple(value.isoformat(" ", "microseconds") if isinstance(value, datetime) else value for value in row)


def _psycopg_cursor(raw: Any, module: Any) -> Any:
    from psycopg.types.datetime import TimestamptzLoader

    cursor = module.Cursor(raw, row_factory=module.rows.tuple_row)
    # Django's own puts its time zone in place of the one that was sent, none at all without USE_TZ
    cursor.adapters.register_loader("timestamptz", TimestamptzLoader)
    return cursor


def _psycopg2_cursor(raw: Any, module: Any) -> Any:
    return raw.cursor(cursor_factory=module.extensions.cursor)


def _mysql_cursor(raw: Any, module: Any) -> Any:
    return raw.cursor(module.cursors.Cursor)


_CURSORS: dict[str, Callable[[Any, Any], Any]] = {
    "sqlite3": _sqlite_cursor,
    "psycopg": _psycopg_cursor,
    "psycopg2": _psycopg2_cursor,
    "MySQLdb": _mysql_cursor,
    "pymysql": _mysql_cursor,
}
