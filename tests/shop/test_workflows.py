"""The shop's workflows with a real worker: whatever a customer does at whatever moment, the books balance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import pytest

from orchestrator.errors import InvalidOperation
from tasks import webhooks
from tasks.books import Books, check_books
from tasks.database import create_tables, stock_up
from tasks.demo.worker import Worker
from tasks.models import Order, OrderLine
from tasks.payments import RequestClosed, pay
from tests.shop import client

T = TypeVar("T")

STOCK = {"mug": 1000, "pen": 1000}
CARD = "4242424242424242"
ADDRESS = "12 Mill Lane, Bristol BS1 4DJ"
LINES = [OrderLine(sku="mug", quantity=2, cents=1450), OrderLine(sku="pen", quantity=1, cents=4805)]


class Shop:
    """A worker, a client, and all the orders so far."""

    def __init__(self, client: ProcessPoolExecutor, worker: Worker) -> None:
        self._client = client
        self.worker = worker
        self.orders: list[Order] = []

    def ask(self, function: Callable[..., T], *arguments: object) -> T:
        return self._client.submit(function, *arguments).result(90)

    def order(self, *, address: str = ADDRESS) -> Order:
        made = Order(id=f"order-{len(self.orders)}", email="rosa@example.com", address=address, card=CARD, lines=LINES)
        self.orders.append(made)
        return made

    def reckon(self) -> Books:
        """Wait for the end of every order; return the books, which must balance."""
        ends = {order.id: self.ask(client.wait_for_end, order.id) for order in self.orders}
        completed = [order_id for order_id, end in ends.items() if end == "COMPLETED"]
        books = check_books(self.orders, completed, STOCK)
        assert books.discrepancies == ()
        return books


@pytest.fixture(scope="module", autouse=True)
def shop(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Shop]:
    """One shop for all tests of this module, with a worker of its own."""
    folder: Path = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_DATABASE", f"sqlite:///{folder / 'shop.db'}")
        patch.setenv("SHOP_STORE", f"sqlite:///{folder / 'sagas.db'}")
        patch.setenv("SHOP_BROKER", valkey_url)
        patch.setenv("SHOP_HEARTBEAT_LIMIT", "2")
        create_tables()
        stock_up(STOCK)
        worker = Worker(folder / "worker.log")
        worker.start()
        try:
            # spawned: it imports the shop anew, and reads where things are from this environment
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                yield Shop(process, worker)
        finally:
            worker.stop()


# --- an order that waits for its payment --------------------------------------------------------------------------


def test_an_order_that_is_paid_is_delivered_however_often_the_webhook_calls(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order)
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    charge = pay(order.id, order.card)
    for _ in range(3):
        shop.ask(webhooks.on_paid, order.id, charge)
    receipt = shop.ask(client.wait_for_receipt, order.id)
    assert receipt.payment == charge
    assert receipt.cents == order.total_cents
    shop.reckon()


def test_the_webhook_may_call_before_the_order_waits_for_it(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order)
    assert shop.ask(webhooks.on_paid, order.id, f"charge/{order.id}")
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    pay(order.id, order.card)
    assert shop.ask(client.wait_for_end, order.id) == "COMPLETED"
    shop.reckon()


def test_an_order_cancelled_at_the_payment_page_is_undone_and_cannot_be_paid_any_more(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order)
    assert shop.ask(webhooks.on_payment_cancelled, order.id)
    assert shop.ask(client.wait_for_end, order.id) == "COMPENSATED NotPaid"
    with pytest.raises(RequestClosed):
        pay(order.id, order.card)
    shop.reckon()


def test_an_order_that_is_not_paid_in_time_is_undone(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order, timedelta(seconds=0.5))
    assert shop.ask(client.wait_for_end, order.id) == "COMPENSATED NotPaid"
    shop.reckon()


def test_a_payment_whose_webhook_comes_too_late_is_refunded(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order, timedelta(seconds=3))
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    charge = pay(order.id, order.card)
    assert shop.ask(client.wait_for_end, order.id) == "COMPENSATED NotPaid"
    assert not shop.ask(webhooks.on_paid, order.id, charge)
    assert shop.reckon().refunded_cents >= order.total_cents


def test_a_paid_order_that_nobody_delivers_is_refunded(shop: Shop) -> None:
    order = shop.order(address="PO Box 77, Bristol")
    shop.ask(client.start_prepaid, order)
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    shop.ask(webhooks.on_paid, order.id, pay(order.id, order.card))
    assert shop.ask(client.wait_for_end, order.id) == "COMPENSATED CourierRefused"
    shop.reckon()


def test_an_order_waits_on_while_its_worker_is_killed(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order)
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    shop.worker.kill()
    shop.ask(webhooks.on_paid, order.id, pay(order.id, order.card))
    shop.worker.start()
    assert shop.ask(client.wait_for_end, order.id) == "COMPLETED"
    shop.reckon()


# --- a customer who cancels ---------------------------------------------------------------------------------------


def test_an_order_that_waits_is_cancelled_once(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order)
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    for _ in range(2):
        shop.ask(webhooks.cancel_order, order.id, "found it cheaper")
    assert shop.ask(client.wait_for_end, order.id) == "CANCELLED WorkflowCancelled"
    with pytest.raises(RequestClosed):
        pay(order.id, order.card)
    shop.reckon()


def test_an_order_can_be_cancelled_at_any_moment(shop: Shop) -> None:
    ends = []
    for tenth in range(10):
        order = shop.order()
        shop.ask(client.start_checkout, order)
        time.sleep(tenth * 0.03)
        with suppress(InvalidOperation):  # it was delivered already
            shop.ask(webhooks.cancel_order, order.id, "changed my mind")
        ends.append(shop.ask(client.wait_for_end, order.id))
    assert set(ends) <= {"CANCELLED WorkflowCancelled", "COMPLETED"}
    assert "CANCELLED WorkflowCancelled" in ends
    shop.reckon()


# --- a customer who sends it back ---------------------------------------------------------------------------------


def test_a_completed_order_is_refunded_once_and_its_goods_are_back(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_checkout, order)
    shop.ask(client.wait_for_receipt, order.id)
    before = shop.reckon()
    for _ in range(2):
        shop.ask(webhooks.send_back, order.id)
    assert shop.ask(client.wait_for_end, order.id) == "COMPENSATED WorkflowUndone"
    after = shop.reckon()
    assert after.refunded_cents - before.refunded_cents == order.total_cents


def test_a_prepaid_order_is_refunded_as_well(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order)
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    shop.ask(webhooks.on_paid, order.id, pay(order.id, order.card))
    shop.ask(client.wait_for_receipt, order.id)
    shop.ask(webhooks.send_back, order.id)
    assert shop.ask(client.wait_for_end, order.id) == "COMPENSATED WorkflowUndone"
    shop.reckon()


def test_only_what_has_completed_can_be_sent_back_and_only_what_has_not_can_be_cancelled(shop: Shop) -> None:
    order = shop.order()
    shop.ask(client.start_prepaid, order)
    with pytest.raises(InvalidOperation, match="only what has completed can be undone"):
        shop.ask(webhooks.send_back, order.id)
    shop.ask(client.wait_until_it_can_be_paid, order.id)
    shop.ask(webhooks.on_paid, order.id, pay(order.id, order.card))
    shop.ask(client.wait_for_receipt, order.id)
    with pytest.raises(InvalidOperation, match="cannot be cancelled any more"):
        shop.ask(webhooks.cancel_order, order.id, "too late")
    shop.reckon()
