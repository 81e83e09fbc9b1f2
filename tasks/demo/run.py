"""Runs orders to their ends, with a worker of its own that is killed half-way or with whatever runs, and reckons up."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console

from tasks.database import create_tables, stock_up
from tasks.demo.checkouts import Checkouts
from tasks.demo.customers import Customers
from tasks.demo.picture import Picture, open_picture
from tasks.demo.reckoning import reckon
from tasks.demo.worker import Worker
from tasks.models import Order
from tasks.samples import get_initial_stock

LOOK_EVERY_SECONDS = 0.25
#: How long the worst moment to kill the worker is waited for, and how often it is looked for.
WAIT_FOR_WORST_SECONDS, GLANCE_EVERY_SECONDS = 3.0, 0.01
#: After these many seconds, and as many for each order, something hangs.
PATIENCE_SECONDS, PATIENCE_SECONDS_PER_ORDER = 120.0, 1.0


def run(
    console: Console,
    orders: Sequence[Order],
    worker: Worker | None = None,
    is_interrupted: Callable[[], bool] = bool,
) -> bool:
    """Run the orders to their ends; return whether all have ended and the books balance.

    `worker` is started, killed and started again; without one, workers are taken to be running elsewhere.
    """
    create_tables()
    stock_up(get_initial_stock())
    checkouts = Checkouts(orders)
    with open_picture(console) as picture:
        if worker is not None:
            _start(worker, picture)
        _follow(checkouts, worker, picture, is_interrupted)
    if worker is not None:
        worker.stop()
    return reckon(console, checkouts)


def _follow(checkouts: Checkouts, worker: Worker | None, picture: Picture, is_interrupted: Callable[[], bool]) -> None:
    patience = PATIENCE_SECONDS + PATIENCE_SECONDS_PER_ORDER * checkouts.total
    deadline = time.monotonic() + patience
    victim = worker
    customers = Customers(checkouts)
    while not checkouts.have_ended:
        if is_interrupted():
            raise KeyboardInterrupt
        checkouts.advance()
        picture.show(checkouts)
        if 2 * checkouts.ended >= checkouts.total:
            if victim is not None:
                _kill(checkouts, victim, picture)
            # at first no worker is there: what is asked of an order is recorded all the same
            customers.act(picture)
            if victim is not None:
                _start(victim, picture)
                victim = None
        if worker is not None:
            worker.check()
        if time.monotonic() > deadline:
            picture.tell(f"given up after {patience:.0f} s")
            return
        time.sleep(LOOK_EVERY_SECONDS)


def _kill(checkouts: Checkouts, worker: Worker, picture: Picture) -> None:
    """Kill the worker, if possible while it undoes a step: that is the worst moment."""
    deadline = time.monotonic() + WAIT_FOR_WORST_SECONDS
    while not checkouts.is_undoing() and time.monotonic() < deadline:
        time.sleep(GLANCE_EVERY_SECONDS)
    pid = worker.pid
    worker.kill()
    checkouts.advance()
    picture.tell(f"worker {pid} is killed with SIGKILL, {checkouts.ended} of {checkouts.total} orders have ended")


def _start(worker: Worker, picture: Picture) -> None:
    pid = worker.start()
    picture.worker = f"worker {pid}, 2 processes"
    picture.tell(f"worker {pid} is started")
