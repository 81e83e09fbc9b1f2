"""`python -m tasks.demo.client`: the orders alone, where all that they need is running (see compose.yaml)."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tasks.demo.run import run
from tasks.samples import ORDERS, UnusableOrders, list_orders


def main() -> int:
    """Run the orders; return 0 if every order has ended and the books balance, 1 if not, 2 if they cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m tasks.demo.client", description="Run orders, and reckon up.")
    parser.add_argument("--orders", type=Path, default=ORDERS, metavar="FILE", help="one order a line, in JSON")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        orders = list_orders(parser.parse_args().orders)
    except UnusableOrders as error:
        console.print(str(error), style="red", markup=False)
        return 2
    return 0 if run(console, orders) else 1


if __name__ == "__main__":
    sys.exit(main())
