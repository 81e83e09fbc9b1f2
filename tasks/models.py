"""What the shop sells, and what the customer gets in the end."""

from typing import Self

from pydantic import BaseModel, Field, model_validator


class OrderLine(BaseModel):
    """`quantity` pieces of one sku, at `cents` each."""

    sku: str
    quantity: int = Field(gt=0)
    cents: int = Field(gt=0)


class Order(BaseModel):
    """What a customer asked for. The id is theirs to name: everything done for the order is keyed by it."""

    id: str
    email: str
    address: str
    card: str
    lines: list[OrderLine] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_sku_has_one_line(self) -> Self:
        # a reservation is keyed by order and sku: the second line of a sku would reserve nothing
        if len({line.sku for line in self.lines}) < len(self.lines):
            raise ValueError("an order names each sku in one line only")
        return self

    @property
    def total_cents(self) -> int:
        return sum(line.quantity * line.cents for line in self.lines)


class Receipt(BaseModel):
    """A completed order: the ids of its charge and its shipment, and what was paid."""

    order_id: str
    payment: str
    tracking: str
    cents: int
