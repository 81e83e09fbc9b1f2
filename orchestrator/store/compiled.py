"""Statements as one engine's driver takes them: compiled, with values converted, and sent as few times as can be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Dialect, exc
from sqlalchemy.sql.elements import BindParameter, TextClause
from sqlalchemy.sql.expression import Executable
from sqlalchemy.types import TypeEngine

Processor = Callable[[Any], Any]


class Compiled:
    """A statement as one engine's driver takes it."""

    def __init__(self, statement: Executable, connection: Connection) -> None:
        untyped: Any = statement
        dialect, is_numbered = connection.dialect, is_psycopg(connection)
        compiled = untyped.compile(dialect=dialect)
        order = compiled.positiontup if compiled.positional else list(dict.fromkeys(compiled.bind_names.values()))
        binds: dict[str, BindParameter[Any]] = {name: bind for bind, name in compiled.bind_names.items()}
        # (key of the caller's value, the value where it is the statement's own, processor)
        self.binds = [(*_source(binds[name]), _bind_processor(binds[name], dialect)) for name in order]
        self.names = None if compiled.positional or is_numbered else order
        self.sql = _numbered(str(compiled), order) if is_numbered else str(compiled)
        columns = () if isinstance(statement, TextClause) else untyped._all_selected_columns
        self.types: list[TypeEngine[Any]] = [column.type for column in columns]
        self.processors: list[tuple[int, Processor]] | None = None

    def execute(self, connection: Connection, parameters: Mapping[str, Any]) -> Any:
        values = self.values(parameters)
        return _execute(
            connection, self.sql, values if self.names is None else dict(zip(self.names, values, strict=True))
        )

    def values(self, parameters: Mapping[str, Any]) -> list[Any]:
        """Return what the driver is given, in the order of ``binds``."""
        values = []
        for key, own, processor in self.binds:
            value = own if key is None else parameters[key]
            values.append(value if processor is None else processor(value))
        return values

    def fetch(self, connection: Connection, cursor: Any) -> list[Any]:
        """Return all rows, with values of the types that their columns have in Python."""
        dialect = connection.dialect
        if self.processors is None:  # some depend on the types that the driver tells with the first answer
            codes = [description[1] for description in cursor.description]
            found = [_result_processor(*each, dialect) for each in zip(self.types, codes, strict=True)]
            self.processors = [(index, each) for index, each in enumerate(found) if each is not None]
        try:
            rows = [list(row) for row in cursor.fetchall()]
        except dialect.loaded_dbapi.Error as error:  # SQLite commits a statement of its own with its last row
            connection._handle_dbapi_exception(error, self.sql, None, cursor, None)
        for index, processor in self.processors:
            for row in rows:
                row[index] = processor(row[index])
        return rows


class Together:
    """Writes of PostgreSQL as one statement: the others are executed only if the first one has met what it had to.

    Its parts all see what was there before it, so none of them may touch what another writes.
    """

    def __init__(self, parts: Sequence[tuple[Compiled, int | None]]) -> None:
        self._parts = [compiled for compiled, _ in parts]
        texts, before = [], 0
        for number, each in enumerate(self._parts):
            text = _renumbered(each.sql, before)
            before += len(each.binds)
            texts.append(f"w{number} AS ({_after_first(text) if number else text} RETURNING 1)")
        expected = [(number, met) for number, (_, met) in enumerate(parts) if met is not None]
        is_met = [f"{met} = (SELECT count(*) FROM w{number})" for number, met in expected]  # noqa: S608 - numbers
        # nothing but an error takes back what a statement has written
        rest = f"1 / CASE WHEN {' AND '.join(is_met[1:]) or 'true'} THEN 1 ELSE 0 END"
        self._sql = f"WITH {', '.join(texts)} SELECT CASE WHEN {is_met[0]} THEN {rest} ELSE 0 END"

    def run(self, connection: Connection, parameters: Sequence[Mapping[str, Any]]) -> bool:
        """Execute it; ``False`` where a part has not met what it had to, or a record is there already."""
        values = [each for part, given in zip(self._parts, parameters, strict=True) for each in part.values(given)]
        try:
            with _execute(connection, self._sql, values) as cursor:
                return bool(cursor.fetchone()[0])
        except exc.DataError as error:
            if getattr(error.orig, "sqlstate", None) == DIVISION_BY_ZERO:
                return False
            raise
        except exc.IntegrityError:
            return False


DIVISION_BY_ZERO = "22012"


def _after_first(sql: str) -> str:
    """Let an update, whose condition is its end, or an insertion of values depend on the first part."""
    is_first_met = "EXISTS (SELECT FROM w0)"
    if sql.startswith("UPDATE"):
        return f"{sql} AND {is_first_met}"
    guarded, count = re.subn(r" VALUES \((.*)\)$", rf" SELECT \1 WHERE {is_first_met}", sql)
    if count != 1:  # written as it is, it would not wait for the first part
        raise ValueError(f"neither an update nor an insertion of values: {sql}")
    return guarded


def is_psycopg(connection: Connection) -> bool:
    """Tell whether a connection is psycopg's own, and none of Django's that was lent to us."""
    driver: Any = connection.dialect.loaded_dbapi
    return connection.dialect.driver == "psycopg" and isinstance(
        connection.connection.dbapi_connection, driver.Connection
    )


def _numbered(sql: str, names: Sequence[str]) -> str:
    """Write parameters as PostgreSQL does (``$1``): psycopg would do it at each execution of a statement this long."""
    places = {name: index for index, name in enumerate(names, 1)}
    return re.sub(r"%\((\w+)\)s", lambda found: f"${places[found[1]]}", sql).replace("%%", "%")


def _renumbered(sql: str, before: int) -> str:
    return re.sub(r"\$(\d+)", lambda found: f"${int(found[1]) + before}", sql)


def _execute(connection: Connection, sql: str, values: Any) -> Any:
    driver: Any = connection.dialect.loaded_dbapi
    driven: Any = connection.connection
    cursor = driver.RawCursor(driven.dbapi_connection) if is_psycopg(connection) else driven.cursor()
    try:
        cursor.execute(sql, values)
    except (connection.dialect.loaded_dbapi.Error, KeyboardInterrupt, SystemExit) as error:
        # what SQLAlchemy does with errors of its own executions: it wraps them, tells those that listen for errors,
        # and throws a connection away that is lost, or that was interrupted in the middle of an answer
        connection._handle_dbapi_exception(error, sql, None, cursor, None)
    return cursor


def has_pipeline(connection: Connection) -> bool:
    driver: Any = connection.dialect.loaded_dbapi
    return is_psycopg(connection) and bool(driver.Pipeline.is_supported())


@contextmanager
def at_once(connection: Connection, count: int) -> Iterator[None]:
    """Send the ``count`` statements that the block executes, with the BEGIN that may be due before them, at once.

    Without waiting for answers in between, if the driver can (libpq's pipeline mode); an answer is there at its end.
    """
    driven: Any = connection.connection.dbapi_connection
    if not has_pipeline(connection) or (count == 1 and not _is_begin_due(driven)):
        yield
        return
    try:
        with driven.pipeline():
            yield
    except connection.dialect.loaded_dbapi.Error as error:
        connection._handle_dbapi_exception(error, None, None, None, None)


def _is_begin_due(driven: Any) -> bool:
    """Tell whether psycopg begins a transaction with the next statement."""
    return not driven.autocommit and driven.info.transaction_status == 0


def _source(bind: BindParameter[Any]) -> tuple[str | None, Any]:
    """Return the key under which a caller gives a value, or ``None`` and the value that the statement has itself."""
    return (bind.key, None) if bind.required else (None, bind.effective_value)


def _bind_processor(bind: BindParameter[Any], dialect: Dialect) -> Processor | None:
    return bind.type.dialect_impl(dialect).bind_processor(dialect)


def _result_processor(kind: TypeEngine[Any], code: object, dialect: Dialect) -> Processor | None:
    return kind.dialect_impl(dialect).result_processor(dialect, code)


def is_listened_to(connection: Connection) -> bool:
    dispatch: Any = connection.engine.dispatch
    return bool(dispatch.before_cursor_execute or dispatch.after_cursor_execute or connection.engine.echo)
