"""The shop's checkout as a durable workflow, over its existing tasks as they are."""

from orchestrator import Context, UndoneStep
from tasks.app import app, orchestrator
from tasks.couriers import book_courier, cancel_courier
from tasks.models import Order, Receipt
from tasks.payments import charge_card, refund_card
from tasks.receipts import send_receipt
from tasks.stock import release_stock, reserve_stock


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
    ctx.gather(
        *(
            ctx.start(
                reserve_stock.s(order.id, line.sku, line.quantity),
                compensate=release_stock.s(order.id, line.sku),
            )
            for line in order.lines
        )
    )
    payment = ctx.run(
        charge_card.s(order.id, order.card, order.total_cents),
        compensate=refund_card.s(order.id),
    )
    tracking = ctx.run(book_courier.s(order.id, order.address))
    # optional: a paid order that is on its way is not undone because an email bounced
    ctx.run(send_receipt.s(order.id, order.email, order.total_cents), optional=True)
    return Receipt(order_id=order.id, payment=payment, tracking=tracking, cents=order.total_cents)
