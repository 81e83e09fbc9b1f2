"""What the poller asks again and again: answered by an index, however much history there is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Table, event, insert, literal, select, text

from orchestrator.core.records import Kind, State
from orchestrator.store import due, history, instances, mailbox
from orchestrator.store.engine import Store
from orchestrator.store.instances import Status
from orchestrator.store.tables import history as history_table
from orchestrator.store.tables import instance as instance_table
from orchestrator.store.tables import message, subscription

from .locks import engine_of
from .world import BEGINNING

INSTANCES, PER_INSTANCE = 1000, 20
AWAITED = {"kind": Kind.RECEIVE, "state": State.SCHEDULED, "awaited": 1}


def fill(store: Store) -> None:
    """Record 1,000 instances, 50 of which wait, with 20,000 records and as many messages."""
    with store.begin("fill") as connection:
        _fill(connection)
    with store.begin("analyze") as connection:
        names = ", ".join(table.name for table in (instance_table, history_table, message, subscription))
        if store.is_sqlite:
            connection.execute(text("ANALYZE"))
        elif store.backend == "postgresql":
            connection.execute(text(f"ANALYZE {names}"))
        else:
            connection.execute(text(f"ANALYZE TABLE {names}")).all()


def _fill(connection: Connection) -> None:
    now = BEGINNING
    ended: dict[str, Any] = {
        **dict.fromkeys(
            ("run", "waiting", "version", "pass_attempts", "pass_publications", "blocked_steps", "mail"), 0
        ),
        **dict.fromkeys(("wait_number", "next_seq", "next_order"), 1),
        "generation": "g",
        "workflow": "buy",
        "input": "{}",
        "parks": False,
        "is_past_pivot": False,
        "status": Status.COMPLETED,
        "created_at": now,
        "last_at": now,
        "deadline_at": None,
    }
    every = [{**ended, "id": f"order-{number:04}"} for number in range(INSTANCES)]
    for number in range(0, INSTANCES, 20):
        waits = {"status": Status.RUNNING, "waiting": 1, "deadline_at": now + timedelta(days=number)}
        every[number] = {**every[number], **waits}
    connection.execute(insert(instance_table), every)
    record = {**history.FRESH, "generation": "g", "run": 0, "kind": Kind.STEP, "name": "news", "scope": ""}
    record |= {"state": State.SETTLED, "after_order": 0, "scheduled_at": now}
    mail = {"generation": "g", "kind": "message", "channel": "news", "address": "-", "sent_at": now, "attempts": 0}
    for seq in range(PER_INSTANCE):
        _repeat(connection, history_table, {**record, "seq": seq})
        _repeat(connection, message, {**mail, "run": 0, "taken_order": seq})
    is_open = instance_table.c.waiting > 0
    _repeat(connection, history_table, {**record, **AWAITED, "seq": PER_INSTANCE}, is_open)
    for channel in ("news", "quiet"):
        competes = {"generation": "g", "mode": "competing", "channel": channel, "created_at": now}
        _repeat(connection, subscription, competes, is_open)
    first = instance_table.c.id == "order-0000"
    _repeat(connection, message, {**mail, "due_at": now}, first)
    _repeat(connection, history_table, {**record, "seq": PER_INSTANCE + 1, "due_at": now}, first)
    connection.execute(insert(message).values(**mail))
    connection.execute(instance_table.update().where(first).values(pass_due_at=now))


def _repeat(connection: Connection, table: Table, values: dict[str, Any], condition: Any = None) -> None:
    """Insert ``values`` once for every instance that meets the condition."""
    given = {name: value for name, value in values.items() if value is not None}
    columns = [literal(value, table.c[name].type).label(name) for name, value in given.items()]
    rows = select(instance_table.c.id, *columns)
    connection.execute(
        insert(table).from_select(["instance_id", *given], rows if condition is None else rows.where(condition))
    )


QUERIES: dict[str, Callable[[Connection], Any]] = {
    "due mail": lambda c: mailbox.list_due_receivers(c, BEGINNING, 200),
    "competitors": lambda c: mailbox.list_waiting_competitors(c, None, 10),
    "competitors of a channel": lambda c: mailbox.list_waiting_competitors(c, "news", 10),
    "deadlines": lambda c: instances.list_past_deadline(c, BEGINNING, 200),
    "due records": lambda c: due.list_due_records(c, BEGINNING, 200),
    "owed passes": lambda c: instances.list_owed_passes(c, BEGINNING, 200),
    "next": due.find_next_due,
}

BIG = ("orchestrator_history", "orchestrator_message", "shared")


@pytest.fixture(scope="module")
def filled_store(shared_store: Store) -> Store:
    fill(shared_store)
    return shared_store


@pytest.mark.parametrize("query", QUERIES)
def test_what_the_poller_asks_reads_no_big_table_from_end_to_end(filled_store: Store, query: str) -> None:
    statements: list[tuple[str, Any]] = []
    scans: list[str] = []
    with filled_store.read("explain") as connection:
        capture(filled_store, statements)
        found = QUERIES[query](connection)
        asked, statements[:] = list(statements), []
        for sql, parameters in asked:
            scans += list_scans(filled_store, connection, sql, parameters)
    assert found
    assert scans == []


OTHERS: dict[str, Callable[[Connection], Any]] = {
    "orphaned claims": lambda c: due.list_orphaned_claims(c, 200),
    "published once": lambda c: due.list_published_once(c, BEGINNING, 200),
    "next owed passes": lambda c: instances.list_owed_passes(c, BEGINNING, 200, begun_by=BEGINNING),
}


@pytest.mark.parametrize("query", [*QUERIES, *OTHERS])
def test_a_plan_that_was_made_for_any_parameters_reads_no_big_table(filled_store: Store, query: str) -> None:
    """PostgreSQL plans a prepared statement once, when it has been asked for often enough: without the parameters."""
    if filled_store.backend != "postgresql":
        pytest.skip("plans are made for the parameters")
    # of this session, and not of this transaction alone: what it did before is not told to all at once
    counts = text("SELECT relname, seq_scan FROM pg_stat_xact_user_tables")
    with filled_store.read("explain") as connection:
        connection.execute(text("SET LOCAL plan_cache_mode = force_generic_plan"))
        before = set(connection.execute(counts))
        for _ in range(8):  # psycopg prepares what it is given the sixth time
            {**QUERIES, **OTHERS}[query](connection)
        assert not {row[0] for row in set(connection.execute(counts)) - before} & set(BIG)


def capture(store: Store, statements: list[tuple[str, Any]]) -> None:
    def executes(_connection: Any, _cursor: Any, sql: str, parameters: Any, *_rest: Any) -> None:
        statements.append((sql, parameters))

    event.listen(engine_of(store), "before_cursor_execute", executes)


def list_scans(store: Store, connection: Connection, sql: str, parameters: Any) -> list[str]:
    """Return where the plan of a statement reads the whole of a big table."""
    if not sql.lstrip().startswith("SELECT"):
        return []
    explain = "EXPLAIN QUERY PLAN " if store.is_sqlite else "EXPLAIN "
    plan = [tuple(row) for row in connection.exec_driver_sql(explain + sql, parameters)]
    if store.is_sqlite:
        lines = [str(row[3]) for row in plan]
        return [line for line in lines if line.startswith("SCAN") and line.split()[1] in BIG and "USING" not in line]
    if store.backend == "postgresql":
        lines = [str(row[0]) for row in plan]
        return [line for line in lines if "Seq Scan" in line and any(f"on {table}" in line for table in BIG)]
    # of MySQL: table, how it is reached, rows it reckons with
    return [str(row) for row in plan if row[3] == "ALL" and int(row[8] or 0) > 1000]
