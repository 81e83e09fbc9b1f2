"""Payments, through a gateway whose idempotency key is the order id: a card is charged, or its holder asked to pay.

The gateway is simulated, and the card number decides how it behaves.
"""

from sqlalchemy import select, update

from tasks.app import app
from tasks.database import GatewayCall, Payment, PaymentRequest, insert_once, transaction
from tasks.latency import round_trip

# how a card number ends that the gateway…
DECLINED = "0002"  # …declines
TIMES_OUT = "0119"  # …is too slow to charge, the first FAILING_CALLS times
REFUND_FAILS = "5126"  # …cannot refund, the first FAILING_CALLS times
FAILING_CALLS = 2


class CardDeclined(Exception):
    """The card was not charged, and never will be."""


class RequestClosed(Exception):
    """The order cannot be paid: nobody has asked for that, or not any more."""


class GatewayTimeout(Exception):
    """The gateway did not answer in time; it may do so if asked again."""


class RefundFailed(Exception):
    """The gateway did not take the refund; it may do so if asked again."""


@app.task(autoretry_for=(GatewayTimeout,), max_retries=5, default_retry_delay=0.2)
def charge_card(order_id: str, card: str, cents: int) -> str:
    """Charge the card once for this order, however often it is asked to, and return the charge's id.

    A charge that was refunded since is not made again. Raises `CardDeclined`, or `GatewayTimeout` for Celery to retry.
    """
    charge_id = _charge_id(order_id)
    with round_trip():
        if card.endswith(DECLINED):
            raise CardDeclined(f"the card ending in {card[-4:]} was declined for {order_id}")
        if card.endswith(TIMES_OUT) and _count_call(order_id, "charge") <= FAILING_CALLS:
            raise GatewayTimeout(f"no answer to the charge for {order_id}")
        with transaction() as connection:
            insert_once(
                connection, Payment, id=charge_id, order_id=order_id, kind="charge", card_last4=card[-4:], cents=cents
            )
    return charge_id


@app.task
def refund_card(charge_id: str | None, order_id: str) -> None:
    """Refund a charge in full, once. A charge that was never made is left at that.

    `charge_id` is `None` when nobody knows whether the charge was made; it is then found by order.
    Raises `RefundFailed`, having changed nothing.
    """
    wanted = select(Payment.card_last4, Payment.cents).where(Payment.kind == "charge")
    with round_trip():
        with transaction() as connection:
            charge = connection.execute(wanted.where(Payment.id == (charge_id or _charge_id(order_id)))).one_or_none()
        if charge is None:
            return
        if charge.card_last4 == REFUND_FAILS and _count_call(order_id, "refund") <= FAILING_CALLS:
            raise RefundFailed(f"the gateway did not take the refund for {order_id}")
        with transaction() as connection:
            insert_once(
                connection,
                Payment,
                id=f"refund/{order_id}",
                order_id=order_id,
                kind="refund",
                card_last4=charge.card_last4,
                cents=charge.cents,
            )


@app.task
def request_payment(order_id: str, cents: int) -> str:
    """Ask the customer to pay, once; return the address of the gateway's page where that is done.

    A request that was withdrawn since is not opened again.
    """
    with round_trip(), transaction() as connection:
        insert_once(connection, PaymentRequest, order_id=order_id, cents=cents, is_open=True)
    return f"https://pay.example/{order_id}"


@app.task
def withdraw_payment(order_id: str) -> None:
    """Close the request to pay, and refund what was paid already. What was never asked for is left at that."""
    with round_trip(), transaction() as connection:
        close = update(PaymentRequest).where(PaymentRequest.order_id == order_id)
        connection.execute(close.values(is_open=False))
    # closed first: from here on nothing more can be paid, so nothing is paid after the refund
    refund_card(None, order_id)


def pay(order_id: str, card: str) -> str:
    """Do what the customer does at the gateway's page: pay the order, once, and return the charge's id.

    Raises `CardDeclined`, or `RequestClosed` for an order that is not open to be paid.
    """
    if card.endswith(DECLINED):
        raise CardDeclined(f"the card ending in {card[-4:]} was declined for {order_id}")
    charge_id = _charge_id(order_id)
    still_open = (PaymentRequest.order_id == order_id, PaymentRequest.is_open)
    with transaction() as connection:
        # written, not only read: a withdrawal at the same moment waits for this transaction, or this one for it
        hold = update(PaymentRequest).where(*still_open).values(is_open=True).returning(PaymentRequest.cents)
        cents = connection.execute(hold).scalar_one_or_none()
        if cents is None:
            raise RequestClosed(f"{order_id} is not open to be paid")
        insert_once(
            connection, Payment, id=charge_id, order_id=order_id, kind="charge", card_last4=card[-4:], cents=cents
        )
    return charge_id


def _charge_id(order_id: str) -> str:
    return f"charge/{order_id}"


def _count_call(order_id: str, operation: str) -> int:
    # a transaction of its own: the gateway remembers a call that it then fails
    with transaction() as connection:
        insert_once(connection, GatewayCall, order_id=order_id, operation=operation, calls=0)
        this_one = (GatewayCall.order_id == order_id, GatewayCall.operation == operation)
        count = update(GatewayCall).where(*this_one).values(calls=GatewayCall.calls + 1).returning(GatewayCall.calls)
        return connection.execute(count).scalar_one()
