"""The workloads, in the order in which they are run."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.points import Workload
from benchmarks.workloads import (
    cpu,
    crowd,
    fan_out,
    full_store,
    growing,
    local,
    memory,
    payload,
    processes,
    sequential,
    starting,
    undoing,
)

#: In the short run a workload begins no further round after so long.
SHORT_SECONDS = 4.0

#: Those that have contenders in common follow each other: each is started anew where it was not needed before.
MODULES = (
    sequential,
    crowd,
    cpu,
    fan_out,
    payload,
    undoing,
    growing,
    processes,
    local,
    starting,
    memory,
    full_store,
)


def list_workloads(*, full: bool) -> list[Workload]:
    """Return the workloads in their short or their full sizes."""
    workloads = [workload for module in MODULES for workload in module.make(full)]
    return workloads if full else [replace(each, enough_seconds=SHORT_SECONDS) for each in workloads]
