"""What the poller asks again and again: answered by an index, however much history there is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, text

from orchestrator.core.records import Kind, State
from orchestrator.store import due, history, instances, mailbox
from orchestrator.store.engine import Store
from orchestrator.store.instances import Status
from orchestrator.store.tables import history as history_table
from orchestrator.store.tables import instance as instance_table
from orchestrator.store.tables import message, subscription

from .locks import engine_of
from .world import BEGINNING

ENDED, PER_INSTANCE = 1000, 20


def fill(store: Store) -> None:
    """Record 1,000 instances that have ended, with 20,000 records and as many messages, and 50 that wait."""
    instances_of, rows, mail, subscriptions = [], [], [], []
    for number in range(ENDED):
        name, is_open = f"order-{number:04}", number % 20 == 0
        instances_of.append(
            {
                "id": name,
                "generation": "g",
                "workflow": "buy",
                "status": Status.RUNNING if is_open else Status.COMPLETED,
                "run": 0,
                "input": "{}",
                "waiting": int(is_open),
                "wait_number": 1,
                "next_seq": PER_INSTANCE,
                "next_order": PER_INSTANCE,
                "version": 0,
                "pass_attempts": 0,
                "pass_publications": 0,
                "created_at": BEGINNING,
                "last_at": BEGINNING,
                "parks": False,
                "is_past_pivot": False,
                "blocked_steps": 0,
                "mail": 0,
                "pass_due_at": BEGINNING if number == 0 else None,
                "deadline_at": BEGINNING + timedelta(days=number) if is_open else None,
            }
        )
        for seq in range(PER_INSTANCE):
            is_receive = seq == PER_INSTANCE - 1
            is_awaited = is_open and is_receive
            rows.append(
                {
                    **history.FRESH,
                    "instance_id": name,
                    "generation": "g",
                    "run": 0,
                    "seq": seq,
                    "kind": Kind.RECEIVE if is_receive else Kind.STEP,
                    "name": "news" if is_receive else "charge",
                    "scope": "",
                    "after_order": seq,
                    "state": State.SCHEDULED if is_awaited else State.SETTLED,
                    "awaited": 1 if is_awaited else None,
                    "scheduled_at": BEGINNING,
                    "due_at": BEGINNING if is_awaited and number == 0 else None,
                }
            )
            sent = {"instance_id": name, "generation": "g", "kind": "message", "payload": "1", "sent_at": BEGINNING}
            mail.append(
                {**sent, "address": f"i:{name}", "channel": "news", "attempts": 0, "run": 0, "taken_order": seq}
            )
        if is_open:
            competes = {"instance_id": name, "generation": "g", "mode": "competing"}
            subscriptions += [
                {**competes, "channel": channel, "created_at": BEGINNING} for channel in ("news", "quiet")
            ]
    due_mail = {**mail[0], "run": None, "taken_order": None, "due_at": BEGINNING}
    shared = {**mail[0], "instance_id": None, "generation": None, "run": None, "taken_order": None}
    with store.begin("fill") as connection:
        for table, values in (
            (instance_table, instances_of),
            (history_table, rows),
            (message, mail),
            (message, [due_mail]),
            (message, [shared]),
            (subscription, subscriptions),
        ):
            for start in range(0, len(values), 5000):
                connection.execute(insert(table), values[start : start + 5000])
    with store.begin("analyze") as connection:
        tables = ("orchestrator_instance", "orchestrator_history", "orchestrator_message", "orchestrator_subscription")
        if store.is_sqlite:
            connection.execute(text("ANALYZE"))
        elif store.backend == "postgresql":
            connection.execute(text("ANALYZE " + ", ".join(tables)))
        else:
            connection.execute(text("ANALYZE TABLE " + ", ".join(tables))).all()


QUERIES: dict[str, Callable[[Connection], Any]] = {
    "due mail": lambda c: mailbox.list_due_receivers(c, BEGINNING, 200),
    "competitors": lambda c: mailbox.list_waiting_competitors(c, None, 10),
    "competitors of a channel": lambda c: mailbox.list_waiting_competitors(c, "news", 10),
    "deadlines": lambda c: instances.list_past_deadline(c, BEGINNING, 200),
    "due records": lambda c: due.list_due_records(c, BEGINNING, 200),
    "owed passes": lambda c: instances.list_owed_passes(c, BEGINNING, 200),
    "next": due.find_next_due,
}

BIG = ("orchestrator_history", "orchestrator_message", "orchestrator_instance", "shared")


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
