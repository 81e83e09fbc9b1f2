"""Connections and transactions: made late, safe across forks, with the settings that the protocol needs.

READ COMMITTED everywhere; SQLite writes begin with ``BEGIN IMMEDIATE`` (a plain ``BEGIN`` fails at once, ignoring the
busy timeout, when it later needs the write lock).  The server ends a transaction that idles for longer than the
heartbeat limit, so that a frozen process does not keep an instance locked.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import tenacity
from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, exc, make_url, text

from orchestrator.errors import ConfigurationError, SecondWriter, StoreUnreachable
from orchestrator.store import migrations
from orchestrator.store.forking import guard
from orchestrator.store.prepared import Prepared

T = TypeVar("T")

#: What the current transaction is for: ``claim``, ``settle``, ``read settle`` … for logs, statistics, fault injection.
current_purpose: ContextVar[str] = ContextVar("current_purpose", default="")
_READ = "read"

#: So long after its last use a pooled connection is trusted by those who repeat the transaction where it is dead.
TRUSTED_SECONDS = 5.0
_is_repeated: ContextVar[bool] = ContextVar("is_repeated", default=False)

#: The SQLite file in which this thread has a write transaction that other people's code uses.
_lent_file: ContextVar[str | None] = ContextVar("lent_file", default=None)

BACKENDS = ("sqlite", "postgresql", "mysql", "mariadb")

_PERMANENT = (exc.IntegrityError, exc.ProgrammingError, exc.DataError, exc.NotSupportedError)


class Conflict(Exception):
    """Another process changed what this transaction was built on; it is rolled back and repeated."""


class Store:
    """A database.  Makes no connection before the first transaction; migrates the schema then, unless told not to."""

    def __init__(
        self, url: str, *, idle_limit_seconds: float = 15.0, migrate: bool = True, max_overflow: int = 10
    ) -> None:
        self.url = _checked_url(url)
        self.idle_limit_seconds = idle_limit_seconds
        self.migrate = migrate
        self.max_overflow = max_overflow
        #: Whether every transaction is repeated where it can be, as those of workers are.
        self.repeats_all = False
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._is_migrated = False
        _stores.add(self)

    @property
    def backend(self) -> str:
        """``sqlite``, ``postgresql``, ``mysql`` or ``mariadb``."""
        return self.url.get_backend_name()

    @property
    def is_sqlite(self) -> bool:
        return self.backend == "sqlite"

    @property
    def _is_psycopg(self) -> bool:
        """Whether the driver commits, in its mode without transactions, one that was begun by a statement."""
        return self.url.get_dialect().driver == "psycopg"

    def describe(self) -> str:
        """Return the URL without its password."""
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def begin(self, purpose: str, *, locks_late: bool = False) -> Iterator[Connection]:
        """Open a write transaction; it commits at the end of the block.

        ``locks_late``: where it can be it begins with ``lock_late``.  What is read before that keeps nobody from
        writing, and what is written is committed at once, one statement after the other.
        """
        if self.is_sqlite and _lent_file.get() == self.url.database:
            raise SecondWriter(self.describe())
        with self._transaction(purpose, begins=not locks_late) as connection:
            yield connection

    def lock_late(self, connection: Connection) -> None:
        """Begin a transaction that locks late."""
        if self.is_sqlite:
            _begin_immediate.run(connection, {})
        elif self._is_psycopg:
            _begin_read_committed.run(connection, {})

    @contextmanager
    def read(self, purpose: str) -> Iterator[Connection]:
        """Open a transaction that only reads."""
        with self._transaction(f"{_READ} {purpose}") as connection:
            yield connection

    @contextmanager
    def _transaction(self, purpose: str, *, begins: bool = True) -> Iterator[Connection]:
        engine = self._ready_engine()
        token = current_purpose.set(purpose)
        try:
            with guard.inside(), engine.connect() as connection:
                if not begins and self.is_sqlite:
                    connection.execution_options(orchestrator_begins=False)
                elif not begins and self._is_psycopg:
                    connection.execution_options(isolation_level="AUTOCOMMIT")
                with connection.begin():
                    yield connection
        finally:
            current_purpose.reset(token)

    def prepare(self) -> None:
        """Migrate the schema, if that has not been done; where it is current nothing is written."""
        self._ready_engine()

    def migrate_now(self) -> None:
        """Migrate the schema, also where that is not done at first use (``migrate=False``)."""
        engine = self._ready_engine()
        with guard.inside():
            migrations.upgrade(engine)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Have a write transaction of this store used by other people's code; opened by us, it is theirs to wait for.

        On SQLite this code would wait for itself if it began another one.
        """
        token = _lent_file.set(self.url.database)
        try:
            yield
        finally:
            _lent_file.reset(token)

    def _ready_engine(self) -> Engine:
        if self._engine is None or not self._is_migrated:
            with self._lock:
                if self._engine is None:
                    self._engine = self._make_engine()
                    event.listen(self._engine, "handle_error", _note_error)
                if not self._is_migrated:
                    with guard.inside():
                        self._migrate(self._engine)
                    self._is_migrated = True
        return self._engine

    def _migrate(self, engine: Engine) -> None:
        try:
            with engine.connect():
                pass
            if self.migrate:
                migrations.upgrade(engine)
        except exc.DBAPIError as error:
            if is_transient(error):
                raise StoreUnreachable(self.describe(), error.orig or error) from error
            raise

    def _make_engine(self) -> Engine:
        if self.is_sqlite:
            return _sqlite_engine(self.url, self.max_overflow)
        options: dict[str, Any] = {"isolation_level": "READ COMMITTED"}
        options |= {"pool_size": 5, "max_overflow": self.max_overflow}
        limit = self.idle_limit_seconds
        if self.backend == "postgresql":
            options["connect_args"] = _postgresql_arguments(self.url, limit)
            engine = create_engine(self.url, hide_parameters=True, **options)
            self._ping_where_idle(engine)
            return engine
        engine = create_engine(
            self.url, connect_args=_mysql_arguments(), pool_recycle=1800, hide_parameters=True, **options
        )
        event.listen(engine, "connect", lambda connection, _record: _limit_mysql_session(connection, limit))
        self._ping_where_idle(engine)
        return engine

    def _ping_where_idle(self, engine: Engine) -> None:
        """Ask a connection that comes from the pool whether it is alive, unless it was used of late and is trusted.

        SQLAlchemy's own ``pool_pre_ping`` asks each time: another round trip for every transaction.
        """

        @event.listens_for(engine, "checkin")
        def note_use(_connection: Any, record: Any) -> None:
            record.info["used_at"] = time.monotonic()

        @event.listens_for(engine, "checkout")
        def ping(connection: Any, record: Any, _fairy: Any) -> None:
            used_at = record.info.get("used_at")
            is_repeated = self.repeats_all or _is_repeated.get()
            if used_at is None or (is_repeated and time.monotonic() - used_at < TRUSTED_SECONDS):
                return
            try:
                alive = engine.dialect.do_ping(connection)
            except engine.dialect.loaded_dbapi.Error as error:
                raise exc.DisconnectionError from error  # the pool tries another one
            if not alive:
                raise exc.DisconnectionError

    def once_more(self, function: Callable[[], T], again: Callable[[], T]) -> T:
        """Do ``function``, a whole transaction, and ``again`` where its connection was lost, which may be an old one.

        Nobody can say then whether it was committed.
        """
        token = _is_repeated.set(True)
        try:
            return function()
        except exc.DBAPIError as error:
            if not error.connection_invalidated:
                raise
        finally:
            _is_repeated.reset(token)
        return again()

    def retrying(self, function: Callable[[], T], *, patience_seconds: float) -> T:
        """Repeat ``function``, a whole transaction, while the database is away or tells it to try again.

        Waits 50 ms at first, 2 s at most; hardly at all where another process was merely faster.  Raises the last error
        when ``patience_seconds`` have passed.
        """
        try:
            return function()  # most often that is all
        except Exception as error:
            if not is_transient(error) or patience_seconds <= 0:
                raise
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=_pause,
            stop=tenacity.stop_after_delay(patience_seconds),
            reraise=True,
        )
        return retrying(function)

    def dispose(self, *, close: bool = True) -> None:
        """Let go of all pooled connections; ``close=False`` in a forked child, whose parent still uses them."""
        if self._engine is not None:
            self._engine.dispose(close=close)

    def reset_after_fork(self) -> None:
        # the lock may be held by a thread that does not exist in this process
        self._lock = threading.Lock()
        self.dispose(close=False)


def _checked_url(url: str) -> URL:
    try:
        parsed = make_url(url)
        dialect = parsed.get_dialect()
        dialect.import_dbapi()
    except (exc.ArgumentError, exc.NoSuchModuleError, ImportError, ValueError) as error:
        # it may not be parsable at all, and the error is read by more people than may know the password
        masked = re.sub(r":[^:@/]*@", ":***@", str(url))
        raise ConfigurationError(f"the store URL {masked!r} cannot be used: {error}") from error
    if dialect.is_async or parsed.get_backend_name() not in BACKENDS:
        masked = parsed.render_as_string(hide_password=True)
        raise ConfigurationError(f"the store URL {masked!r} cannot be used: give a synchronous driver of {BACKENDS}")
    if parsed.get_backend_name() == "sqlite" and _is_in_memory(parsed):
        raise ConfigurationError("an SQLite store in memory is one process's own; give a file, sqlite:///sagas.db")
    return parsed


def _is_in_memory(url: URL) -> bool:
    return url.database in (None, "", ":memory:") or "mode=memory" in str(url)


_backoff = tenacity.wait_random_exponential(multiplier=0.05, max=2.0)
_again = tenacity.wait_random(0.0, 0.005)


def _pause(tried: tenacity.RetryCallState) -> float:
    was_overtaken = tried.outcome is not None and isinstance(tried.outcome.exception(), Conflict)
    return (_again if was_overtaken else _backoff)(tried)


def is_transient(error: BaseException) -> bool:
    """Tell whether repeating the whole transaction can help: lost connections, deadlocks, a locked database."""
    if isinstance(error, Conflict | StoreUnreachable | exc.TimeoutError):
        return True
    if not isinstance(error, exc.DBAPIError) or isinstance(error, _PERMANENT):
        return False
    # SQLite says of a missing table what it says of a locked one: OperationalError
    return getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR


#: Errors after which nothing is left of the transaction: serialization failures and deadlocks, by SQLSTATE, and by the
#: number of MySQL, which has one for a lock that was waited for in vain as well (how much that took back is a setting).
_ROLLED_BACK: tuple[object, ...] = ("40001", "40P01", 1205, 1213)


def is_rolled_back(error: exc.DBAPIError) -> bool:
    """Tell whether the database rolled a transaction back with this error, for no fault of the statement's.

    Stricter than ``is_transient``: of statements that are not ours, drivers call much transient that never succeeds.
    """
    original = error.orig
    code = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return error.connection_invalidated or code in _ROLLED_BACK or next(iter(_args(original)), None) in _ROLLED_BACK


def _args(error: BaseException | None) -> tuple[object, ...]:
    return () if error is None else error.args


def _note_error(context: ExceptionContext) -> None:
    """Tell whoever lent a connection to other people's code of errors that this code may swallow."""
    if context.connection is not None and isinstance(context.sqlalchemy_exception, exc.DBAPIError):
        noted = context.connection.get_execution_options().get("orchestrator_errors")
        if noted is not None:
            noted.append(context.sqlalchemy_exception)


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.reset_after_fork()


def _close_sqlite_connections() -> None:
    """A connection is a file handle with locks of its process; carried over a fork it corrupts the database."""
    for store in list(_stores):
        if store.is_sqlite:
            store.dispose()


guard.call_before_fork(_close_sqlite_connections)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


_begin, _begin_immediate = Prepared(text("BEGIN")), Prepared(text("BEGIN IMMEDIATE"))
_begin_read_committed = Prepared(text("BEGIN ISOLATION LEVEL READ COMMITTED"))


def _sqlite_engine(url: Any, max_overflow: int) -> Engine:
    arguments = {"timeout": 60, "check_same_thread": False}
    engine = create_engine(url, connect_args=arguments, max_overflow=max_overflow, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would begin by itself, and never IMMEDIATE
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("orchestrator_begins", True):
            return
        only_reads = current_purpose.get().startswith(f"{_READ} ")
        immediate = options.get("orchestrator_immediate", not only_reads)
        (_begin_immediate if immediate else _begin).run(connection, {})

    return engine


def _postgresql_arguments(url: URL, limit_seconds: float) -> dict[str, Any]:
    milliseconds = max(1000, int(limit_seconds * 1000))
    seconds = max(1, int(limit_seconds / 3))
    own = url.query.get("options", "")  # a search_path, perhaps: what is given here takes the place of the URL's
    given = own if isinstance(own, str) else " ".join(own)
    return {
        "options": f"{given} -c default_transaction_isolation=read\\ committed "
        f"-c idle_in_transaction_session_timeout={milliseconds} -c tcp_keepalives_idle={seconds} "
        f"-c tcp_keepalives_interval={seconds} -c tcp_keepalives_count=3 -c tcp_user_timeout={milliseconds}",
        "connect_timeout": 5,
        "keepalives_idle": seconds,
        "keepalives_interval": seconds,
        "keepalives_count": 3,
    }


def _mysql_arguments() -> dict[str, Any]:
    return {"connect_timeout": 5, "read_timeout": 120, "write_timeout": 120, "charset": "utf8mb4"}


def _limit_mysql_session(connection: Any, limit_seconds: float) -> None:
    seconds = max(1, round(limit_seconds))
    is_mariadb = "mariadb" in connection.get_server_info().lower()
    with connection.cursor() as cursor:
        if is_mariadb:
            cursor.execute(f"SET SESSION idle_transaction_timeout={seconds}")
        else:
            # MySQL has no limit on idle transactions alone; the pool notices a closed connection before it is used
            cursor.execute(f"SET SESSION wait_timeout={seconds}")
