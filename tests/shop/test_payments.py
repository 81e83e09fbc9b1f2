import pytest
from sqlalchemy import select

from tasks.app import app, orchestrator
from tasks.database import Payment, transaction
from tasks.payments import (
    CardDeclined,
    GatewayTimeout,
    RefundFailed,
    RequestClosed,
    charge_card,
    pay,
    refund_card,
    request_payment,
    withdraw_payment,
)

GOOD = "4242424242424242"
DECLINED = "4000000000000002"
TIMES_OUT = "4000000000000119"
REFUND_FAILS = "4000000000005126"


def payments() -> list[tuple[str, str, int]]:
    wanted = select(Payment.order_id, Payment.kind, Payment.cents).order_by(Payment.kind)
    with transaction() as connection:
        return [(row.order_id, row.kind, row.cents) for row in connection.execute(wanted)]


CHARGED = ("order-1", "charge", 1450)
REFUNDED = ("order-1", "refund", 1450)


def test_charging_twice_for_one_order_charges_once() -> None:
    assert charge_card("order-1", GOOD, 1450) == charge_card("order-1", GOOD, 1450)
    assert payments() == [CHARGED]


def test_a_declined_card_is_not_charged() -> None:
    for _ in range(3):
        with pytest.raises(CardDeclined):
            charge_card("order-1", DECLINED, 1450)
    assert payments() == []


def test_the_gateway_times_out_twice_and_comes_back() -> None:
    for _ in range(2):
        with pytest.raises(GatewayTimeout):
            charge_card("order-1", TIMES_OUT, 1450)
    assert payments() == []
    charge_card("order-1", TIMES_OUT, 1450)
    assert payments() == [CHARGED]


def test_celery_itself_gets_a_charge_past_the_timeouts() -> None:
    charge_card.apply(args=("order-1", TIMES_OUT, 1450)).get()
    assert payments() == [CHARGED]


def test_refunding_twice_refunds_once() -> None:
    charge_id = charge_card("order-1", GOOD, 1450)
    refund_card(charge_id, "order-1")
    refund_card(charge_id, "order-1")
    assert payments() == [CHARGED, REFUNDED]


def test_refund_finds_a_charge_whose_id_nobody_knows() -> None:
    charge_card("order-1", GOOD, 1450)
    refund_card(None, "order-1")
    assert payments() == [CHARGED, REFUNDED]


def test_a_charge_repeated_after_its_refund_takes_no_money() -> None:
    charge_id = charge_card("order-1", GOOD, 1450)
    refund_card(charge_id, "order-1")
    assert charge_card("order-1", GOOD, 1450) == charge_id
    assert payments() == [CHARGED, REFUNDED]


def test_refunding_what_was_never_charged_does_nothing() -> None:
    charge_card("order-2", GOOD, 900)
    refund_card(None, "order-1")
    refund_card("no such charge", "order-1")
    assert payments() == [("order-2", "charge", 900)]


def test_a_refund_that_came_first_does_not_stop_the_charge_or_its_own_refund() -> None:
    refund_card(None, "order-1")
    charge_id = charge_card("order-1", GOOD, 1450)
    refund_card(charge_id, "order-1")
    assert payments() == [CHARGED, REFUNDED]


def test_a_refund_fails_twice_and_then_works() -> None:
    refund_card(None, "order-1")  # nothing to refund, so not one of the two
    charge_id = charge_card("order-1", REFUND_FAILS, 1450)
    for _ in range(2):
        with pytest.raises(RefundFailed):
            refund_card(charge_id, "order-1")
    assert payments() == [CHARGED]
    refund_card(charge_id, "order-1")
    assert payments() == [CHARGED, REFUNDED]


def test_what_was_asked_for_is_paid_once() -> None:
    request_payment("order-1", 1450)
    assert pay("order-1", GOOD) == pay("order-1", GOOD)
    assert payments() == [CHARGED]


def test_nothing_is_paid_that_nobody_asked_for() -> None:
    with pytest.raises(RequestClosed):
        pay("order-1", GOOD)
    assert payments() == []


def test_a_withdrawn_request_cannot_be_paid_nor_be_made_again() -> None:
    request_payment("order-1", 1450)
    withdraw_payment("order-1")
    request_payment("order-1", 1450)
    with pytest.raises(RequestClosed):
        pay("order-1", GOOD)
    assert payments() == []


def test_withdrawing_a_request_that_was_paid_refunds_it_once() -> None:
    request_payment("order-1", 1450)
    pay("order-1", GOOD)
    withdraw_payment("order-1")
    withdraw_payment("order-1")
    assert payments() == [CHARGED, REFUNDED]


def test_nobody_who_watches_is_shown_a_card() -> None:
    app.loader.import_default_modules()
    order = {"id": "A1", "card": "4000-1", "lines": []}
    assert orchestrator.masks.arguments("tasks.workflows.checkout", [order], {}) == ([{**order, "card": "***"}], {})
    assert orchestrator.masks.arguments(charge_card.name, ["A1", "4000-1", 5], {}) == (["A1", "***", 5], {})
