"""Steps one after the other: what one durable step costs, beside a link of a chain."""

from __future__ import annotations

import functools

from benchmarks.contenders.contender import Contender
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides

#: A length, and the bounds of its ratio to chain by doorbell and with hand-off.
FEW = ((10, 1.0, 0.4), (100, 1.0, 0.4))
#: So many steps are run in one measurement, if an instance has no more.
AT_ONCE = 60


def milliseconds_per_step(contender: Contender, steps: int, times: int = 1) -> float:
    """Return how long a step takes from the call that starts the instance to the end of its last step."""
    return 1000.0 * sum(contender.sequence(steps).seconds for _ in range(times)) / (steps * times)


def make(full: bool) -> list[Workload]:
    many = 1000 if full else 200
    subjects: list[Subject] = []
    goals: list[Goal] = []
    for steps, bound, handed_bound in (*FEW, (many, 0.3, None)):
        case = f"{steps:,} steps"
        take = functools.partial(milliseconds_per_step, steps=steps, times=max(1, AT_ONCE // steps))
        most_rounds = 1 if steps == many and not full else None
        others = (sides.SAGA, *sides.engines(full)) if steps < many else ()
        long = sides.LIVE if steps == many else ()
        for spec in (*sides.with_chain(full), *long, *others):
            subjects.append(Subject(case, spec, take, most_rounds))
        for spec in (*sides.DOORBELL, *long):
            goals.append(Goal(Point(case, spec.name), Point(case, sides.CHAIN.name), bound))
        if handed_bound is not None:
            for spec in sides.HANDED:
                goals.append(Goal(Point(case, spec.name), Point(case, sides.CHAIN.name), handed_bound))
    title = "Steps one after the other, from the start to the end of the last"
    return [Workload("sequential", title, "ms per step", tuple(subjects), tuple(goals), 9 if full else 3)]
