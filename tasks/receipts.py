"""Receipts by email: one for each order."""

from tasks.app import app
from tasks.database import SentReceipt, insert_once, transaction
from tasks.latency import round_trip

BOUNCES = ".invalid"  # a domain that never has a mailbox (RFC 2606)


class EmailBounced(Exception):
    """Nobody reads mail at this address."""


@app.task
def send_receipt(order_id: str, email: str, cents: int) -> None:
    """Send the order's receipt once, however often it is asked to. Raises `EmailBounced`."""
    with round_trip():
        if email.endswith(BOUNCES):
            raise EmailBounced(f"the receipt for {order_id} came back from {email}")
        with transaction() as connection:
            insert_once(connection, SentReceipt, order_id=order_id, email=email, cents=cents)
