"""A saga that fails at its last step: how soon all is undone."""

from __future__ import annotations

from benchmarks.contenders.contender import Contender, Spec
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides

TIMES = 10


def milliseconds(contender: Contender) -> float:
    return 1000.0 * sum(contender.undo().seconds for _ in range(TIMES)) / TIMES


def make(full: bool) -> list[Workload]:
    case = "5 steps, 4 undone"
    specs: tuple[Spec, ...] = (sides.SAGA, *sides.ours(full))
    saga = Point(case, sides.SAGA.name)
    return [
        Workload(
            "undo",
            "Five steps of which the fifth fails and four are undone, from the start to the end of the last undo",
            "ms",
            tuple(Subject(case, spec, milliseconds) for spec in specs),
            tuple(Goal(Point(case, spec.name), saga, 0.7) for spec in (*sides.DOORBELL, *sides.HANDED)),
            9 if full else 5,
            baseline=sides.SAGA.name,
        )
    ]
