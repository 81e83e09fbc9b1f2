from typing import Any

from django.test import TestCase, TransactionTestCase
from proj import celery_app, orchestrator

from .models import Item, Order
from .workflows import checkout

ORDER = {"customer": "ada", "sku": "tea", "quantity": 2, "card": "visa", "address": "12 Main St"}


def setUpModule() -> None:
    celery_app.conf.broker_url = "memory://"  # what is sent stays here


def tearDownModule() -> None:
    orchestrator.close()  # PostgreSQL drops no test database that somebody is connected to


class OrdersInATransactionOfTheTest(TestCase):
    """Fast: all is rolled back after each test, and nobody else ever sees it."""

    def setUp(self) -> None:
        Item.objects.create(sku="tea", cents=450, available=5)

    def test_an_order_is_taken(self) -> None:
        with self.captureOnCommitCallbacks() as callbacks:
            answer = self.client.post("/orders/", ORDER, "application/json")
        self.assertEqual(answer.status_code, 202)
        self.assertEqual(Order.objects.get().cents, 900)
        self.assertEqual(len(callbacks), 1)  # the message to the worker

    def test_an_unknown_item_is_not_found(self) -> None:
        answer = self.client.post("/orders/", {**ORDER, "sku": "gold"}, "application/json")
        self.assertEqual(answer.status_code, 404)


class OrdersThatAreCommitted(TransactionTestCase):
    """Slower: what is written is there for other connections, so the store can be asked."""

    def setUp(self) -> None:
        Item.objects.create(sku="tea", cents=450, available=5)

    def post(self, **changes: Any) -> Any:
        return self.client.post("/orders/", {**ORDER, **changes}, "application/json")

    def test_an_order_has_a_checkout(self) -> None:
        order_id = self.post().json()["id"]
        self.assertEqual(self.client.get(f"/orders/{order_id}/").json(), {"status": "placed", "checkout": "PENDING"})

    def test_an_order_over_the_limit_has_none(self) -> None:
        before = len(orchestrator.list(workflow=checkout))
        self.assertEqual(self.post(quantity=300).status_code, 422)
        self.assertEqual(Order.objects.count(), 0)
        self.assertEqual(len(orchestrator.list(workflow=checkout)), before)
