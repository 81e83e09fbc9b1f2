"""How long the shop's work takes: nothing here is far away, so the distance is made up."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def round_trip() -> Iterator[None]:
    """Sleep for `SHOP_LATENCY` seconds (default 0.02): half before the work within, half after it.

    Both halves matter: a worker can then die before its effect, and after the effect but before its answer.
    """
    half_seconds = float(os.environ.get("SHOP_LATENCY", "0.02")) / 2
    time.sleep(half_seconds)
    yield
    time.sleep(half_seconds)
