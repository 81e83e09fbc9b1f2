"""The demo as a newcomer starts it: a process of its own, a real worker that is killed, and what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.samples import UnusableOrders, list_orders

ROOT = Path(__file__).parents[1]
WORKER = re.compile(r"worker (\d+) is started")


def demo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.demo", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def few_orders(tmp_path: Path) -> Path:
    """Two dozen orders, each kind of trouble among them."""
    path = tmp_path / "orders.jsonl"
    path.write_text("".join(f"{order.model_dump_json()}\n" for order in list_orders()[:24]))
    return path


def test_every_order_ends_and_the_books_balance_although_the_worker_is_killed(few_orders: Path) -> None:
    process = demo("--orders", str(few_orders))
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    workers = [int(pid) for pid in WORKER.findall(output)]
    assert len(workers) == 2
    assert f"worker {workers[0]} is killed with SIGKILL" in output
    assert "24 of 24 ended" in output
    assert re.search(r"difference in money +0\.00 *\n", output)
    assert re.search(r"difference in pieces +0 *\n", output)
    assert "undone by release_stock(" in output
    assert "order-003 waits for its payment, and is cancelled by its customer" in output
    assert re.search(r"1 +CANCELLED", output)
    assert "undone by withdraw_payment(" in output
    assert "order-005 was delivered, and is sent back by its customer" in output
    assert "What became of order-005, COMPENSATED: it had completed, and was undone by request" in output
    assert "undone by refund_card(charge/order-005) succeeded" in output
    assert "Every order has ended, and the books balance." in output
    assert not any(is_running(pid) for pid in workers)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_no_process_and_no_files(how: signal.Signals) -> None:
    process = demo()
    assert process.stdout is not None
    found = None
    while found is None:
        line = process.stdout.readline()
        assert line, "it ended without a worker"
        found = WORKER.search(line)
    time.sleep(1)
    folder = Path(f"/proc/{found[1]}/fd/1").resolve().parent if sys.platform == "linux" else None
    process.send_signal(how)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert not is_running(int(found[1]))
    assert folder is None or not folder.exists()


def test_orders_that_cannot_be_read_are_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text('{"id": "one"}\n')
    process = demo("--orders", str(path))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert output == f"{path}, line 1: email: Field required\n"


def test_an_order_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    line = list_orders()[0].model_dump_json()
    path.write_text(f"{line}\n\n{line}\n")
    with pytest.raises(UnusableOrders, match="line 3: there is an order 'order-001' above it already"):
        list_orders(path)


def test_no_orders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text("\n")
    with pytest.raises(UnusableOrders, match="holds no orders"):
        list_orders(path)
