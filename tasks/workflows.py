"""The shop's checkouts as durable workflows, over its existing tasks as they are."""

from datetime import timedelta

from orchestrator import Context, UndoneStep
from tasks.app import app, orchestrator
from tasks.couriers import book_courier, cancel_courier
from tasks.models import Order, Receipt
from tasks.payments import charge_card, refund_card, request_payment, withdraw_payment
from tasks.receipts import send_receipt
from tasks.stock import release_stock, reserve_stock


class NotPaid(Exception):
    """The customer let the time to pay pass, or cancelled at the payment provider's page."""


# registered once, so no workflow that books a courier has to remember how to call it off. It takes the
# step, because what cancel_courier needs beside the result, the order id, is among the step's arguments
@orchestrator.compensates(book_courier, pass_step=True)
@app.task
def call_off_courier(booking: UndoneStep) -> None:
    """Call off the courier of a booking that is undone, whether or not the booking's result is known."""
    cancel_courier(booking.result, booking.args[0])


@orchestrator.workflow
def checkout(ctx: Context, order: Order) -> Receipt:
    """Reserve every line, charge the card, book the courier, send the receipt.

    If the stock, the card or the courier fails, what was done before it is undone, last first.
    """
    _reserve(ctx, order)
    payment = ctx.run(
        charge_card.s(order.id, order.card, order.total_cents),
        compensate=refund_card.s(order.id),
    )
    return _deliver(ctx, order, payment)


@orchestrator.workflow
def prepaid_checkout(ctx: Context, order: Order, time_to_pay: timedelta = timedelta(days=3)) -> Receipt:
    """Reserve every line, ask the customer to pay and wait for that, book the courier, send the receipt.

    `tasks.webhooks` tells it what became of the payment. If the customer cancels, or lets the time pass, what was done
    is undone, last first; so it is if the whole order is cancelled while it waits.
    """
    _reserve(ctx, order)
    # what is undone with this is the request, and the payment, which may come at any time after it
    ctx.run(request_payment.s(order.id, order.total_cents), compensate=withdraw_payment.si(order.id))
    paid, cancelled = ctx.message("paid", returns=str), ctx.message("cancelled")
    ctx.wait(paid, cancelled, timeout=time_to_pay)
    if not paid.ready():
        raise NotPaid(f"{order.id} was cancelled" if cancelled.ready() else f"{order.id} was not paid in time")
    return _deliver(ctx, order, paid.get())


def _reserve(ctx: Context, order: Order) -> None:
    """Set every line of the order aside, all at the same time."""
    ctx.gather(
        *(
            ctx.start(
                reserve_stock.s(order.id, line.sku, line.quantity),
                compensate=release_stock.s(order.id, line.sku),
            )
            for line in order.lines
        )
    )


def _deliver(ctx: Context, order: Order, payment: str) -> Receipt:
    """Send the order that has been paid on its way."""
    tracking = ctx.run(book_courier.s(order.id, order.address))
    # optional: a paid order that is on its way is not undone because an email bounced
    ctx.run(send_receipt.s(order.id, order.email, order.total_cents), optional=True)
    return Receipt(order_id=order.id, payment=payment, tracking=tracking, cents=order.total_cents)
