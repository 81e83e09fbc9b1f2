"""What a client of the shop does, in a process of its own that has read where the shop's broker and store are."""

from __future__ import annotations

import time
from datetime import timedelta

from tasks.app import orchestrator
from tasks.models import Order, Receipt
from tasks.workflows import checkout, prepaid_checkout

ENDED = ("COMPLETED", "COMPENSATED", "FAILED", "COMPENSATION_FAILED", "CANCELLED", "TERMINATED")


def start_checkout(order: Order) -> None:
    orchestrator.start(checkout.s(order), instance_id=order.id)


def start_prepaid(order: Order, time_to_pay: timedelta = timedelta(days=3)) -> None:
    orchestrator.start(prepaid_checkout.s(order, time_to_pay), instance_id=order.id)


def wait_for_receipt(order_id: str) -> Receipt:
    receipt: Receipt = orchestrator.get(order_id).get(timeout=60)
    return receipt


def wait_for_end(order_id: str) -> str:
    """Return the status of an order that has ended, with the name of its error."""
    deadline = time.monotonic() + 60
    while (found := orchestrator.get(order_id).describe()).status not in ENDED:
        assert time.monotonic() < deadline, f"{order_id} is {found.status}"
        time.sleep(0.02)
    error = found.error.type.rpartition(".")[2] if found.error is not None else ""
    return f"{found.status} {error}".strip()


def wait_until_it_can_be_paid(order_id: str) -> None:
    """Wait until the order waits for its messages."""
    deadline = time.monotonic() + 60
    while not any(entry.kind == "receive" for entry in orchestrator.get(order_id).history()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
