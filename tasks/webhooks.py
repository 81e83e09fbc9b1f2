"""What the shop's web server calls: the payment provider's webhook, and what a customer can do about an order.

Each is safe to repeat, as a webhook is by a provider that saw no answer.
"""

from tasks.app import orchestrator


def on_paid(order_id: str, charge_id: str) -> bool:
    """Tell the order that it was paid; return whether it was still there to be told.

    One that is not has been undone, and with it the payment.
    """
    return orchestrator.send(order_id, "paid", charge_id, message_id=charge_id, missing="ignore")


def on_payment_cancelled(order_id: str) -> bool:
    """Tell the order that its customer does not want to pay; return whether it was still there to be told."""
    return orchestrator.send(order_id, "cancelled", None, message_id="cancelled", missing="ignore")


def cancel_order(order_id: str, reason: str) -> None:
    """Cancel an order on its way, whatever it is doing: what was done for it is undone.

    Raises `InvalidOperation` for one that has completed: that can be sent back.
    """
    orchestrator.get(order_id).cancel(reason)


def send_back(order_id: str) -> None:
    """Undo an order that has completed: the money goes back to the customer, the goods on the shelf.

    Raises `InvalidOperation` for one that has not completed.
    """
    orchestrator.get(order_id).undo()
