"""The 200 orders of the demo, and the stock it begins with."""

import json
from pathlib import Path

from pydantic import ValidationError

from tasks.models import Order

ORDERS = Path(__file__).with_name("orders.jsonl")


class UnusableOrders(ValueError):
    """A file of orders cannot be read, or cannot be run as it is."""


def list_orders(path: Path = ORDERS) -> list[Order]:
    """Return every order of a file with one JSON object a line, in the order of the file.

    Raises `UnusableOrders`, which names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableOrders(f"{path} cannot be read: {error}") from error
    orders: dict[str, Order] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            order = Order.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UnusableOrders(f"{path}, line {number}: {where and where + ': '}{first['msg']}") from error
        if order.id in orders:
            raise UnusableOrders(f"{path}, line {number}: there is an order {order.id!r} above it already")
        orders[order.id] = order
    if not orders:
        raise UnusableOrders(f"{path} holds no orders")
    return list(orders.values())


def get_initial_stock() -> dict[str, int]:
    """Return how many pieces of each sku `stock.json` puts on the shelves."""
    stock: dict[str, int] = json.loads(Path(__file__).with_name("stock.json").read_text(encoding="utf-8"))
    return stock
