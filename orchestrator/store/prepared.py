"""Statements of the hot path: compiled once for each engine, run on the driver's own cursor.

SQLAlchemy builds, keys and looks up a statement at every execution, which costs several times what the databases take
for these.  Whoever listens to the statements of an engine (tracing does) sees them all the same: they take the usual
way there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.expression import Executable

from orchestrator.store.compiled import Compiled, Together, at_once, has_pipeline, is_listened_to, is_psycopg


class Prepared:
    """A statement whose parameters are all plain ones: no lists that are expanded.

    ``connection`` belongs to the caller, and so does its transaction.  Errors are SQLAlchemy's.
    """

    def __init__(self, statement: Executable) -> None:
        self.statement = statement
        self._compiled: weakref.WeakKeyDictionary[Dialect, Compiled] = weakref.WeakKeyDictionary()

    def rows(self, connection: Connection, parameters: Mapping[str, Any]) -> list[Any]:
        """Return all rows, each a sequence of values."""
        if is_listened_to(connection):
            return list(connection.execute(self.statement, dict(parameters)))
        compiled = self._for(connection)
        with at_once(connection, 1):
            cursor = compiled.execute(connection, parameters)
        try:
            return compiled.fetch(connection, cursor)
        finally:
            cursor.close()

    def first(self, connection: Connection, parameters: Mapping[str, Any]) -> Any | None:
        """Return the first row, ``None`` where there is none."""
        found = self.rows(connection, parameters)
        return found[0] if found else None

    def run(self, connection: Connection, parameters: Mapping[str, Any]) -> int:
        """Execute, and return how many rows it met."""
        if is_listened_to(connection):
            # that of an insertion is not kept, if nobody says so
            options: dict[str, Any] = {"preserve_rowcount": True}
            return connection.execute(self.statement, dict(parameters), execution_options=options).rowcount
        cursor = self._for(connection).execute(connection, parameters)
        try:
            return int(cursor.rowcount)
        finally:
            cursor.close()

    def _for(self, connection: Connection) -> Compiled:
        compiled = self._compiled.get(connection.dialect)
        if compiled is None:
            compiled = self._compiled[connection.dialect] = Compiled(self.statement, connection)
        return compiled


class Batch:
    """Writes of one transaction, none of which needs the answer to another: sent together where the driver can."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._writes: list[tuple[Prepared, Mapping[str, Any], int | None]] = []

    def add(self, prepared: Prepared, parameters: Mapping[str, Any], expects: int | None = None) -> None:
        """Add a statement, and how many rows it has to meet."""
        self._writes.append((prepared, parameters, expects))

    def run(self) -> bool:
        """Execute all; ``False`` where one of them met other than what it was to meet: then roll back."""
        return self._run(self._writes)

    def run_guarded(self) -> bool:
        """Do the same, the others only where the first one has met what it was to meet.

        It locks what guards the others; whoever wrote them without that lock could wait for those that wait for him.
        """
        return self._run(self._writes[:1]) and self._run(self._writes[1:])

    def _run(self, writes: list[tuple[Prepared, Mapping[str, Any], int | None]]) -> bool:
        connection = self._connection
        if is_listened_to(connection) or not has_pipeline(connection):
            return all(expects in (None, prepared.run(connection, given)) for prepared, given, expects in writes)
        cursors: list[Any] = []
        try:
            with at_once(connection, len(writes)):
                cursors += [prepared._for(connection).execute(connection, given) for prepared, given, _ in writes]
            met = [int(cursor.rowcount) for cursor in cursors]
            return all(expects in (None, each) for each, (_, _, expects) in zip(met, writes, strict=True))
        finally:
            for cursor in cursors:
                cursor.close()

    def run_alone(self) -> bool:
        """Execute all as one statement, which is a transaction of its own; ``False``: nothing was written.

        For a connection of ``may_run_alone`` that is not in a transaction.  The first write locks what guards the rest:
        the others wait for it.
        """
        which = tuple((prepared, expects) for prepared, _, expects in self._writes)
        kept = _together.setdefault(self._connection.dialect, {})
        together = kept.get(which)
        if together is None:
            every = [(prepared._for(self._connection), expects) for prepared, expects in which]
            together = kept[which] = Together(every)
        return together.run(self._connection, [given for _, given, _ in self._writes])


class PreparedWrites:
    """Statements that differ in the columns that they write: one for each set of these that was ever asked for."""

    def __init__(self, make: Callable[[tuple[str, ...]], Executable]) -> None:
        self._make = make
        self._prepared: dict[tuple[str, ...], Prepared] = {}

    def of(self, columns: tuple[str, ...]) -> Prepared:
        prepared = self._prepared.get(columns)
        if prepared is None:
            prepared = self._prepared[columns] = Prepared(self._make(columns))
        return prepared


_together: weakref.WeakKeyDictionary[Dialect, dict[tuple[tuple[Prepared, int | None], ...], Together]]
_together = weakref.WeakKeyDictionary()


def may_run_alone(connection: Connection) -> bool:
    """Tell whether several writes can be one statement here."""
    return is_psycopg(connection) and not is_listened_to(connection)
