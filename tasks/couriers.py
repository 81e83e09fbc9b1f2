"""The courier: a shipment is booked for an order, or called off. Both are idempotent by order id."""

from sqlalchemy import update

from tasks.app import app
from tasks.database import Shipment, insert_once, transaction
from tasks.latency import round_trip

REFUSED = "PO Box"  # a courier needs a door to knock on


class CourierRefused(Exception):
    """The courier does not deliver to this address."""


@app.task
def book_courier(order_id: str, address: str) -> str:
    """Book one shipment for the order, however often it is asked to, and return its id, which is the tracking number.

    Raises `CourierRefused` for an address with a PO box.
    """
    shipment_id = _shipment_id(order_id)
    with round_trip():
        if REFUSED in address:
            raise CourierRefused(f"no delivery to {address!r}, for {order_id}")
        with transaction() as connection:
            insert_once(connection, Shipment, id=shipment_id, order_id=order_id, address=address, is_cancelled=False)
    return shipment_id


@app.task
def cancel_courier(shipment_id: str | None, order_id: str) -> None:
    """Call a shipment off. One that was never booked, or was already called off, is left as it is.

    `shipment_id` is `None` when nobody knows whether the shipment was booked; it is then found by order.
    """
    wanted = Shipment.id == (shipment_id or _shipment_id(order_id))
    with round_trip(), transaction() as connection:
        connection.execute(update(Shipment).where(wanted).values(is_cancelled=True))


def _shipment_id(order_id: str) -> str:
    return f"shipment/{order_id}"
