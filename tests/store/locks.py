"""Who waits for a lock, and stopping a transaction where a test wants it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sqlalchemy import event, text

from orchestrator.store.engine import Store, current_purpose

_ON_POSTGRESQL = (
    "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid IN "
    "(SELECT pid FROM pg_stat_activity WHERE datname = current_database())"
)
_ON_MYSQL = "SELECT id FROM information_schema.processlist WHERE db = DATABASE()"


def count_waiting(store: Store) -> int:
    """Return how many transactions on this database wait for a lock (not told by SQLite)."""
    with store.read("look") as connection:
        if store.backend == "postgresql":
            return int(connection.execute(text(_ON_POSTGRESQL)).scalar_one())
        own = {str(row[0]) for row in connection.execute(text(_ON_MYSQL))}
        # not information_schema.innodb_trx: it is a copy, and stays as it is while anybody looks at it often
        status = str(connection.execute(text("SHOW ENGINE INNODB STATUS")).one()[2])
    transactions = [part for part in status.split("---TRANSACTION") if "LOCK WAIT" in part]
    threads = [re.search(r"thread id (\d+)", part) for part in transactions]
    return sum(thread is not None and thread[1] in own for thread in threads)


def before_commit(store: Store, function: Callable[[], None], purpose: str) -> None:
    """Call ``function`` once, inside the next transaction for ``purpose``, before it commits."""
    pending = [function]

    def commits(_connection: Any) -> None:
        if pending and current_purpose.get() == purpose:
            pending.pop()()

    event.listen(engine_of(store), "commit", commits)


def before_statement(store: Store, function: Callable[[str], None]) -> None:
    """Call ``function`` with each statement, before it is executed."""

    def executes(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        function(statement)

    event.listen(engine_of(store), "before_cursor_execute", executes)


def lose_answer(store: Store, error: Exception, purpose: str) -> None:
    """Lose the answer to the next COMMIT for ``purpose``: it takes effect, and ``error`` is raised."""
    dialect = engine_of(store).dialect
    commit = dialect.do_commit

    def do_commit(connection: Any) -> None:
        commit(connection)
        if current_purpose.get() == purpose:
            del dialect.do_commit
            raise error

    dialect.do_commit = do_commit


def engine_of(store: Store) -> Any:
    with store.read("open"):
        return store._engine
