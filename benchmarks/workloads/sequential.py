"""Steps one after the other: what one durable step costs, beside a link of a chain."""

from __future__ import annotations

import functools

from benchmarks.contenders.contender import Contender
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides

#: A length, how often it is run in a round, and the bounds of its ratio to chain by doorbell and with hand-off.
SHORT = ((10, 6, 1.0, 0.4), (100, 1, 1.0, 0.4))
LONG = (1000, 1, 0.3, None)


def milliseconds_per_step(contender: Contender, steps: int, times: int = 1) -> float:
    """Return how long a step takes from the call that starts the instance to the end of its last step."""
    return 1000.0 * sum(contender.sequence(steps).seconds for _ in range(times)) / (steps * times)


def between_steps(contender: Contender, steps: int, times: int) -> float:
    """Return how long a step takes once the first is done: without what it costs to start an instance."""
    seconds = 0.0
    for _ in range(times):
        run = contender.sequence(steps)
        assert run.first is not None
        seconds += run.ended - run.first
    return 1000.0 * seconds / ((steps - 1) * times)


def make(full: bool) -> list[Workload]:
    return [_against_chain(full), _growth(full)]


def _against_chain(full: bool) -> Workload:
    subjects: list[Subject] = []
    goals: list[Goal] = []
    for steps, times, bound, handed_bound in (*SHORT, LONG):
        case = f"{steps:,} steps"
        take = functools.partial(milliseconds_per_step, steps=steps, times=times)
        most_rounds = 1 if steps == LONG[0] and not full else None
        others = (sides.SAGA, *sides.engines(full)) if steps < LONG[0] else ()
        long = sides.LIVE if steps == LONG[0] else ()
        for spec in (*sides.with_chain(full), *long, *others):
            subjects.append(Subject(case, spec, take, most_rounds))
        for spec in (*sides.DOORBELL, *long):
            goals.append(Goal(Point(case, spec.name), Point(case, sides.CHAIN.name), bound))
        if handed_bound is not None:
            for spec in sides.HANDED:
                goals.append(Goal(Point(case, spec.name), Point(case, sides.CHAIN.name), handed_bound))
    title = "Steps one after the other, from the start to the end of the last"
    return Workload("sequential", title, "ms per step", tuple(subjects), tuple(goals), 9 if full else 5)


def _growth(full: bool) -> Workload:
    few, many = 10, 5000 if full else 500
    subjects: list[Subject] = []
    goals: list[Goal] = []
    for steps, times in ((few, 30), (many, 1)):
        take = functools.partial(between_steps, steps=steps, times=times)
        subjects += [Subject(f"{steps:,} steps", spec, take) for spec in (*sides.ours(full), *sides.LIVE)]
    for spec in (*sides.ours(full), *sides.LIVE):
        goals.append(Goal(Point(f"{many:,} steps", spec.name), Point(f"{few:,} steps", spec.name), 1.3))
    title = "What a step costs in a long instance and in a short one, once the first is done"
    return Workload("growth", title, "ms per step", tuple(subjects), tuple(goals), 5 if full else 2, baseline="")
