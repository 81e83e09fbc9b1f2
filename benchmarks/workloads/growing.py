"""What a step costs in a long instance, beside one in a short instance."""

from __future__ import annotations

import functools

from benchmarks.contenders.contender import Contender
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides


def between_steps(contender: Contender, steps: int, times: int) -> float:
    """Return how long a step takes once the first is done: without what it costs to start an instance."""
    seconds = 0.0
    for _ in range(times):
        run = contender.sequence(steps)
        assert run.first is not None
        seconds += run.ended - run.first
    return 1000.0 * seconds / ((steps - 1) * times)


def make(full: bool) -> list[Workload]:
    few, many = 10, 5000 if full else 200
    specs = (*sides.ours(full), *sides.LIVE) if full else (*sides.DOORBELL, *sides.LIVE)
    subjects: list[Subject] = []
    goals: list[Goal] = []
    for steps, times in ((few, 30 if full else 6), (many, 1)):
        take = functools.partial(between_steps, steps=steps, times=times)
        subjects += [Subject(f"{steps:,} steps", spec, take) for spec in specs]
    for spec in specs:
        goals.append(Goal(Point(f"{many:,} steps", spec.name), Point(f"{few:,} steps", spec.name), 1.3))
    title = "What a step costs in a long instance and in a short one, once the first is done"
    return [Workload("growth", title, "ms per step", tuple(subjects), tuple(goals), 5 if full else 2, baseline="")]
