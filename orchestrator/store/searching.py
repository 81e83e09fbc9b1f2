"""Lists of instances for people: filtered, a page at a time, in time that does not grow with the table.

A page is entered by its position (of the row before it), never by counting rows.  What an index cannot find by itself
is looked for row by row, for a limited time: a page may end before it is full, and the next one goes on from there.
Payloads are not read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Select, and_, func, or_, select, union_all

from orchestrator.store.instances import Status, encode_attribute
from orchestrator.store.tables import attribute, instance

#: How long a page is looked for, where filters have to be applied row by row.
PATIENCE_SECONDS = 1.0
_CHUNK, _LARGEST_CHUNK = 200, 2000
_FEW = 1000
_LAST_CHARACTER = "\U0010ffff"


@dataclass(frozen=True, slots=True)
class Search:
    """What instances are looked for; ``values`` are those that ``attribute`` may have, encoded."""

    prefix: str = ""
    workflow: str | None = None
    statuses: tuple[Status, ...] = ()
    attribute: str | None = None
    values: tuple[str, ...] = ()

    @property
    def is_by_id(self) -> bool:
        """Whether pages are in the order of ids; otherwise they are newest first."""
        return bool(self.prefix) and self.attribute is None


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the list a row is."""

    created_at: datetime
    id: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a list shows of an instance."""

    id: str
    workflow: str
    status: Status
    created_at: datetime
    ended_at: datetime | None
    progress: str | None
    blocked: str | None

    @property
    def position(self) -> Position:
        return Position(self.created_at, self.id)


@dataclass(frozen=True, slots=True)
class Results:
    """A page, and where those before and after it begin; ``is_cut``: there was no time to fill it."""

    found: list[Found]
    before: Position | None
    after: Position | None
    is_cut: bool = False


def read_attribute(name: str, text: str) -> tuple[str, tuple[str, ...]]:
    """Return the name of an attribute and what a value typed as ``text`` may be recorded as."""
    values = [encode_attribute(text)]
    for read in (int, float, {"true": True, "false": False}.__getitem__):
        try:
            values.append(encode_attribute(read(text)))
        except (ValueError, LookupError, OverflowError):
            continue
    return name, tuple(dict.fromkeys(values))


def search(
    connection: Connection,
    query: Search,
    *,
    position: Position | None = None,
    direction: Literal["after", "before"] = "after",
    limit: int = 50,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Results:
    """Return the page of up to ``limit`` instances ``after`` a position, or ``before`` it."""
    scanned: Position | None = None
    if _is_exact(query):
        statement = _statement(connection, query, position, direction, limit + 1)
        found = [_found(*row) for row in connection.execute(statement)]
    else:
        few = _find_few(connection, query, position, direction)
        if few is None:
            deadline = time.monotonic() + patience_seconds
            found, scanned = _look_through(connection, query, position, direction, limit + 1, deadline)
        else:
            found = few[: limit + 1]
    page = found[:limit]
    following = page[-1].position if len(found) > limit else scanned
    is_cut = scanned is not None
    if direction == "after":
        return Results(page, page[0].position if page and position is not None else None, following, is_cut)
    return Results(page[::-1], following, page[0].position if page else None, is_cut)


def _is_exact(query: Search) -> bool:
    """Tell whether an index finds what is looked for, so that nothing has to be passed over."""
    if query.attribute is not None:
        return not (query.prefix or query.workflow or query.statuses)
    return not query.prefix or not (query.workflow or query.statuses)


def _find_few(connection: Connection, query: Search, position: Position | None, direction: str) -> list[Found] | None:
    """Return all that matches, in order, where few have that status or workflow; ``None`` where many do.

    Among a million ids that begin alike, or that share an attribute, the few that are BLOCKED are found at once.
    """
    if not query.statuses and query.workflow is None:
        return None
    wider = replace(query, prefix="", attribute=None, values=())
    rows = connection.execute(_statement(connection, wider, None, "after", _FEW + 1))
    candidates = [_found(*row) for row in rows]
    if len(candidates) > _FEW:
        return None
    if query.attribute is not None:
        # by id alone: told the value as well, PostgreSQL may prefer the index of it, with half the table in it
        attributes = load_attributes_of(connection, [each.id for each in candidates])
        wanted = {(query.attribute, value) for value in query.values}
        candidates = [each for each in candidates if not wanted.isdisjoint(attributes.get(each.id, ()))]

    def key(of: Found | Position) -> tuple[datetime, str] | str:
        return of.id if query.is_by_id else (of.created_at, of.id)

    is_rising = query.is_by_id == (direction == "after")
    matching = sorted((each for each in candidates if _matches(query, each)), key=key, reverse=not is_rising)
    if position is None:
        return matching
    at: Any = key(position)
    return [each for each in matching if (key(each) > at if is_rising else key(each) < at)]


def _matches(query: Search, found: Found) -> bool:
    return (
        found.id.startswith(query.prefix)
        and query.workflow in (None, found.workflow)
        and (not query.statuses or found.status in query.statuses)
    )


def _look_through(
    connection: Connection, query: Search, position: Position | None, direction: str, limit: int, deadline: float
) -> tuple[list[Found], Position | None]:
    """Return up to ``limit`` matches of what the best index gives, and where it was left if the time was over."""
    found: list[Found] = []
    size = _CHUNK
    while True:
        rows = connection.execute(_statement(connection, query, position, direction, size))
        chunk = [_found(*row) for row in rows]
        found += [each for each in chunk if _matches(query, each)]
        if len(found) >= limit or len(chunk) < size:
            return found[:limit], None
        position = chunk[-1].position
        if time.monotonic() >= deadline:
            return found, position
        size = min(size * 4, _LARGEST_CHUNK)


def _found(own_id: str, workflow: str, status: str, *rest: Any) -> Found:
    return Found(own_id, workflow, Status(status), *rest)


_SHOWN = (
    instance.c.id,
    instance.c.workflow,
    instance.c.status,
    instance.c.created_at,
    instance.c.ended_at,
    instance.c.progress,
    func.substr(instance.c.blocked, 1, 300).label("blocked"),
)


def _statement(
    connection: Connection, query: Search, position: Position | None, direction: str, size: int
) -> Select[Any]:
    if query.is_by_id:
        return _by_id(connection, query, position, direction, size)
    parts = [_newest(part, at, own_id, position, direction, size) for part, at, own_id in _parts(query)]
    if len(parts) == 1:
        return parts[0]
    # each of them is in order already: of 10 statuses the first few rows of each are sorted, not the table
    merged = union_all(*(select(part.subquery()) for part in parts)).subquery()
    return _newest(select(merged), merged.c.created_at, merged.c.id, None, direction, size)


def _parts(query: Search) -> list[tuple[Select[Any], ColumnElement[Any], ColumnElement[Any]]]:
    """Return selections that an index has in order, with the columns of that order."""
    if query.attribute is not None:
        joined = select(*_SHOWN).join(attribute, attribute.c.instance_id == instance.c.id)
        having = joined.where(attribute.c.name == query.attribute)
        keys = (attribute.c.created_at, attribute.c.instance_id)
        return [(having.where(attribute.c.value == value), *keys) for value in query.values]
    whole = select(*_SHOWN)
    if query.workflow is not None:
        whole = whole.where(instance.c.workflow == query.workflow)
    keys = (instance.c.created_at, instance.c.id)
    statuses = [whole.where(instance.c.status == status) for status in query.statuses]
    return [(part, *keys) for part in statuses or [whole]]


def _newest(
    part: Select[Any],
    created_at: ColumnElement[Any],
    own_id: ColumnElement[Any],
    position: Position | None,
    direction: str,
    size: int,
) -> Select[Any]:
    """Return the ``size`` rows of ``part`` that follow a position, newest first, or that precede it, oldest first."""
    if direction == "after":
        part = part.order_by(created_at.desc(), own_id.desc())
    else:
        part = part.order_by(created_at, own_id)
    if position is not None:
        at, last_id = position.created_at, position.id
        # the first condition alone is what the index is entered by
        if direction == "after":
            part = part.where(and_(created_at <= at, or_(created_at < at, own_id < last_id)))
        else:
            part = part.where(and_(created_at >= at, or_(created_at > at, own_id > last_id)))
    return part.limit(size)


def _by_id(connection: Connection, query: Search, position: Position | None, direction: str, size: int) -> Select[Any]:
    # by bytes, as an index of its own has them: in the order of a locale a prefix is no range
    own_id: ColumnElement[Any] = instance.c.id
    if connection.dialect.name == "postgresql":
        own_id = instance.c.id.collate("C")
    first, last = query.prefix, query.prefix + _LAST_CHARACTER
    lower, upper = own_id >= first, own_id < last
    # one bound each: of two SQLite takes the first, and reads all that lies between them
    if position is not None and direction == "after" and position.id >= first:
        lower = own_id > position.id
    elif position is not None and direction == "before" and position.id < last:
        upper = own_id < position.id
    part = select(*_SHOWN).where(lower, upper)
    return part.order_by(own_id if direction == "after" else own_id.desc()).limit(size)


def load_attributes_of(connection: Connection, instance_ids: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Return names and encoded values of the attributes of several instances."""
    columns = (attribute.c.instance_id, attribute.c.name, attribute.c.value)
    statement = select(*columns).where(attribute.c.instance_id.in_(instance_ids)).order_by(*columns[:2])
    found: dict[str, list[tuple[str, str]]] = {}
    for instance_id, name, value in connection.execute(statement):
        found.setdefault(instance_id, []).append((name, value))
    return found
