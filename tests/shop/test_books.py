import pytest
from sqlalchemy import delete, insert, update

from tasks.books import Books, check_books
from tasks.couriers import book_courier, cancel_courier
from tasks.database import Payment, PaymentRequest, Reservation, Shipment, ShopTable, Stock, transaction
from tasks.models import Order, OrderLine
from tasks.payments import charge_card, refund_card
from tasks.stock import release_stock, reserve_stock

INITIAL = {"mug": 3, "globe": 0}
CARD = "4242424242424242"
ADDRESS = "12 Mill Lane, Bristol BS1 4DJ"


def order(order_id: str) -> Order:
    lines = [OrderLine(sku="mug", quantity=1, cents=1450)]
    return Order(id=order_id, email="rosa@example.com", address=ADDRESS, card=CARD, lines=lines)


SOLD, UNDONE = order("sold"), order("undone")


@pytest.fixture(autouse=True)
def one_order_sold_and_one_undone(shop: None) -> None:
    for each in (SOLD, UNDONE):
        reserve_stock(each.id, "mug", 1)
        charge_card(each.id, CARD, each.total_cents)
        book_courier(each.id, ADDRESS)
    cancel_courier(None, UNDONE.id)
    refund_card(None, UNDONE.id)
    release_stock(None, UNDONE.id, "mug")


def check() -> Books:
    return check_books([SOLD, UNDONE], {SOLD.id}, INITIAL)


def plant(table: type[ShopTable], **values: object) -> None:
    with transaction() as connection:
        connection.execute(insert(table).values(**values))


def plant_payment(order_id: str, kind: str, cents: int) -> None:
    plant(Payment, id="planted", order_id=order_id, kind=kind, card_last4=CARD[-4:], cents=cents)


def test_honest_books_balance() -> None:
    assert check() == Books(charged_cents=2900, refunded_cents=1450, expected_cents=1450, discrepancies=())
    assert check().net_cents == 1450
    assert check().is_balanced


def test_a_second_charge_is_found() -> None:
    plant_payment(SOLD.id, "charge", 1450)
    assert not check().is_balanced
    assert check().discrepancies == (
        "sold: completed, charged [1450, 1450] instead of once 1450",
        "money: 4350 charged less 1450 refunded is not 1450, what completed orders cost",
    )


def test_a_charge_of_the_wrong_amount_is_found() -> None:
    with transaction() as connection:
        connection.execute(update(Payment).where(Payment.order_id == SOLD.id).values(cents=1))
    assert "sold: completed, charged [1] instead of once 1450" in check().discrepancies


def test_a_completed_order_that_was_refunded_is_found() -> None:
    refund_card(None, SOLD.id)
    assert "sold: completed, yet refunded [1450]" in check().discrepancies


def test_a_second_refund_is_found() -> None:
    plant_payment(UNDONE.id, "refund", 1450)
    assert "undone: not completed, charged [1450] and refunded [1450, 1450]" in check().discrepancies


def test_an_order_that_is_undone_but_kept_its_charge_is_found() -> None:
    with transaction() as connection:
        connection.execute(delete(Payment).where(Payment.kind == "refund"))
    assert "undone: not completed, charged [1450] and refunded []" in check().discrepancies


def test_a_missing_reservation_is_found() -> None:
    release_stock(None, SOLD.id, "mug")
    assert check().discrepancies == ("sold: completed, and what is reserved for it is []",)


def test_a_reservation_left_behind_is_found() -> None:
    plant(Reservation, id="planted", order_id=UNDONE.id, sku="mug", quantity=1, is_released=False)
    assert check().discrepancies == (
        "mug: 2 on hand and 2 reserved are not the initial 3",
        "undone: not completed, yet [('mug', 1)] is still reserved",
    )


@pytest.mark.parametrize("pieces", [1, 3])
def test_stock_lost_or_conjured_is_found(pieces: int) -> None:
    with transaction() as connection:
        connection.execute(update(Stock).where(Stock.sku == "mug").values(on_hand=pieces))
    assert check().discrepancies == (f"mug: {pieces} on hand and 1 reserved are not the initial 3",)


def test_a_second_shipment_is_found() -> None:
    plant(Shipment, id="planted", order_id=SOLD.id, address=ADDRESS, is_cancelled=False)
    assert check().discrepancies == ("sold: completed with 2 active shipments instead of one",)


def test_a_shipment_left_behind_is_found() -> None:
    plant(Shipment, id="planted", order_id=UNDONE.id, address=ADDRESS, is_cancelled=False)
    assert check().discrepancies == ("undone: not completed, yet it has 1 active shipments",)


def test_a_request_to_pay_left_open_is_found() -> None:
    plant(PaymentRequest, order_id=SOLD.id, cents=1450, is_open=True)  # paid, so it may stay
    plant(PaymentRequest, order_id=UNDONE.id, cents=1450, is_open=True)
    assert check().discrepancies == ("undone: not completed, yet it can still be paid",)


def test_money_of_an_order_nobody_placed_is_found() -> None:
    plant_payment("stranger", "charge", 500)
    assert check().discrepancies == (
        "stranger: not one of the orders",
        "money: 3400 charged less 1450 refunded is not 1450, what completed orders cost",
    )


def test_an_order_that_claims_to_have_completed_and_did_not_is_found() -> None:
    found = check_books([SOLD, UNDONE], {SOLD.id, UNDONE.id}, INITIAL).discrepancies
    assert "undone: completed with 0 active shipments instead of one" in found
    assert "undone: completed, and what is reserved for it is []" in found
