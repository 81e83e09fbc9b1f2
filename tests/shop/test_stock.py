import pytest
from sqlalchemy import select

from tasks.database import Reservation, Stock, stock_up, transaction
from tasks.stock import OutOfStock, release_stock, reserve_stock


def on_hand(sku: str) -> int:
    with transaction() as connection:
        return connection.execute(select(Stock.on_hand).where(Stock.sku == sku)).scalar_one()


def reservations() -> list[tuple[str, int, bool]]:
    wanted = select(Reservation.order_id, Reservation.quantity, Reservation.is_released)
    with transaction() as connection:
        return [(row.order_id, row.quantity, row.is_released) for row in connection.execute(wanted)]


def test_reserving_takes_the_pieces_off_the_shelf() -> None:
    reserve_stock("order-1", "mug", 2)
    assert on_hand("mug") == 1
    assert reservations() == [("order-1", 2, False)]


def test_reserving_twice_for_one_order_reserves_once() -> None:
    assert reserve_stock("order-1", "mug", 2) == reserve_stock("order-1", "mug", 2)
    assert on_hand("mug") == 1
    assert reservations() == [("order-1", 2, False)]


@pytest.mark.parametrize(("sku", "quantity"), [("globe", 1), ("mug", 4), ("never-sold-here", 1)])
def test_too_many_pieces_raise_and_change_nothing(sku: str, quantity: int) -> None:
    with pytest.raises(OutOfStock):
        reserve_stock("order-1", sku, quantity)
    assert on_hand("mug") == 3
    assert reservations() == []


def test_releasing_puts_the_pieces_back_once() -> None:
    reservation_id = reserve_stock("order-1", "mug", 2)
    release_stock(reservation_id, "order-1", "mug")
    release_stock(reservation_id, "order-1", "mug")
    assert on_hand("mug") == 3
    assert reservations() == [("order-1", 2, True)]


def test_release_finds_a_reservation_whose_id_nobody_knows() -> None:
    reserve_stock("order-1", "mug", 2)
    release_stock(None, "order-1", "mug")
    assert on_hand("mug") == 3


def test_releasing_what_was_never_reserved_does_nothing() -> None:
    reserve_stock("order-2", "mug", 1)
    release_stock(None, "order-1", "mug")
    release_stock("no such reservation", "order-1", "mug")
    assert on_hand("mug") == 2
    assert reservations() == [("order-2", 1, False)]


def test_a_release_that_came_first_does_not_stop_the_reservation_or_its_own_release() -> None:
    release_stock(None, "order-1", "mug")
    reservation_id = reserve_stock("order-1", "mug", 2)
    assert on_hand("mug") == 1
    release_stock(reservation_id, "order-1", "mug")
    assert on_hand("mug") == 3


def test_stocking_up_again_conjures_no_pieces() -> None:
    reserve_stock("order-1", "mug", 2)
    stock_up({"mug": 3})
    assert on_hand("mug") == 1
