"""Many instances at once: how many steps a worker gets done in a second."""

from __future__ import annotations

import functools

from benchmarks.contenders.contender import Contender
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides

STEPS = 10


def steps_per_second(contender: Contender, instances: int) -> float:
    return instances * STEPS / contender.crowd(instances, STEPS).seconds


def make(full: bool) -> list[Workload]:
    instances = 200 if full else 50
    case = f"{instances} x {STEPS}"
    take = functools.partial(steps_per_second, instances=instances)
    specs = (*sides.with_chain(full), sides.SAGA, *sides.engines(full))
    chain = Point(case, sides.CHAIN.name)
    goals = [Goal(Point(case, spec.name), chain, 1.0, at_least=True) for spec in sides.DOORBELL]
    goals += [Goal(Point(case, spec.name), chain, 2.0, at_least=True) for spec in sides.HANDED]
    return [
        Workload(
            "crowd",
            f"Many instances of {STEPS} steps at once, from the start of the first to the end of the last",
            "steps/s",
            tuple(Subject(case, spec, take) for spec in specs),
            tuple(goals),
            9 if full else 3,
            more_is_better=True,
        )
    ]
