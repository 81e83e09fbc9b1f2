import pytest
from sqlalchemy import select

from tasks.couriers import CourierRefused, book_courier, cancel_courier
from tasks.database import Shipment, transaction

ADDRESS = "Rosa Weber, 12 Mill Lane, Bristol BS1 4DJ"


def shipments() -> list[tuple[str, bool]]:
    with transaction() as connection:
        rows = connection.execute(select(Shipment.order_id, Shipment.is_cancelled))
        return [(row.order_id, row.is_cancelled) for row in rows]


def test_booking_twice_for_one_order_books_once() -> None:
    assert book_courier("order-1", ADDRESS) == book_courier("order-1", ADDRESS)
    assert shipments() == [("order-1", False)]


def test_a_po_box_is_refused_and_nothing_is_booked() -> None:
    with pytest.raises(CourierRefused):
        book_courier("order-1", "Rosa Weber, PO Box 77, Bristol BS1 4DJ")
    assert shipments() == []


def test_cancelling_twice_cancels_that_shipment_alone() -> None:
    book_courier("order-2", ADDRESS)
    shipment_id = book_courier("order-1", ADDRESS)
    cancel_courier(shipment_id, "order-1")
    cancel_courier(shipment_id, "order-1")
    assert sorted(shipments()) == [("order-1", True), ("order-2", False)]


def test_cancel_finds_a_shipment_whose_id_nobody_knows() -> None:
    book_courier("order-1", ADDRESS)
    cancel_courier(None, "order-1")
    assert shipments() == [("order-1", True)]


def test_a_cancellation_that_came_first_does_not_stop_the_booking_or_its_own_cancellation() -> None:
    cancel_courier(None, "order-1")
    cancel_courier("no such shipment", "order-1")
    assert shipments() == []
    shipment_id = book_courier("order-1", ADDRESS)
    assert shipments() == [("order-1", False)]
    cancel_courier(shipment_id, "order-1")
    assert shipments() == [("order-1", True)]
