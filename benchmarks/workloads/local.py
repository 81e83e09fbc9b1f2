"""Steps in the process that runs the workflow: ``ctx.local`` beside DBOS, which runs all steps so."""

from __future__ import annotations

import functools

from benchmarks.contenders.contender import Contender
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides


def milliseconds_per_step(contender: Contender, steps: int) -> float:
    return 1000.0 * contender.local(steps).seconds / steps


def make(full: bool) -> list[Workload]:
    steps = 1000 if full else 200
    case = f"{steps:,} steps"
    take = functools.partial(milliseconds_per_step, steps=steps)
    pairs = ((sides.SQLITE, sides.DBOS_SQLITE), (sides.POSTGRESQL, sides.DBOS_POSTGRESQL))
    subjects = tuple(Subject(case, spec, take) for pair in pairs for spec in pair)
    goals = tuple(Goal(Point(case, ours.name), Point(case, dbos.name), 1.0) for ours, dbos in pairs)
    title = "Steps in the process of the workflow: ctx.local records all in one commit, DBOS each in its own"
    return [Workload("local", title, "ms per step", subjects, goals, 5 if full else 2, baseline="")]
