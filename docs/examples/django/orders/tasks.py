"""Ordinary Celery tasks: what an order takes, and what undoes it."""

from celery import shared_task
from django.db import transaction
from django.db.models import F

from orchestrator import current_step

from .models import Item, Order, Payment, Reservation


class OutOfStock(Exception):
    pass


class CardDeclined(Exception):
    pass


class UnknownAddress(Exception):
    pass


@shared_task
def set_status(order_id: str, status: str) -> None:
    Order.objects.filter(pk=order_id).update(status=status)


@shared_task
def reserve(sku: str, quantity: int) -> int:
    with transaction.atomic():
        reservation, is_new = Reservation.objects.get_or_create(
            key=current_step().idempotency_key, defaults={"sku": sku, "quantity": quantity}
        )
        if is_new:
            left = Item.objects.filter(sku=sku, available__gte=quantity)
            if not left.update(available=F("available") - quantity):
                raise OutOfStock(sku)
    return reservation.pk


@shared_task
def release(reservation_id: int | None) -> None:
    with transaction.atomic():
        reservation = Reservation.objects.select_for_update().filter(pk=reservation_id).first()
        if reservation is not None:
            Item.objects.filter(sku=reservation.sku).update(available=F("available") + reservation.quantity)
            reservation.delete()


@shared_task
def charge(card: str, cents: int) -> int:
    if card == "declined":
        raise CardDeclined(card)
    payment, _ = Payment.objects.get_or_create(key=current_step().idempotency_key, defaults={"cents": cents})
    return payment.pk


@shared_task
def refund(payment_id: int | None) -> None:
    Payment.objects.filter(pk=payment_id).update(is_refunded=True)


@shared_task
def ship(order_id: str, address: str) -> str:
    if address == "nowhere":
        raise UnknownAddress(address)
    return f"parcel/{order_id}"
