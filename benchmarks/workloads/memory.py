"""What memory a worker's processes have for themselves, and whether it stays at that."""

from __future__ import annotations

import functools
import statistics

from benchmarks.contenders.chain import ChainSpec
from benchmarks.contenders.contender import Contender
from benchmarks.contenders.ours import OursSpec
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.usage import list_processes, megabytes

#: One way or the other, an allocator keeps a little more than before.
FLAT_MEGABYTES = 5.0
BATCH_STEPS = 200


def parent_megabytes(contender: Contender) -> float:
    return megabytes(list_processes(contender.list_pids())[0])


def child_megabytes(contender: Contender) -> float:
    """Return the memory of the pool process that has the most."""
    return max(megabytes(process) for process in list_processes(contender.list_pids())[1:])


def growth_megabytes(contender: Contender, steps: int) -> float:
    """Return how much more all processes have in the last quarter of so many steps than in the second.

    The first quarter warms up: modules, caches of statements, pages that processes share until one writes to them.
    """
    taken: list[float] = []
    for _ in range(steps // BATCH_STEPS):
        contender.crowd(BATCH_STEPS // 10, 10)
        contender.settle()
        taken.append(sum(map(megabytes, list_processes(contender.list_pids()))))
    quarter = len(taken) // 4
    return statistics.mean(taken[-quarter:]) - statistics.mean(taken[quarter : 2 * quarter])


def make(full: bool) -> list[Workload]:
    steps = 100_000 if full else 800
    parent, child, growth = "the parent", "a pool process", f"growth in {steps:,} steps"
    chain = ChainSpec("chain-fresh")
    specs = (OursSpec("sqlite", label="fresh"), OursSpec("postgresql", label="fresh"))
    subjects: list[Subject] = []
    goals: list[Goal] = []
    for case, take in (
        (parent, parent_megabytes),
        (child, child_megabytes),
        (growth, functools.partial(growth_megabytes, steps=steps)),
    ):
        subjects += [Subject(case, spec, take) for spec in (chain, *specs)]
    for spec in specs:
        for case in (parent, child):
            goals.append(Goal(Point(case, spec.name), Point(case, chain.name), 20.0, kind="difference"))
        goals.append(Goal(Point(growth, spec.name), None, FLAT_MEGABYTES, kind="value"))
    title = "Memory that is a process's own (USS), of workers that have run 60 steps, and its growth"
    return [Workload("memory", title, "MB", tuple(subjects), tuple(goals), 1, baseline="")]
