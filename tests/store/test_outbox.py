"""Enqueued tasks: there if the transaction commits, taken by one process at a time."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Connection

from orchestrator.store import due, outbox
from orchestrator.store.engine import Store
from orchestrator.store.outbox import Enqueued

from .world import BEGINNING, at_once

LATER = BEGINNING + timedelta(seconds=30)
SIGNATURE = '{"task":"shop.mail","args":["na\\u00efve"]}'


def enqueue(store: Store, task_id: str = "mail-1", seconds: float = 0.0) -> Enqueued:
    with store.begin("enqueue") as connection:
        due_at = BEGINNING + timedelta(seconds=seconds)
        return outbox.insert_enqueued(connection, task_id, SIGNATURE, BEGINNING, due_at)


def list_due(store: Store, seconds: float = 0.0, limit: int = 10) -> list[Enqueued]:
    with store.read("due") as connection:
        return outbox.list_due_enqueued(connection, BEGINNING + timedelta(seconds=seconds), limit)


def take(store: Store, entry: Enqueued) -> str | None:
    with store.begin("take") as connection:
        return outbox.take_enqueued(connection, entry, LATER)


def test_what_is_enqueued_is_listed_when_it_is_due_the_earliest_first(store: Store) -> None:
    third, first, second = enqueue(store, "c", 2), enqueue(store, "a"), enqueue(store, "b")
    assert list_due(store, -1) == []
    assert list_due(store) == [first, second]
    assert list_due(store, 2) == [first, second, third]
    assert list_due(store, 2, limit=1) == [first]
    with store.read("next") as connection:
        assert due.find_next_due(connection) == BEGINNING


def test_what_is_rolled_back_was_never_enqueued(store: Store) -> None:
    def fail(connection: Connection) -> None:
        outbox.insert_enqueued(connection, "mail-1", SIGNATURE, BEGINNING, BEGINNING)
        raise LookupError

    try:
        with store.begin("enqueue") as connection:
            fail(connection)
    except LookupError:
        pass
    assert list_due(store) == []


def test_one_of_two_pollers_takes_a_task_and_it_is_due_again_later(store: Store) -> None:
    entry = enqueue(store)
    taken = at_once(lambda: take(store, entry), lambda: take(store, entry))
    assert sorted(taken, key=str) == [None, SIGNATURE]
    assert list_due(store, 29) == []
    assert list_due(store, 30) == [Enqueued(entry.id, "mail-1", 1, LATER)]


def test_a_task_that_could_not_be_sent_is_given_back_as_it_was(store: Store) -> None:
    entry = enqueue(store)
    assert take(store, entry) == SIGNATURE
    with store.begin("give-back") as connection:
        outbox.take_back_enqueued(connection, entry, LATER, BEGINNING + timedelta(seconds=5))
    assert list_due(store, 5) == [Enqueued(entry.id, "mail-1", 0, BEGINNING + timedelta(seconds=5))]


def test_a_late_giving_back_does_not_disturb_whoever_took_it_since(store: Store) -> None:
    entry = enqueue(store)
    take(store, entry)
    (again,) = list_due(store, 30)
    with store.begin("take") as connection:
        assert outbox.take_enqueued(connection, again, LATER + timedelta(seconds=60)) == SIGNATURE
    with store.begin("give-back") as connection:
        outbox.take_back_enqueued(connection, entry, LATER, BEGINNING)
    assert list_due(store, 80) == []


def test_a_task_that_was_sent_is_gone(store: Store) -> None:
    entry, other = enqueue(store), enqueue(store)
    with store.begin("sent") as connection:
        outbox.delete_enqueued(connection, entry.id)
    assert list_due(store) == [other]
    assert take(store, entry) is None
