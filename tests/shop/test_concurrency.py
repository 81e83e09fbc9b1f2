from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tasks.books import check_books
from tasks.database import stock_up
from tasks.models import Order, OrderLine
from tasks.payments import charge_card, refund_card
from tasks.stock import release_stock, reserve_stock

CARD = "4242424242424242"
PEN = OrderLine(sku="pen", quantity=1, cents=4800)
ORDERS = [
    Order(id=f"order-{number}", email="rosa@example.com", address="12 Mill Lane", card=CARD, lines=[PEN])
    for number in range(20)
]


def buy_and_return(order_id: str) -> None:
    reserve_stock(order_id, "pen", 1)
    charge_card(order_id, CARD, 4800)
    refund_card(None, order_id)
    release_stock(None, order_id, "pen")


def test_worker_processes_that_meet_on_the_same_rows_all_succeed() -> None:
    stock_up({"pen": 20})
    # every order twice: a message delivered a second time meets the first one at work
    order_ids = [order.id for order in ORDERS for _ in range(2)]
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as processes:
        list(processes.map(buy_and_return, order_ids))
    books = check_books(ORDERS, completed_ids=[], initial_stock={"mug": 3, "globe": 0, "pen": 20})
    assert books.discrepancies == ()
    assert books.refunded_cents == 20 * 4800
