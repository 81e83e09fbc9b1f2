from orchestrator import Context, shared_workflow

from .tasks import charge, refund, release, reserve, set_status, ship


@shared_workflow
def checkout(ctx: Context, order_id: str, sku: str, quantity: int, cents: int, card: str, address: str) -> str:
    # first registered, so undone last
    ctx.compensate(set_status.si(order_id, "cancelled"))
    ctx.run(reserve.s(sku, quantity), compensate=release.s())
    ctx.run(charge.s(card, cents), compensate=refund.s())
    parcel = ctx.run(ship.s(order_id, address))
    ctx.run(set_status.si(order_id, "shipped"))
    return parcel
