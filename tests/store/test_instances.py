"""Inserting, locking, listing and paging instances."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.store import instances
from orchestrator.store.engine import Store
from orchestrator.store.instances import Page, Status

from .locks import before_statement
from .world import BEGINNING, at_once, join, wait_until


def insert(
    store: Store, instance_id: str, *, minute: int = 0, workflow: str = "checkout", **attributes: object
) -> bool:
    at = BEGINNING + timedelta(minutes=minute)
    with store.begin("start") as connection:
        is_new = instances.insert_instance(
            connection,
            instance_id=instance_id,
            generation="g1",
            workflow=workflow,
            queue=None,
            arguments="{}",
            request=None,
            now=at,
            pass_due_at=at,
        )
        instances.set_attributes(connection, instance_id, attributes)
    return is_new


def list_page(store: Store, **filters: object) -> Page:
    with store.read("list") as connection:
        return instances.list_instances(connection, **filters)  # type: ignore[arg-type]


def ids(store: Store, **filters: object) -> list[str]:
    return [instance.id for instance in list_page(store, **filters).instances]


def test_an_id_is_taken_once_and_the_transaction_goes_on(store: Store) -> None:
    assert insert(store, "order-1")
    with store.begin("start") as connection:
        arguments = {"generation": "g2", "workflow": "w", "queue": None, "arguments": "{}", "request": None}
        now = {"now": BEGINNING, "pass_due_at": BEGINNING}
        assert not instances.insert_instance(connection, instance_id="order-1", **arguments, **now)  # type: ignore[arg-type]
        assert instances.insert_instance(connection, instance_id="order-2", **arguments, **now)  # type: ignore[arg-type]
    assert set(ids(store)) == {"order-1", "order-2"}


def test_whoever_listens_to_statements_changes_nothing_about_that(store: Store) -> None:
    before_statement(store, lambda _statement: None)
    assert insert(store, "order-1")
    assert not insert(store, "order-1")


def test_of_8_that_insert_one_id_at_once_one_wins(store: Store) -> None:
    won = at_once(*[lambda: store.retrying(lambda: insert(store, "order-1"), patience_seconds=20)] * 8)
    assert sorted(won) == [False] * 7 + [True]


def test_ids_that_differ_in_case_or_accents_are_different(store: Store) -> None:
    names = ["order-1", "Order-1", "ORDER-1", "örder-1", "o\u0308rder-1", "订单", "\N{PARTY POPPER}"]
    assert all(insert(store, name) for name in names)
    assert sorted(ids(store)) == sorted(names)
    with store.read("look") as connection:
        assert [found.id for name in names if (found := instances.find_instance(connection, name))] == names


def test_a_lock_keeps_the_others_out_until_the_commit(store: Store) -> None:
    insert(store, "order-1")
    seen: list[Any] = []
    waits = threading.Event()

    def change_after_the_first() -> None:
        waits.set()
        with store.begin("second") as connection:
            locked = instances.lock_instance(connection, "order-1")
            seen.append(locked and locked.waiting)

    other = threading.Thread(target=change_after_the_first, daemon=True)
    with store.begin("first") as connection:
        locked = instances.lock_instance(connection, "order-1")
        assert locked is not None
        other.start()
        wait_until(waits.is_set, "the other asks for the lock")
        instances.update_instance(connection, locked, {"waiting": 7})
        assert seen == []
    join([other])
    assert seen == [7]


def test_every_update_raises_the_version(store: Store) -> None:
    insert(store, "order-1")
    for expected in (1, 2):
        with store.begin("update") as connection:
            locked = instances.lock_instance(connection, "order-1")
            assert locked is not None
            instances.update_instance(connection, locked, {"progress": "on its way"})
        with store.read("look") as connection:
            found = instances.find_instance(connection, "order-1")
        assert found is not None and found.version == expected


def test_pages_hold_while_new_instances_are_inserted(store: Store) -> None:
    for number in range(7):
        # three of the same instant: there the id decides
        insert(store, f"order-{number}", minute=max(0, number - 2))
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = list_page(store, limit=2, cursor=cursor)
        seen += [instance.id for instance in page.instances]
        insert(store, f"late-{len(seen)}", minute=60)
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == [f"order-{number}" for number in reversed(range(7))]


def test_a_page_that_holds_all_has_no_cursor(store: Store) -> None:
    for number in range(2):
        insert(store, f"order-{number}", minute=number)
    assert list_page(store, limit=2).cursor is None
    with pytest.raises(ValueError, match="is not a cursor"):
        list_page(store, cursor="b3JkZXI")


def test_lists_filter_by_workflow_status_time_and_attributes(store: Store) -> None:
    insert(store, "a", minute=1, city="Łódź", total=10)
    insert(store, "b", minute=2, city="łódź", total=10)
    insert(store, "c", minute=3, workflow="refund", total=10.5, urgent=True)
    with store.begin("update") as connection:
        locked = instances.lock_instance(connection, "a")
        assert locked is not None
        instances.update_instance(connection, locked, {"status": Status.COMPLETED})
    assert ids(store) == ["c", "b", "a"]
    assert ids(store, workflow="checkout") == ["b", "a"]
    assert ids(store, workflow="Checkout") == []
    assert ids(store, statuses=[Status.COMPLETED, Status.FAILED]) == ["a"]
    assert ids(store, started_after=BEGINNING + timedelta(minutes=1)) == ["c", "b"]
    assert ids(store, attributes={"city": "łódź"}) == ["b"]
    assert ids(store, attributes={"total": 10, "city": "Łódź"}) == ["a"]
    assert ids(store, attributes={"urgent": True}) == ["c"]
    assert ids(store, attributes={"urgent": 1}) == []


def test_attributes_are_replaced_one_by_one_and_removed_by_none(store: Store) -> None:
    insert(store, "a", city="Oslo", total=10)
    for changed in ({"city": "Rome"}, {"total": None, "missing": None}, {"city": "Rome"}):
        with store.begin("update") as connection:
            instances.set_attributes(connection, "a", changed)
    with store.read("look") as connection:
        assert instances.load_attributes(connection, "a") == {"city": "Rome"}
