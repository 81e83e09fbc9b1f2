"""The workloads, in the order in which they are run."""

from __future__ import annotations

from benchmarks.points import Workload
from benchmarks.workloads import cpu, crowd, fan_out, sequential, undoing

MODULES = (sequential, crowd, fan_out, undoing, cpu)


def list_workloads(*, full: bool) -> list[Workload]:
    """Return the workloads in their short or their full sizes."""
    return [workload for module in MODULES for workload in module.make(full)]
