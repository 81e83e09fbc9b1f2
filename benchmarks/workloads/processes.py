"""A crowd and more processes for it: how many steps a worker gets done in a second, by the size of its pool.

Where cores are fewer than processes, what is seen is what the processes of a step wait for, not how it scales.
"""

from __future__ import annotations

import functools

from benchmarks.contenders.chain import ChainSpec
from benchmarks.contenders.ours import OursSpec
from benchmarks.points import Subject, Workload
from benchmarks.workloads.crowd import STEPS, steps_per_second

POOLS = (1, 2, 4)


def make(full: bool) -> list[Workload]:
    instances = 200 if full else 20
    take = functools.partial(steps_per_second, instances=instances)
    subjects: list[Subject] = []
    for size in POOLS:
        case = "1 process" if size == 1 else f"{size} processes"
        specs = (
            ChainSpec(processes=size),
            OursSpec("sqlite", processes=size),
            OursSpec("postgresql", processes=size),
        )
        subjects += [Subject(case, spec, take) for spec in specs]
    title = f"{instances} instances of {STEPS} steps at once, by the processes of the worker's pool"
    return [Workload("workers", title, "steps/s", tuple(subjects), (), 9 if full else 1, more_is_better=True)]
