"""Lists of instances, filtered and paged in both directions, from the indexes that they are made for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.store import instances, searching
from orchestrator.store.engine import Store
from orchestrator.store.instances import Status
from orchestrator.store.searching import Position, Results, Search, read_attribute

from .world import BEGINNING

#: ids, workflows and statuses of 60 instances, the newest last; ids are not in the order of time.
CROWD = [
    (f"{'Order' if n % 3 else 'order'}-{(n * 7) % 60:02d}", "refund" if n % 4 == 0 else "checkout", list(Status)[n % 5])
    for n in range(60)
]

ATTRIBUTES: dict[str, Callable[[int], str]] = {"customer": lambda n: str(n % 7), "region": lambda _n: '"eu"'}


@pytest.fixture
def crowded(store: Store) -> Store:
    with store.begin("fill") as connection:
        for minute, (own_id, workflow, status) in enumerate(CROWD):
            at = BEGINNING + timedelta(minutes=minute // 2)  # two at a time
            assert instances.insert_instance(
                connection,
                instance_id=own_id,
                generation="g",
                workflow=workflow,
                queue=None,
                arguments="{}",
                request=None,
                now=at,
                pass_due_at=at,
                values={"status": status},
            )
            instances.set_attributes(connection, own_id, {"customer": minute % 7, "region": "eu"})
    return store


def find(store: Store, query: Search, **options: Any) -> Results:
    with store.read("search") as connection:
        return searching.search(connection, query, **options)


def flat(pages: list[list[str]]) -> list[str]:
    return [own_id for page in pages for own_id in page]


def walk(store: Store, query: Search, limit: int, **options: Any) -> list[list[str]]:
    """Return the ids of all pages, and check that the way back shows the same ones."""
    pages, position = [], None
    while True:
        results = find(store, query, position=position, limit=limit, **options)
        pages.append(results)
        position = results.after
        if position is None:
            break
        assert len(pages) < 100
    back, position = [], pages[-1].before
    while position is not None:
        results = find(store, query, position=position, direction="before", limit=limit, **options)
        back.append([found.id for found in results.found])
        position = results.before
    shown = [[found.id for found in page.found] for page in pages]
    if shown[-1]:  # from an empty page the way back is by the first one
        assert sorted(flat(back)) == sorted(flat(shown[:-1]))
    return shown


def wanted(query: Search) -> list[str]:
    """Return what a search is to find, in order."""
    found = [
        (BEGINNING + timedelta(minutes=minute // 2), own_id)
        for minute, (own_id, workflow, status) in enumerate(CROWD)
        if own_id.startswith(query.prefix)
        and query.workflow in (None, workflow)
        and (not query.statuses or status in query.statuses)
        and (
            query.attribute is None or {"customer": str(minute % 7), "region": '"eu"'}[query.attribute] in query.values
        )
    ]
    return sorted(own_id for _, own_id in found) if query.is_by_id else [own_id for _, own_id in sorted(found)[::-1]]


def having(attribute: str, value: str, **more: Any) -> Search:
    name, values = read_attribute(attribute, value)
    return Search(attribute=name, values=values, **more)


QUERIES = {
    "everything": Search(),
    "a status": Search(statuses=(Status.RUNNING,)),
    "several statuses": Search(statuses=(Status.RUNNING, Status.PENDING, Status.FAILED)),
    "a workflow": Search(workflow="refund"),
    "a workflow and statuses": Search(workflow="checkout", statuses=(Status.RUNNING, Status.COMPLETED)),
    "a prefix, as it is written": Search(prefix="Order-"),
    "one id": Search(prefix="order-21"),
    "a prefix and a workflow": Search(prefix="Order", workflow="checkout"),
    "a prefix and a status": Search(prefix="order", statuses=(Status.RUNNING, Status.FAILED)),
    "a number as an attribute": having("customer", "3"),
    "a text as an attribute": having("region", "eu"),
    "an attribute and a status": having("region", "eu", statuses=(Status.RUNNING,)),
    "an attribute, a prefix and a workflow": having("customer", "3", prefix="Order", workflow="checkout"),
    "an attribute that none has": having("customer", "eu"),
    "a workflow that is not there": Search(workflow="nothing"),
}


def test_a_search_finds_what_matches_page_by_page_in_both_directions(crowded: Store) -> None:
    for name, query in QUERIES.items():
        for limit in (7, 100):
            pages = walk(crowded, query, limit)
            assert flat(pages) == wanted(query), (name, limit)
            assert all(len(page) == limit for page in pages[:-1]), (name, limit)


def test_what_many_rows_have_to_be_passed_over_for_is_found_the_same(
    crowded: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_FEW", 1)  # as if there were too many of every status and workflow
    monkeypatch.setattr(searching, "_CHUNK", 5)
    for name, query in QUERIES.items():
        assert flat(walk(crowded, query, 4)) == wanted(query), name


def test_a_search_that_takes_too_long_ends_its_page_and_goes_on_from_there(
    crowded: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_FEW", 1)
    monkeypatch.setattr(searching, "_CHUNK", 5)
    query = having("region", "eu", prefix="order-2")
    first = find(crowded, query, limit=50, patience_seconds=0)
    assert first.is_cut
    assert first.after is not None
    pages = walk(crowded, query, 50, patience_seconds=0)
    assert len(pages) > 5
    assert flat(pages) == wanted(query)


def test_a_page_is_not_moved_by_what_is_started_after_it(crowded: Store) -> None:
    first = find(crowded, Search(), limit=10)
    with crowded.begin("start") as connection:
        at = BEGINNING + timedelta(days=1)
        instances.insert_instance(
            connection,
            instance_id="newest",
            generation="g",
            workflow="checkout",
            queue=None,
            arguments="{}",
            request=None,
            now=at,
            pass_due_at=at,
        )
    second = find(crowded, Search(), position=first.after, limit=10)
    assert [found.id for found in second.found] == wanted(Search())[10:20]
    assert second.before is not None
    back = find(crowded, Search(), position=second.before, direction="before", limit=10)
    assert [found.id for found in back.found] == wanted(Search())[:10]
    assert back.before is not None  # the newest one


def test_a_value_is_looked_for_as_text_and_as_what_it_may_be() -> None:
    assert read_attribute("customer", "ada") == ("customer", ('"ada"',))
    assert read_attribute("customer", "7") == ("customer", ('"7"', "7", "7.0"))
    assert read_attribute("paid", "true") == ("paid", ('"true"', "true"))


@pytest.mark.parametrize("query", ["everything", "a workflow and statuses", "a text as an attribute", "one id"])
def test_postgresql_enters_an_index_where_the_page_begins(postgresql_url: str, query: str) -> None:
    store = Store(postgresql_url)
    try:
        position = Position(BEGINNING, "order-1")
        with store.read("plan") as connection:
            statement = searching._statement(connection, QUERIES[query], position, "after", 50)
            compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
            connection.execute(text("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off"))
            plan = "\n".join(row[0] for row in connection.execute(text(f"EXPLAIN {compiled}".replace(":", r"\:"))))
        key = "id" if query == "one id" else "created_at"
        assert any("Index Cond" in line and key in line for line in plan.splitlines()), plan
    finally:
        store.dispose()
