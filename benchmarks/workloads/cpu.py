"""What a step costs in processor time, of the worker with all of its processes."""

from __future__ import annotations

import functools
import time

from benchmarks.contenders.contender import Contender
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.usage import cpu_seconds
from benchmarks.workloads import sides

LENGTH = 100


def seconds_per_thousand(contender: Contender, instances: int) -> float:
    """Return the processor seconds of a thousand steps; what is left to be done after the last is counted in."""
    before = cpu_seconds(contender.list_pids())
    for _ in range(instances):
        contender.sequence(LENGTH)
    time.sleep(0.1)
    return (cpu_seconds(contender.list_pids()) - before) * 1000 / (instances * LENGTH)


def make(full: bool) -> list[Workload]:
    case = f"instances of {LENGTH} steps"
    take = functools.partial(seconds_per_thousand, instances=20 if full else 2)
    chain = Point(case, sides.CHAIN.name)
    return [
        Workload(
            "cpu",
            "Processor time of the worker and its processes, instances one after the other",
            "CPU s per 1,000 steps",
            tuple(Subject(case, spec, take) for spec in sides.with_chain(full)),
            tuple(Goal(Point(case, spec.name), chain, 1.2) for spec in (*sides.DOORBELL, *sides.HANDED)),
            5 if full else 3,
        )
    ]
