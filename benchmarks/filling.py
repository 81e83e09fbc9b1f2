"""Fills a store: copies of a real instance's rows, made by the database itself, so that a million takes minutes."""

from __future__ import annotations

import time

from sqlalchemy import Table, create_engine, text
from sqlalchemy.pool import NullPool

from orchestrator import Orchestrator
from orchestrator.store.tables import history, instance

#: So many in a transaction: others wait for it on SQLite.
BATCH = 20_000
_SERIES = {
    "sqlite": "(WITH RECURSIVE n(i) AS (SELECT :low UNION ALL SELECT i + 1 FROM n WHERE i < :high) SELECT i FROM n) n",
    "postgresql": "generate_series(CAST(:low AS integer), CAST(:high AS integer)) AS n(i)",
    "mysql": "(SELECT seq AS i FROM seq_1_to_{high} WHERE seq >= :low AND seq <= :high) AS n",
}
PATIENCE_SECONDS = 30.0


def fill(orchestrator: Orchestrator, template_id: str, count: int) -> None:
    """Add ``count`` copies of an instance, each with the first record of its history."""
    store = orchestrator.store
    engine = create_engine(store.url, poolclass=NullPool)
    for low in range(1, count + 1, BATCH):
        high = min(low + BATCH - 1, count)
        with engine.begin() as connection:
            for table in (instance, history):
                statement = _copy(table, store.url.get_backend_name(), high)
                connection.execute(text(statement), {"low": low, "high": high, "template": template_id})
    if not store.is_sqlite:  # servers do it by themselves, after a while
        with engine.begin() as connection:
            for table in (instance, history):
                connection.execute(text(f"ANALYZE {'TABLE ' if store.backend == 'mysql' else ''}{table.name}"))
    engine.dispose()


def _copy(table: Table, backend: str, high: int) -> str:
    key = "id" if table is instance else "instance_id"
    new_id = f"CONCAT({key}, '-', n.i)" if backend == "mysql" else f"{key} || '-' || n.i"
    names = [column.name for column in table.columns]
    values = [new_id if name == key else name for name in names]
    series = _SERIES[backend].format(high=high)
    first = "" if table is instance else " AND seq = 0"
    return (  # nothing in it but names of columns
        f"INSERT INTO {table.name} ({', '.join(names)}) "  # noqa: S608
        f"SELECT {', '.join(values)} FROM {table.name}, {series} WHERE {key} = :template{first}"
    )


def start_sleeper(orchestrator: Orchestrator) -> str:
    """Start an instance that sleeps for a year, and return its id when it does."""
    handle = orchestrator.start(orchestrator.app.tasks["benchmarks.sleeper"].s())
    deadline = time.monotonic() + PATIENCE_SECONDS
    while handle.instance_status == "PENDING" or not handle.history():
        if time.monotonic() > deadline:
            raise TimeoutError("the instance does not go to sleep")
        time.sleep(0.05)
    return str(handle.id)


def run_one(orchestrator: Orchestrator) -> str:
    """Run an instance of two steps, and return its id."""
    handle = orchestrator.start(orchestrator.app.tasks["benchmarks.sequence"].s(2))
    handle.get(timeout=PATIENCE_SECONDS)
    return str(handle.id)
