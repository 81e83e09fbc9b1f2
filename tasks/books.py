"""Reconciliation: do the shop's rows say what they must, given which orders completed?

It reads nothing but the shop's own tables, so it can hold any way of running the orders to account.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, select

from tasks.database import Payment, PaymentRequest, Reservation, Shipment, Stock, transaction
from tasks.models import Order


@dataclass(frozen=True, slots=True)
class Books:
    """What was found: the sums of money, and every discrepancy in words."""

    charged_cents: int
    refunded_cents: int
    expected_cents: int
    discrepancies: tuple[str, ...]

    @property
    def net_cents(self) -> int:
        return self.charged_cents - self.refunded_cents

    @property
    def is_balanced(self) -> bool:
        return not self.discrepancies


@dataclass(slots=True)
class _Traces:
    """What one order left behind: its payments, and the reservations, shipments and requests that are still active."""

    charges: list[int] = field(default_factory=list)
    refunds: list[int] = field(default_factory=list)
    reserved: list[tuple[str, int]] = field(default_factory=list)
    shipments: int = 0
    can_be_paid: bool = False


def check_books(orders: Collection[Order], completed_ids: Collection[str], initial_stock: Mapping[str, int]) -> Books:
    """Compare the shop's tables with what they must hold once every order has ended.

    `completed_ids` are the ids of the orders that completed; every other order must have left nothing behind.
    `initial_stock` is what was on the shelves (sku: pieces) before the first order.
    """
    with transaction() as connection:
        on_hand = {stock.sku: stock.on_hand for stock in connection.execute(select(Stock.sku, Stock.on_hand))}
        traces = _load_traces(connection)
    completed = set(completed_ids)
    charged = sum(sum(of_order.charges) for of_order in traces.values())
    refunded = sum(sum(of_order.refunds) for of_order in traces.values())
    expected = sum(order.total_cents for order in orders if order.id in completed)

    found = list(_check_stock(on_hand, traces, initial_stock))
    for order in orders:
        left = traces.get(order.id, _Traces())
        problems = _check_completed(order, left) if order.id in completed else _check_not_completed(left)
        found += [f"{order.id}: {problem}" for problem in problems]
    strangers = (traces.keys() | completed) - {order.id for order in orders}
    found += [f"{order_id}: not one of the orders" for order_id in sorted(strangers)]
    if charged - refunded != expected:
        found.append(f"money: {charged} charged less {refunded} refunded is not {expected}, what completed orders cost")
    return Books(charged, refunded, expected, tuple(found))


def count_pieces() -> tuple[int, int]:
    """Return how many pieces of all skus are on hand, and how many are reserved for orders."""
    active = select(Reservation.quantity).where(~Reservation.is_released)
    with transaction() as connection:
        on_hand = sum(connection.execute(select(Stock.on_hand)).scalars())
        return on_hand, sum(connection.execute(active).scalars())


def _load_traces(connection: Connection) -> dict[str, _Traces]:
    traces: defaultdict[str, _Traces] = defaultdict(_Traces)
    for payment in connection.execute(select(Payment.order_id, Payment.kind, Payment.cents)):
        of_order = traces[payment.order_id]
        (of_order.charges if payment.kind == "charge" else of_order.refunds).append(payment.cents)
    active = select(Reservation.order_id, Reservation.sku, Reservation.quantity).where(~Reservation.is_released)
    for reservation in connection.execute(active):
        traces[reservation.order_id].reserved.append((reservation.sku, reservation.quantity))
    for shipment in connection.execute(select(Shipment.order_id).where(~Shipment.is_cancelled)):
        traces[shipment.order_id].shipments += 1
    for request in connection.execute(select(PaymentRequest.order_id).where(PaymentRequest.is_open)):
        traces[request.order_id].can_be_paid = True
    return dict(traces)


def _check_stock(
    on_hand: Mapping[str, int], traces: Mapping[str, _Traces], initial_stock: Mapping[str, int]
) -> Iterator[str]:
    reserved: Counter[str] = Counter()
    for of_order in traces.values():
        for sku, quantity in of_order.reserved:
            reserved[sku] += quantity
    for sku in sorted(initial_stock.keys() | on_hand.keys() | reserved.keys()):
        there, aside, initial = on_hand.get(sku, 0), reserved[sku], initial_stock.get(sku, 0)
        if there + aside != initial:
            yield f"{sku}: {there} on hand and {aside} reserved are not the initial {initial}"


def _check_completed(order: Order, left: _Traces) -> Iterator[str]:
    if left.charges != [order.total_cents]:
        yield f"completed, charged {left.charges} instead of once {order.total_cents}"
    if left.refunds:
        yield f"completed, yet refunded {left.refunds}"
    if sorted(left.reserved) != sorted((line.sku, line.quantity) for line in order.lines):
        yield f"completed, and what is reserved for it is {sorted(left.reserved)}"
    if left.shipments != 1:
        yield f"completed with {left.shipments} active shipments instead of one"


def _check_not_completed(left: _Traces) -> Iterator[str]:
    if sum(left.charges) != sum(left.refunds):
        yield f"not completed, charged {left.charges} and refunded {left.refunds}"
    if left.reserved:
        yield f"not completed, yet {sorted(left.reserved)} is still reserved"
    if left.shipments:
        yield f"not completed, yet it has {left.shipments} active shipments"
    if left.can_be_paid:
        yield "not completed, yet it can still be paid"
