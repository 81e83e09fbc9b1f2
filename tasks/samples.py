"""The 200 orders of the demo, and the stock it begins with."""

import json
from pathlib import Path

from tasks.models import Order


def list_orders() -> list[Order]:
    """Return every order of `orders.jsonl`, in the order of the file."""
    lines = Path(__file__).with_name("orders.jsonl").read_text(encoding="utf-8").splitlines()
    return [Order.model_validate_json(line) for line in lines]


def get_initial_stock() -> dict[str, int]:
    """Return how many pieces of each sku `stock.json` puts on the shelves."""
    stock: dict[str, int] = json.loads(Path(__file__).with_name("stock.json").read_text(encoding="utf-8"))
    return stock
