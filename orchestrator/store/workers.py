"""Workers: their incarnations and heartbeats.

A heartbeat is a counter.  Nothing is decided by anybody's clock: an observer that saw a counter unchanged for the whole
limit, by its own monotonic clock, gives the incarnation up, and an incarnation that was given up may not claim again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from orchestrator.store.tables import history, worker


@dataclass(frozen=True, slots=True)
class Worker:
    """One life of a worker process."""

    incarnation: str
    nodename: str
    process: int
    version: str
    beat: int
    beat_at: datetime
    started_at: datetime
    workflows: tuple[str, ...]
    tasks: tuple[str, ...]
    queues: tuple[str, ...]


def insert_worker(connection: Connection, new: Worker) -> None:
    values = {name: getattr(new, name) for name in Worker.__slots__[:7]}
    lists = {name: json.dumps(sorted(getattr(new, name))) for name in ("workflows", "tasks", "queues")}
    connection.execute(insert(worker), {**values, **lists})


def beat(connection: Connection, incarnation: str, now: datetime) -> bool:
    """Show that the incarnation lives; ``False`` if it was given up."""
    statement = (
        update(worker)
        .where(worker.c.incarnation == incarnation, worker.c.dead_at.is_(None))
        .values(beat=worker.c.beat + 1, beat_at=now)
    )
    return connection.execute(statement).rowcount == 1


def list_beats(connection: Connection) -> dict[str, int]:
    """Return the heartbeat of every live incarnation."""
    rows = connection.execute(select(worker.c.incarnation, worker.c.beat).where(worker.c.dead_at.is_(None)))
    return {row[0]: row[1] for row in rows}


def mark_dead(connection: Connection, incarnation: str, seen_beat: int | None, now: datetime) -> bool:
    """Give an incarnation up, unless it has beaten since ``seen_beat`` was read (``None``: whatever its beat)."""
    statement = update(worker).where(worker.c.incarnation == incarnation, worker.c.dead_at.is_(None))
    if seen_beat is not None:
        statement = statement.where(worker.c.beat == seen_beat)
    return connection.execute(statement.values(dead_at=now)).rowcount == 1


def list_workers(connection: Connection) -> list[Worker]:
    """Return the live incarnations."""
    columns = [worker.c[name] for name in Worker.__slots__]
    rows = connection.execute(select(*columns).where(worker.c.dead_at.is_(None)).order_by(worker.c.started_at))
    return [Worker(*row[:7], *(tuple(json.loads(text)) for text in row[7:])) for row in rows]


def forget_workers(connection: Connection, dead_before: datetime) -> None:
    """Delete incarnations that were given up long ago and hold no claim."""
    held: Sequence[str] = [
        row[0]
        for row in connection.execute(
            select(history.c.claim_incarnation).where(history.c.claim_incarnation.is_not(None)).distinct()
        )
    ]
    statement = delete(worker).where(worker.c.dead_at < dead_before)
    if held:
        statement = statement.where(worker.c.incarnation.not_in(held))
    connection.execute(statement)
