"""The workloads, in the order in which they are run."""

from __future__ import annotations

from benchmarks.points import Workload
from benchmarks.workloads import cpu, crowd, fan_out, full_store, local, memory, sequential, starting, undoing

MODULES = (sequential, crowd, cpu, fan_out, undoing, local, starting, memory, full_store)


def list_workloads(*, full: bool) -> list[Workload]:
    """Return the workloads in their short or their full sizes."""
    return [workload for module in MODULES for workload in module.make(full)]
