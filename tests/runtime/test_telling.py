"""Notices in the store: who takes them, in which order, and what becomes of those that nobody wants."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import func, insert, select

from orchestrator import Orchestrator, signals
from orchestrator.core.records import Kind, Outcome, State
from orchestrator.runtime.change import Change
from orchestrator.runtime.notices import Notice, list_steps
from orchestrator.store import instances
from orchestrator.store.history import FRESH, HistoryRow
from orchestrator.store.instances import Status
from orchestrator.store.tables import notice


@pytest.fixture
def orchestrator(store_url: str) -> Iterator[Orchestrator]:
    orchestrator = Orchestrator(Celery("shop", set_as_current=False), store=store_url)
    yield orchestrator
    orchestrator.store.dispose()


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What a receiver for the steps of ``shop.pay`` alone was told: the ids of notices."""
    heard: list[str] = []

    def hear(notice_id: str, **_told: Any) -> None:
        heard.append(notice_id)

    signals.step_settled.connect(hear, sender="shop.pay", weak=False)
    yield heard
    signals.step_settled.disconnect(hear, sender="shop.pay")


def write(orchestrator: Orchestrator, sender: str, count: int, created_at: datetime) -> list[str]:
    """Write notices that are due, as a process does that has no receivers."""
    payload = (
        f'{{"sender": "{sender}", "workflow": "shop.checkout", "run": 0, "generation": "g", '
        f'"at": "{created_at.isoformat()}", "arguments": {{}}}}'
    )
    own = {"instance_id": "order-42", "signal": "step_settled", "payload": payload, "attempts": 0}
    rows = [{**own, "id": f"{sender}-{n:06}", "created_at": created_at, "due_at": created_at} for n in range(count)]
    with orchestrator.store.begin("test") as connection:
        connection.execute(insert(notice), rows)
    return [str(row["id"]) for row in rows]


def count(orchestrator: Orchestrator) -> int:
    with orchestrator.store.read("test") as connection:
        return connection.execute(select(func.count()).select_from(notice)).scalar_one()


def test_what_is_not_for_this_process_is_left_to_others_and_stands_in_nobodys_way(
    orchestrator: Orchestrator, heard: list[str]
) -> None:
    now = datetime.now(UTC)
    write(orchestrator, "shop.ship", 250, now - timedelta(seconds=2))
    wanted = write(orchestrator, "shop.pay", 1, now - timedelta(seconds=1))
    for _ in range(2):
        orchestrator.observers.tell_due()
    assert heard == wanted
    with orchestrator.store.read("test") as connection:
        attempts = set(connection.execute(select(notice.c.attempts)).scalars())
    assert attempts == {0} and count(orchestrator) == 250


def test_a_backlog_is_told_in_its_order_and_asked_for_until_its_end(
    orchestrator: Orchestrator, heard: list[str]
) -> None:
    written = write(orchestrator, "shop.pay", 450, datetime.now(UTC) - timedelta(seconds=1))
    assert [orchestrator.observers.tell_due() for _ in range(4)] == [True, True, False, False]
    assert heard == written and count(orchestrator) == 0


def test_what_nobody_takes_for_a_day_is_forgotten(orchestrator: Orchestrator) -> None:
    write(orchestrator, "shop.ship", 1100, datetime.now(UTC) - timedelta(hours=25))
    kept = write(orchestrator, "shop.pay", 3, datetime.now(UTC) - timedelta(hours=23))
    orchestrator.observers.forget()
    assert count(orchestrator) == len(kept)


def test_a_map_of_many_items_is_told_and_done_with(
    sqlite_url: str, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    orchestrator = Orchestrator(Celery("shop", set_as_current=False), store=sqlite_url)
    now = datetime.now(UTC)
    ids = write(orchestrator, "shop.pay", 33_000, now)  # more than SQLite takes parameters in one statement
    about = ("step_settled", "shop.pay", "order-42", "g", "shop.checkout", 0, now)
    orchestrator.observers.tell([Notice(*about).numbered(each) for each in ids])
    orchestrator.store.dispose()
    assert len(heard) == 33_000 and count(orchestrator) == 0


def test_a_warning_is_logged_where_nothing_else_is(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody has receivers, no monitor listens, and the log has warnings only."""
    orchestrator = Orchestrator(Celery("shop", set_as_current=False), store=sqlite_url)
    orchestrator.executing.note_beat("incarnation")
    now = datetime.now(UTC)
    about: dict[str, Any] = {"instance_id": "order-42", "generation": "g", "workflow": "shop.checkout", "queue": None}
    empty: dict[str, Any] = {"arguments": '{"args":[],"kwargs":{}}', "request": None, "now": now, "pass_due_at": now}
    with orchestrator.store.begin("test") as connection:
        instances.insert_instance(connection, **about, **empty)
        instance = instances.find_instance(connection, "order-42")
        assert instance is not None
        change = Change(instance={"status": Status.BLOCKED, "blocked": "nobody has the code"})
        with caplog.at_level(logging.WARNING, "orchestrator"):
            told = orchestrator.observers.note(connection, instance, change, now)
    orchestrator.observers.tell(told)
    orchestrator.store.dispose()
    (record,) = caplog.records
    assert record.getMessage() == "instance blocked: order-42 shop.checkout (reason=nobody has the code)"
    assert count(orchestrator) == 0


def test_a_foreign_step_took_from_its_sending_to_its_settlement() -> None:
    sent_at = datetime(2026, 5, 1, 12, tzinfo=UTC)
    about = {"instance_id": "order-42", "run": 0, "seq": 0, "generation": "g", "kind": Kind.STEP, "name": "shop.pay"}
    sent = {"scope": "", "after_order": 0, "state": State.SCHEDULED, "scheduled_at": sent_at, "dispatched_at": sent_at}
    row = HistoryRow(**{**FRESH, **about, **sent, "is_foreign": True})
    settled = {"state": State.SETTLED, "outcome": Outcome.SUCCEEDED}
    (told,) = list_steps(Change(rows={0: (row, settled)}), sent_at + timedelta(seconds=3), scheduled=True)
    assert (told[0], told[2]["seconds"], told[2]["attempt"]) == ("step_settled", 3.0, 0)
