"""The caller's own transaction: writing into it, and doing something once it has committed.

On SQLite the caller holds the database's only write lock until it commits, so nothing here, nor whoever uses this,
writes by another connection before that.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection, Engine, event, exc, inspect

from orchestrator.errors import InvalidOperation
from orchestrator.runtime import django_connection
from orchestrator.store import migrations
from orchestrator.store.engine import Store
from orchestrator.store.tables import outbox

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

    #: What may be given as ``session=``; the last one is Django's ``connection``.
    CallersSession: TypeAlias = Session | scoped_session[Any] | Connection | BaseDatabaseWrapper

logger = logging.getLogger("orchestrator")

_MYSQL = ("mysql", "mariadb")

#: Stores whose tables were found by an engine of a caller's, so that it is looked once.
_checked: weakref.WeakKeyDictionary[Engine, weakref.WeakSet[Store]] = weakref.WeakKeyDictionary()


@contextmanager
def writing(session: CallersSession, store: Store) -> Iterator[Connection]:
    """Give the connection whose transaction is the caller's, to be written to.

    ``session`` is a SQLAlchemy ``Session``, ``scoped_session`` or ``Connection`` on the database of ``store``, or
    Django's connection to it; anything else is refused with ``InvalidOperation``, as is a connection in autocommit
    mode, or one to another database.
    """
    wrapper = django_connection.find_wrapper(session)
    if wrapper is None:
        connection = _connection_of(session)
        _make_ready(connection, store)
        yield connection
        return
    with django_connection.lent(wrapper, store) as connection:
        _make_ready(connection, store)
        yield connection


def tells_of_commits(session: CallersSession) -> bool:
    """Tell whether ``after_commit`` does anything for ``session``.

    A ``Connection`` has no event that comes after its commit, and a ``Session`` bound to one may be inside of a
    transaction that is committed by somebody else: what they leave behind is found by the poller.  Django tells of
    the end of ``atomic()``.
    """
    wrapper = django_connection.find_wrapper(session)
    if wrapper is not None:
        return bool(wrapper.in_atomic_block)
    own = _session_of(session)
    return own is not None and not isinstance(own.get_bind(), Connection)


def after_commit(session: CallersSession, do: Callable[[], object]) -> None:
    """Call ``do`` once, when the outermost transaction of ``session`` has committed.

    It is not called if that is rolled back, nor if a savepoint is that is open now; and never for a ``Connection``
    (see ``tells_of_commits``).  What it raises is logged: the caller has committed.
    """
    wrapper = django_connection.find_wrapper(session)
    if wrapper is not None:
        if wrapper.in_atomic_block:
            wrapper.on_commit(functools.partial(_call, do))
        return
    own = _session_of(session)
    if own is not None and tells_of_commits(own):
        _AfterCommit.of(own).add(own, do)


# --- what is taken ------------------------------------------------------------------------------------------------


def _session_of(session: CallersSession) -> Session | None:
    """Return the session, ``None`` for a connection, or refuse what is neither."""
    # late: whoever has a session has imported it, and to others it would be the larger half of SQLAlchemy
    from sqlalchemy.orm import Session, scoped_session

    match session:
        case Session():
            return session
        case scoped_session():
            return _session_of(session())
        case Connection():
            return None
    kind = f"{type(session).__module__}.{type(session).__qualname__}"
    raise InvalidOperation(
        f"session is a {kind}; a SQLAlchemy Session, scoped_session or Connection, or Django's connection, on the "
        "store's database is taken"
    )


def _connection_of(session: CallersSession) -> Connection:
    own = _session_of(session)
    if own is None:
        assert isinstance(session, Connection)
        return session
    try:
        return own.connection()
    except exc.UnboundExecutionError as error:
        raise InvalidOperation(
            "session is bound to no single database; pass session.connection(…) of the store's database instead"
        ) from error


def _make_ready(connection: Connection, store: Store) -> None:
    _check_kind(connection, store)
    known = _checked.setdefault(connection.engine, weakref.WeakSet())
    if store not in known:
        _check_tables(connection, store)
        known.add(store)
    if store.is_sqlite and not _is_in_transaction(connection):
        # the driver begins late, and a savepoint that comes before its BEGIN is a transaction of its own:
        # releasing it would commit what the caller may still roll back
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_kind(connection: Connection, store: Store) -> None:
    name = connection.dialect.name
    if name != store.backend and not (name in _MYSQL and store.backend in _MYSQL):
        raise InvalidOperation(
            f"session is on a {name} database, and the store {store.describe()} is not; the caller's transaction "
            "must be one on the store's database"
        )
    level = connection.get_execution_options().get("isolation_level")
    level = level or getattr(connection.dialect, "_on_connect_isolation_level", None)
    if level == "AUTOCOMMIT":
        raise InvalidOperation("session is in autocommit mode: there is no transaction that could be rolled back")


def _check_tables(connection: Connection, store: Store) -> None:
    """Make sure that the caller's connection sees the store's tables; they are made first if need be."""
    missing = (
        f"the tables of the store {store.describe()} are not in the database of session, or not of this version; "
        "is it the same database? They are made by a worker that starts, by orchestrator.migrate(), and by "
        "celery -A … orchestrator migrate"
    )
    if store.is_sqlite:
        _check_name(connection, store)
        if _is_in_transaction(connection) and not migrations.is_current(connection):
            raise InvalidOperation(f"{missing} while no transaction is open")  # ours would wait for the caller's end
    store.prepare()
    if not store.is_sqlite:
        _check_name(connection, store)
    if not inspect(connection).has_table(outbox.name):
        raise InvalidOperation(missing)


def _check_name(connection: Connection, store: Store) -> None:
    """Refuse a database that has another name than the store's, though it may have such tables as well."""
    own = _name_of(connection)
    if store.is_sqlite:
        path = Path(store.url.database or "")
        # a URI is not a path; its tables have to tell
        is_own = str(path).startswith("file:") or (path.exists() and bool(own) and path.samefile(own))
    else:
        # asked for, as the URL need not say: its name may be the user's, or come from a service file
        with store.read("name") as connection_of_store:
            is_own = own == _name_of(connection_of_store)
    if not is_own:
        raise InvalidOperation(
            f"session is on the database {own!r}, and the store {store.describe()} is another one; the caller's "
            "transaction must be one on the store's database"
        )


def _name_of(connection: Connection) -> str:
    match connection.dialect.name:
        case "sqlite":
            rows = connection.exec_driver_sql("PRAGMA database_list").all()
            return str(next((row[2] for row in rows if row[1] == "main"), ""))
        case "postgresql":
            return str(connection.exec_driver_sql("SELECT current_database()").scalar())
        case _:
            return str(connection.exec_driver_sql("SELECT DATABASE()").scalar())


def _is_in_transaction(connection: Connection) -> bool:
    """Tell whether SQLite's own driver has begun; SQLAlchemy may think so before it has."""
    return bool(getattr(connection.connection.driver_connection, "in_transaction", True))


# --- after the commit ---------------------------------------------------------------------------------------------

_KEY = "orchestrator_after_commit"


class _AfterCommit:
    """What is to be done when a session has committed.

    One for each session, for as long as that lives: it listens once, so that nothing piles up in a session that is
    rolled back, or reused.
    """

    def __init__(self) -> None:
        # each with the transactions around it, the innermost savepoint first, the root last
        self._entries: list[tuple[tuple[SessionTransaction, ...], Callable[[], object]]] = []
        self._committed: SessionTransaction | None = None

    @classmethod
    def of(cls, session: Session) -> _AfterCommit:
        found: _AfterCommit | None = session.info.get(_KEY)
        if found is None:
            found = session.info[_KEY] = cls()
            event.listen(session, "after_commit", found._note_commit)
            event.listen(session, "after_transaction_end", found._note_end)
        return found

    def add(self, session: Session, do: Callable[[], object]) -> None:
        around = []
        transaction = session.get_nested_transaction() or session.get_transaction()
        while transaction is not None:
            if _is_real(transaction):
                around.append(transaction)
            transaction = transaction.parent
        self._entries.append((tuple(around), do))

    def _note_commit(self, session: Session) -> None:
        # comes for savepoints too, before their end
        self._committed = session.get_nested_transaction() or session.get_transaction()

    def _note_end(self, _session: Session, transaction: SessionTransaction) -> None:
        if not _is_real(transaction):
            return
        is_committed, self._committed = transaction is self._committed, None
        if not is_committed:
            self._entries = [entry for entry in self._entries if transaction not in entry[0]]
        elif transaction.parent is None:
            # here and not at the commit: the session has let its connection go
            entries, self._entries = self._entries, []
            for _, do in entries:
                _call(do)


def _is_real(transaction: SessionTransaction) -> bool:
    """Tell whether the database knows of it; a flush opens one within the session only."""
    return transaction.nested or transaction.parent is None


def _call(do: Callable[[], object]) -> None:
    try:
        do()
    except SoftTimeLimitExceeded:  # raised by a signal, at any moment, for the task that committed
        raise
    except Exception:
        logger.exception("what was to follow a commit failed, and is left to the poller")
