import json

from django.db import connection, transaction
from django.db.models import Sum
from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST
from proj import orchestrator

from orchestrator.errors import InvalidOperation

from .models import Item, Order
from .workflows import checkout

#: What one customer may have ordered and not been sent.
OPEN_CENTS = 100_000


class LimitExceeded(Exception):
    pass


@csrf_exempt
@require_POST
def place_order(request: HttpRequest) -> JsonResponse:
    wanted = json.loads(request.body)
    item = get_object_or_404(Item, sku=wanted["sku"])
    try:
        with transaction.atomic():
            order = Order.objects.create(**wanted, cents=item.cents * wanted["quantity"])
            orchestrator.start(
                checkout.s(str(order.id), order.sku, order.quantity, order.cents, order.card, order.address),
                instance_id=str(order.id),
                session=connection,
            )
            open_orders = Order.objects.filter(customer=order.customer, status="placed")
            if open_orders.aggregate(cents=Sum("cents"))["cents"] > OPEN_CENTS:
                raise LimitExceeded  # neither the order nor its checkout has ever been
    except LimitExceeded:
        return JsonResponse({"error": "limit exceeded"}, status=422)
    return JsonResponse({"id": order.id}, status=202)


@require_GET
def show_order(_request: HttpRequest, order_id: str) -> JsonResponse:
    order = get_object_or_404(Order, pk=order_id)
    checkout_of_order = orchestrator.get(str(order.id))
    return JsonResponse({"status": order.status, "checkout": checkout_of_order.instance_status})


@csrf_exempt
@require_POST
def cancel_order(_request: HttpRequest, order_id: str) -> JsonResponse:
    order = get_object_or_404(Order, pk=order_id)
    try:
        orchestrator.get(str(order.id)).cancel("the customer changed their mind")
    except InvalidOperation as error:
        return JsonResponse({"error": str(error)}, status=409)
    return JsonResponse({}, status=202)
