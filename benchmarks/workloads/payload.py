"""Steps that are given much and return much: what a step costs by the size of its argument and its result."""

from __future__ import annotations

import functools

from benchmarks.contenders.contender import Contender
from benchmarks.points import Subject, Workload
from benchmarks.workloads import sides

SIZES = {"100 B": 100, "10 KB": 10_000, "100 KB": 100_000, "500 KB": 500_000}


def milliseconds_per_step(contender: Contender, steps: int, size: int, times: int) -> float:
    """Return how long a step takes once the first, which has no payload, is done; all others have it twice."""
    seconds = 0.0
    for _ in range(times):
        run = contender.echoes(steps, size)
        assert run.first is not None
        seconds += run.ended - run.first
    return 1000.0 * seconds / ((steps - 1) * times)


def make(full: bool) -> list[Workload]:
    steps, times = (51, 3) if full else (11, 1)
    subjects: list[Subject] = []
    for case, size in SIZES.items():
        take = functools.partial(milliseconds_per_step, steps=steps, size=size, times=times)
        subjects += [Subject(case, spec, take) for spec in sides.with_chain(full)]
    title = f"A text that {steps - 1} steps take and return, one after the other, once the first step is done"
    return [Workload("payload", title, "ms per step", tuple(subjects), (), 7 if full else 3)]
