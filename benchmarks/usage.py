"""What processes use, children and all; needs ``psutil``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def list_processes(pids: Iterable[int]) -> list[Any]:
    """Return the processes with all that they have started."""
    import psutil

    parents = [psutil.Process(pid) for pid in pids]
    return [*parents, *(child for parent in parents for child in parent.children(recursive=True))]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that processes have used so far, user and system."""
    times = [process.cpu_times() for process in list_processes(pids)]
    return float(sum(each.user + each.system for each in times))


def megabytes(process: Any) -> float:
    """Return what of its memory is a process's own, so that it would be free without it."""
    return float(process.memory_full_info().uss) / 1_000_000
