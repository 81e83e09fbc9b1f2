import uuid

from django.db import models


class Item(models.Model):
    sku = models.CharField(max_length=50, primary_key=True)
    cents = models.PositiveIntegerField()
    available = models.PositiveIntegerField()


class Order(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    customer = models.CharField(max_length=100)
    sku = models.CharField(max_length=50)
    quantity = models.PositiveIntegerField()
    cents = models.PositiveIntegerField()
    card = models.CharField(max_length=50)
    address = models.CharField(max_length=200)
    status = models.CharField(max_length=20, default="placed")
    placed_at = models.DateTimeField(auto_now_add=True)


class Reservation(models.Model):
    # what a step did is found again by its key when it runs a second time
    key = models.CharField(max_length=300, unique=True)
    sku = models.CharField(max_length=50)
    quantity = models.PositiveIntegerField()


class Payment(models.Model):
    key = models.CharField(max_length=300, unique=True)
    cents = models.PositiveIntegerField()
    is_refunded = models.BooleanField(default=False)
