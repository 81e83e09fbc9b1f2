"""Many instances like one that was started, without the time that starting each of them takes."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import insert, select

from orchestrator.store.engine import Store
from orchestrator.store.tables import history, instance


def multiply(store: Store, instance_id: str, count: int) -> list[str]:
    """Copy an instance with its history until there are ``count``; return the ids of all."""
    copies = [f"{instance_id}-{number}" for number in range(1, count)]
    with store.begin("multiply") as connection:
        for table, column in ((instance, "id"), (history, "instance_id")):
            own = select(table).where(table.c[column] == instance_id)
            rows = [dict(row) for row in connection.execute(own).mappings()]
            copied = [{**row, column: copy} for copy in copies for row in rows]
            for start in range(0, len(copied), 1000):
                connection.execute(insert(table), copied[start : start + 1000])
    return [instance_id, *copies]


def measure_firing(store: Store) -> tuple[int, timedelta]:
    """Return how many timers have fired, and the time between the first and the last of them."""
    with store.read("look") as connection:
        fired = select(history.c.settled_at).where(history.c.kind == "timer", history.c.settled_at.is_not(None))
        moments = sorted(connection.execute(fired).scalars())
    return len(moments), moments[-1] - moments[0]
