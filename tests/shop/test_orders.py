from collections import Counter

import pytest
from pydantic import ValidationError

from tasks import couriers, payments, receipts
from tasks.models import Order, OrderLine
from tasks.samples import get_initial_stock, list_orders


def kind_of(order: Order, stock: dict[str, int]) -> str:
    is_refused = couriers.REFUSED in order.address
    if any(line.quantity > stock[line.sku] for line in order.lines):
        return "sold out"
    if order.card.endswith(payments.DECLINED):
        return "declined"
    if order.card.endswith(payments.REFUND_FAILS):
        return "refund fails" if is_refused else "refund would fail, but never happens"
    if is_refused:
        return "courier refuses"
    if order.card.endswith(payments.TIMES_OUT):
        return "gateway times out"
    return "receipt bounces" if order.email.endswith(receipts.BOUNCES) else "plain"


def test_the_sample_orders_are_of_every_kind() -> None:
    stock = get_initial_stock()
    assert Counter(kind_of(order, stock) for order in list_orders()) == {
        "plain": 128,
        "gateway times out": 8,
        "receipt bounces": 4,
        "declined": 20,
        "sold out": 16,
        "courier refuses": 14,
        "refund fails": 10,
    }


def test_the_sample_orders_have_ids_of_their_own() -> None:
    assert len({order.id for order in list_orders()}) == 200


def test_what_sells_out_does_not_depend_on_which_order_comes_first() -> None:
    stock = get_initial_stock()
    demand: dict[str, list[int]] = {sku: [] for sku in stock}
    for order in list_orders():
        for line in order.lines:
            demand[line.sku].append(line.quantity)
    for sku, quantities in demand.items():
        enough_for_all = sum(quantities) <= stock[sku]
        too_few_for_any = min(quantities) > stock[sku]
        assert enough_for_all or too_few_for_any, sku


def test_some_sold_out_orders_reserve_another_line_first() -> None:
    stock = get_initial_stock()
    sold_out = [order for order in list_orders() if kind_of(order, stock) == "sold out"]
    assert any(order.lines[0].quantity <= stock[order.lines[0].sku] for order in sold_out)


def test_the_total_is_quantity_times_price() -> None:
    lines = [OrderLine(sku="mug", quantity=2, cents=1450), OrderLine(sku="pen", quantity=1, cents=4800)]
    order = Order(id="order-1", email="rosa@example.com", address="12 Mill Lane", card="4242", lines=lines)
    assert order.total_cents == 7700


def test_a_sku_in_two_lines_is_refused() -> None:
    line = {"sku": "mug", "quantity": 1, "cents": 1450}
    with pytest.raises(ValidationError, match="in one line only"):
        Order.model_validate({"id": "1", "email": "e", "address": "a", "card": "c", "lines": [line, line]})
