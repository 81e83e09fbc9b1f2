"""Statements of the hot path: compiled once for each engine, run on the driver's own cursor.

SQLAlchemy builds, keys and looks up a statement at every execution, which costs several times what the databases take
for these.  Whoever listens to the statements of an engine (tracing does) sees them all the same: they take the usual
way there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.elements import BindParameter, TextClause
from sqlalchemy.sql.expression import Executable
from sqlalchemy.types import TypeEngine

Processor = Callable[[Any], Any]


class Prepared:
    """A statement whose parameters are all plain ones: no lists that are expanded.

    ``connection`` belongs to the caller, and so does its transaction.  Errors are SQLAlchemy's.
    """

    def __init__(self, statement: Executable) -> None:
        self.statement = statement
        self._compiled: weakref.WeakKeyDictionary[Dialect, _Compiled] = weakref.WeakKeyDictionary()

    def rows(self, connection: Connection, parameters: Mapping[str, Any]) -> list[Any]:
        """Return all rows, each a sequence of values."""
        if _is_listened_to(connection):
            return list(connection.execute(self.statement, dict(parameters)))
        compiled = self._for(connection)
        with _at_once(connection):  # with the BEGIN before it
            cursor = compiled.execute(connection, parameters)
        try:
            return compiled.fetch(cursor)
        finally:
            cursor.close()

    def first(self, connection: Connection, parameters: Mapping[str, Any]) -> Any | None:
        """Return the first row, ``None`` where there is none."""
        found = self.rows(connection, parameters)
        return found[0] if found else None

    def run(self, connection: Connection, parameters: Mapping[str, Any]) -> int:
        """Execute, and return how many rows it met."""
        if _is_listened_to(connection):
            return connection.execute(self.statement, dict(parameters)).rowcount
        cursor = self._for(connection).execute(connection, parameters)
        try:
            return int(cursor.rowcount)
        finally:
            cursor.close()

    def _for(self, connection: Connection) -> _Compiled:
        compiled = self._compiled.get(connection.dialect)
        if compiled is None:
            compiled = self._compiled[connection.dialect] = _Compiled(self.statement, connection.dialect)
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
        connection, writes = self._connection, self._writes
        if _is_listened_to(connection) or not _has_pipeline(connection):
            return all(expects in (None, prepared.run(connection, given)) for prepared, given, expects in writes)
        with _at_once(connection):
            cursors = [prepared._for(connection).execute(connection, given) for prepared, given, _ in writes]
        met = [int(cursor.rowcount) for cursor in cursors]
        for cursor in cursors:
            cursor.close()
        return all(expects in (None, count) for count, (_, _, expects) in zip(met, writes, strict=True))


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


class _Compiled:
    """A statement as one engine's driver takes it."""

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        untyped: Any = statement
        compiled = untyped.compile(dialect=dialect)
        self.sql = str(compiled)
        self.dialect = dialect
        order = compiled.positiontup if compiled.positional else list(compiled.bind_names.values())
        binds: dict[str, BindParameter[Any]] = {name: bind for bind, name in compiled.bind_names.items()}
        # (name in the statement, key of the caller's value, the value where it is the statement's own, processor)
        self.binds = [(name, *_source(binds[name]), _bind_processor(binds[name], dialect)) for name in order]
        self.is_positional = bool(compiled.positional)
        columns = () if isinstance(statement, TextClause) else untyped._all_selected_columns
        self.types: list[TypeEngine[Any]] = [column.type for column in columns]
        self.processors: list[tuple[int, Processor]] | None = None

    def execute(self, connection: Connection, parameters: Mapping[str, Any]) -> Any:
        values: Any = []
        for _name, key, own, processor in self.binds:
            value = own if key is None else parameters[key]
            values.append(value if processor is None else processor(value))
        if not self.is_positional:
            values = {bind[0]: value for bind, value in zip(self.binds, values, strict=True)}
        cursor = connection.connection.cursor()
        try:
            cursor.execute(self.sql, values)
        except (self.dialect.loaded_dbapi.Error, KeyboardInterrupt, SystemExit) as error:
            # what SQLAlchemy does with errors of its own executions: it wraps them, tells those that listen for errors,
            # and throws a connection away that is lost, or that was interrupted in the middle of an answer
            connection._handle_dbapi_exception(error, self.sql, None, cursor, None)
        return cursor

    def fetch(self, cursor: Any) -> list[Any]:
        """Return all rows, with values of the types that their columns have in Python."""
        if self.processors is None:  # some depend on the types that the driver tells with the first answer
            codes = [description[1] for description in cursor.description]
            found = [_result_processor(*each, self.dialect) for each in zip(self.types, codes, strict=True)]
            self.processors = [(index, each) for index, each in enumerate(found) if each is not None]
        rows = [list(row) for row in cursor.fetchall()]
        for index, processor in self.processors:
            for row in rows:
                row[index] = processor(row[index])
        return rows


def _has_pipeline(connection: Connection) -> bool:
    dialect: Any = connection.dialect
    return dialect.driver == "psycopg" and bool(dialect.loaded_dbapi.Pipeline.is_supported())


@contextmanager
def _at_once(connection: Connection) -> Iterator[None]:
    """Send what the block executes without waiting for answers in between (libpq's pipeline mode), if the driver can.

    An answer is there at its end.
    """
    if not _has_pipeline(connection):
        yield
        return
    driven: Any = connection.connection.dbapi_connection
    try:
        with driven.pipeline():
            yield
    except connection.dialect.loaded_dbapi.Error as error:
        connection._handle_dbapi_exception(error, None, None, None, None)


def _source(bind: BindParameter[Any]) -> tuple[str | None, Any]:
    """Return the key under which a caller gives a value, or ``None`` and the value that the statement has itself."""
    return (bind.key, None) if bind.required else (None, bind.effective_value)


def _bind_processor(bind: BindParameter[Any], dialect: Dialect) -> Processor | None:
    return bind.type.dialect_impl(dialect).bind_processor(dialect)


def _result_processor(kind: TypeEngine[Any], code: object, dialect: Dialect) -> Processor | None:
    return kind.dialect_impl(dialect).result_processor(dialect, code)


def _is_listened_to(connection: Connection) -> bool:
    dispatch: Any = connection.engine.dispatch
    return bool(dispatch.before_cursor_execute or dispatch.after_cursor_execute or connection.engine.echo)
