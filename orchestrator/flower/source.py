"""Where the pages read: the store, in threads of their own, so that Flower's loop never waits for a database."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from orchestrator.runtime.app import Orchestrator

P = ParamSpec("P")
T = TypeVar("T")

#: As many as a pool of connections keeps open: a browser that is left open must not exhaust the database.
_THREADS = 4


class Source:
    """An orchestrator, and the threads in which it is asked."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator = orchestrator
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="orchestrator-flower")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads or writes the store, in a thread; wait for a free one."""
        bound = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, bound)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
