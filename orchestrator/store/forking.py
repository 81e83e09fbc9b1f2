"""Keeps a process from forking while one of its threads is inside a database driver.

A prefork worker forks new pool processes for as long as it lives, and its heartbeat and poller use the database all the
time.  A child that is forked while another thread holds one of the driver's mutexes (SQLite's allocator has one, every
call takes it) inherits it locked, and hangs in its first query for ever.  So transactions are counted, and a fork waits
for a moment in which no other thread is in one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: A database that does not answer must not stop the worker from replacing its pool processes.
LONGEST_WAIT_SECONDS = 10.0
#: So long a transaction waits for a fork to have its turn.
LONGEST_COURTESY_SECONDS = 0.25


class ForkGuard:
    """Counts the transactions of every thread of this process."""

    def __init__(self) -> None:
        self._before: list[Callable[[], None]] = []
        self._forget()

    def _forget(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._own = threading.local()
        self._inside = 0
        self._is_fork_waiting = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Keep forks away while the block runs."""
        depth = getattr(self._own, "depth", 0)
        with self._condition:  # held throughout a fork, but not while one waits: a heartbeat must not wait with it
            if self._is_fork_waiting and depth == 0:
                # not for long: but a thread with one transaction after the other would let none happen
                self._condition.wait_for(lambda: not self._is_fork_waiting, timeout=LONGEST_COURTESY_SECONDS)
            self._inside += 1
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            with self._condition:
                # a forked child begins at zero, also in the middle of its parent's block
                self._inside = max(0, self._inside - 1)
                self._condition.notify_all()

    def call_before_fork(self, function: Callable[[], None]) -> None:
        """Have ``function`` called before every fork, when no other thread is in a transaction."""
        self._before.append(function)

    def before_fork(self) -> None:
        deadline = time.monotonic() + LONGEST_WAIT_SECONDS
        mine = getattr(self._own, "depth", 0)
        self._condition.acquire()
        self._is_fork_waiting = True
        while self._inside > mine and time.monotonic() < deadline:
            self._condition.wait(timeout=deadline - time.monotonic())
        self._is_fork_waiting = False
        for function in self._before:
            function()

    def after_fork_in_parent(self) -> None:
        self._condition.notify_all()
        self._condition.release()

    def after_fork_in_child(self) -> None:
        self._forget()  # the other threads, and what they held, are not here


guard = ForkGuard()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=guard.before_fork,
        after_in_parent=guard.after_fork_in_parent,
        after_in_child=guard.after_fork_in_child,
    )
