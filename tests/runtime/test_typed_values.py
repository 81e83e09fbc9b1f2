"""Typed values reach bodies, workflows and clients as the types that are annotated, live and replayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from celery import shared_task
from pydantic import BaseModel

from orchestrator import Context, UndoneStep, shared_workflow
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import note

KEEPS_RESULTS = True


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Item(BaseModel):
    sku: str
    price: Decimal
    colours: frozenset[Colour] = frozenset()


@dataclass(frozen=True)
class Order:
    id: UUID
    placed_at: datetime
    items: list[Item]
    patience: timedelta = timedelta(minutes=5)
    sizes: tuple[int, ...] = ()
    prices: dict[Colour, Decimal] = field(default_factory=dict)
    best_before: date | None = None


ORDER = Order(
    UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
    datetime(2026, 5, 1, 12, 30, 15, 250_001, tzinfo=UTC),
    [
        Item(sku="007", price=Decimal("12.10"), colours=frozenset({Colour.RED, Colour.BLUE})),
        Item(sku="b", price=Decimal(3)),
    ],
    timedelta(days=1, microseconds=7),
    (1, 2),
    {Colour.RED: Decimal("0.10")},
    date(2027, 1, 1),
)

#: Values of every kind, and the annotations of the tasks that return them as they are.
VALUES: list[tuple[Any, Any]] = [
    (ORDER, Order),
    (ORDER.items[0], Item),
    ([ORDER.items[0], None], list[Item | None]),
    ({"a": ORDER}, dict[str, Order]),
    (Colour.BLUE, Colour),
    ({Colour.RED}, set[Colour]),
    ((1, "a", Decimal("1.50")), tuple[int, str, Decimal]),
    (timedelta(days=-1, seconds=5), timedelta),
    (datetime(2026, 5, 1, tzinfo=UTC), datetime),
    (UUID(int=7), UUID),
    (Decimal("1E-20"), Decimal),
    (b"\x00\xff", bytes),
    (1.5, float),
    (None, Item | None),
    ({"plain": [1, 2.5, "x", None, True]}, dict),
]


def make_echo(index: int, annotation: Any) -> Any:
    def echo(value: Any) -> Any:
        note(repr(value), "effect")
        return value

    echo.__annotations__ = {"value": annotation, "return": annotation}
    return shared_task(name=f"{__name__}.echo_{index}")(echo)


ECHOES = [make_echo(index, annotation) for index, (_, annotation) in enumerate(VALUES)]


@shared_workflow
def echoes(ctx: Context, index: int) -> list[bool]:
    """Tell whether the value is the same after one step, and after another one that is given it."""
    value, _ = VALUES[index]
    once = ctx.run(ECHOES[index].s(value))
    same = [type(once) is type(value), once == value]
    again = ctx.run(ECHOES[index].s(once))
    return [*same, type(again) is type(value), again == value]


@pytest.mark.parametrize("index", range(len(VALUES)), ids=[str(annotation) for _, annotation in VALUES])
def test_a_value_is_of_its_annotated_type_in_bodies_and_workflows(cluster: Cluster, index: int) -> None:
    handle = cluster.run("echoes", index)
    assert handle.get(timeout=1) == [True] * 4
    value, _ = VALUES[index]
    seen = cluster.effects.names(handle.id)
    assert seen[0] == seen[1]
    if not isinstance(value, Order | Item | list | dict):  # whose sets have no order of their own
        assert seen[0] == repr(value)


@shared_task
def untyped(order, count=1):  # type: ignore[no-untyped-def]
    return [type(order).__name__, order["sizes"], count]


@shared_task
def price(order: Order) -> dict[str, Any]:
    return {"sku": order.items[0].sku, "price": order.items[0].price}


@shared_task
def cancel(step: UndoneStep) -> None:
    order, item = step.args[0], step.result
    note(f"{type(order).__name__} {type(item).__name__} {item == order.items[0]}", "effect")


@shared_task
def pick(order: Order) -> Item:
    return order.items[0]


@shared_task
def put_back(item: Item | None) -> None:
    note(f"{type(item).__name__}", "effect")


def register(orchestrator: Any) -> None:
    orchestrator.compensates(pick, pass_step=True)(cancel)


@shared_workflow
def ships(ctx: Context, order: Order, *, at: datetime, fails: bool = False) -> Order:
    assert isinstance(order, Order)
    assert isinstance(order.items[0], Item)
    assert isinstance(at, datetime)
    assert ctx.run(untyped.s(order, count=2)) == ["dict", [1, 2], 2]
    item = ctx.run(price.s(order), returns=Item)
    assert type(item) is Item
    assert item.price == order.items[0].price
    assert ctx.local(total_of, order) == Decimal("15.10")
    ctx.run(pick.s(order))
    ctx.run(pick.s(order), compensate=put_back.s())
    if fails:
        raise ValueError("no courier")
    return order


def total_of(order: Order) -> Decimal:
    return sum((item.price for item in order.items), Decimal())


@pytest.mark.parametrize("how", ["start", "delay"])
def test_input_and_result_of_a_workflow_are_typed(cluster: Cluster, how: str) -> None:
    task, at = cluster.task("ships"), datetime(2026, 5, 2, tzinfo=UTC)
    handle = task.delay(ORDER, at=at) if how == "delay" else cluster.orchestrator.start(task.s(ORDER, at=at))
    assert handle.get(timeout=10) == ORDER
    assert cluster.orchestrator.get(handle.id).get(timeout=1) == ORDER
    assert handle.describe().kwargs == {"at": at}


def test_a_compensation_gets_the_typed_step_or_result(cluster: Cluster) -> None:
    task = cluster.task("ships")
    handle = cluster.orchestrator.start(task.s(ORDER, at=ORDER.placed_at, fails=True))
    cluster.wait_status(handle)
    assert handle.describe().blocked is None
    assert cluster.effects.names(handle.id) == ["Item", "Order Item True"]


def test_input_that_was_sent_by_name_and_does_not_fit_is_named(cluster: Cluster) -> None:
    sent = cluster.app.send_task(cluster.task("ships").name, ({"not": "an order"},), {"at": "tomorrow"})
    handle = cluster.task("ships").AsyncResult(sent.id)
    assert cluster.wait_status(handle) == "FAILED"
    error = handle.describe().error
    assert error is not None
    assert error.message.startswith("'order' of the input does not fit Order: ")


@shared_workflow
def misfits(ctx: Context) -> Any:
    return ctx.run(untyped.s({"sizes": []}), returns=Item)


def test_a_result_that_does_not_fit_what_the_workflow_asks_for_blocks(cluster: Cluster) -> None:
    handle = cluster.run("misfits")
    blocked = handle.describe().blocked
    assert blocked is not None
    assert "ResultMismatch: the recorded value does not fit Item" in blocked
