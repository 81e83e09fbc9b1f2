"""The warehouse: stock is set aside for an order, or put back. Both are idempotent by order id and sku."""

from sqlalchemy import update

from tasks.app import app
from tasks.database import Reservation, Stock, insert_once, transaction
from tasks.latency import round_trip


class OutOfStock(Exception):
    """There are fewer pieces on hand than were asked for."""


@app.task
def reserve_stock(order_id: str, sku: str, quantity: int) -> str:
    """Set `quantity` pieces aside and return the reservation's id.

    Asked again for the same order and sku, it sets nothing more aside and returns the same id, also once released.
    Raises `OutOfStock`, having changed nothing.
    """
    reservation_id = _reservation_id(order_id, sku)
    with round_trip(), transaction() as connection:
        if insert_once(
            connection, Reservation, id=reservation_id, order_id=order_id, sku=sku, quantity=quantity, is_released=False
        ):
            taken = update(Stock).where(Stock.sku == sku, Stock.on_hand >= quantity)
            if connection.execute(taken.values(on_hand=Stock.on_hand - quantity)).rowcount == 0:
                raise OutOfStock(f"{order_id} wants {quantity} of {sku}, and there are not so many")
    return reservation_id


@app.task
def release_stock(reservation_id: str | None, order_id: str, sku: str) -> None:
    """Put a reservation's pieces back. One that was never made, or was already released, is left as it is.

    `reservation_id` is `None` when nobody knows whether the reservation was made; it is then found by order and sku.
    """
    wanted = Reservation.id == (reservation_id or _reservation_id(order_id, sku))
    release = update(Reservation).where(wanted, Reservation.is_released.is_(False)).values(is_released=True)
    with round_trip(), transaction() as connection:
        released = connection.execute(release.returning(Reservation.sku, Reservation.quantity)).one_or_none()
        if released is not None:
            shelf = update(Stock).where(Stock.sku == released.sku)
            connection.execute(shelf.values(on_hand=Stock.on_hand + released.quantity))


def _reservation_id(order_id: str, sku: str) -> str:
    return f"reservation/{order_id}/{sku}"
