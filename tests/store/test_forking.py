"""A process forks only while none of its threads is inside a database driver, and carries no SQLite handle over."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from orchestrator.store.engine import Store
from tests.waiting import wait_until

from .processes import fork, wait_for


def test_a_fork_waits_for_the_transactions_of_other_threads(sqlite_url: str) -> None:
    store = Store(sqlite_url)
    inside, leave, left = threading.Event(), threading.Event(), threading.Event()

    def transact() -> None:
        with store.begin("test") as connection:
            connection.execute(text("SELECT 1"))
            inside.set()
            assert leave.wait(20)
        left.set()

    forked: list[int] = []
    other = threading.Thread(target=transact)
    other.start()
    assert inside.wait(20)
    forking = threading.Thread(target=lambda: forked.append(fork(lambda: None)))
    forking.start()
    forking.join(0.3)
    assert not forked and not left.is_set()
    leave.set()
    wait_until(lambda: forked, "the fork after the transaction")
    forking.join()
    other.join()
    assert wait_for(forked[0]) == 0
    store.dispose()


def test_a_process_may_fork_inside_its_own_transaction(sqlite_url: str) -> None:
    store = Store(sqlite_url)
    with store.read("test") as connection:
        connection.execute(text("SELECT 1"))
        child = fork(lambda: None)
    assert wait_for(child) == 0
    store.dispose()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only /proc tells which files a process has open")
def test_no_sqlite_handle_is_carried_over_a_fork(sqlite_url: str) -> None:
    store = Store(sqlite_url)
    with store.begin("test") as connection:
        connection.execute(text("SELECT 1"))
    file = sqlite_url.removeprefix("sqlite:///")

    def check() -> None:
        handles = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert not [handle for handle in handles if handle.startswith(file)], handles
        with store.begin("test") as connection:  # on a connection of its own
            connection.execute(text("SELECT 1"))

    assert wait_for(fork(check)) == 0
    store.dispose()
