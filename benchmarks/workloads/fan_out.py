"""Steps all at once and one that takes their results, and items of which so many at a time are run."""

from __future__ import annotations

import functools

from benchmarks.contenders.contender import Contender
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides


def fanned(contender: Contender, width: int) -> float:
    return 1000.0 * contender.fan_out(width).seconds / width


def mapped(contender: Contender, items: int, concurrency: int | None) -> float:
    return 1000.0 * contender.map(items, concurrency).seconds / items


def make(full: bool) -> list[Workload]:
    return [_fan_out(full), _map(full)]


def _fan_out(full: bool) -> Workload:
    narrow, wide = 500, 10_000 if full else 1000
    cases = {width: f"{width:,} steps" for width in (narrow, wide)}
    subjects: list[Subject] = []
    for width, case in cases.items():
        take = functools.partial(fanned, width=width)
        most_rounds = None if width == narrow or full else 1
        specs = sides.with_chain(full) if width == narrow or full else sides.DOORBELL
        subjects += [Subject(case, spec, take, most_rounds) for spec in specs]
    goals: list[Goal] = []
    for spec in (*sides.DOORBELL, *sides.HANDED):
        goals.append(Goal(Point(cases[narrow], spec.name), Point(cases[narrow], sides.CHAIN.name), 1.0))
        if full or spec in sides.DOORBELL:
            goals.append(Goal(Point(cases[wide], spec.name), Point(cases[narrow], spec.name), 1.0))
    title = "Steps all at once, and one that takes their results (a chord)"
    return Workload("fan-out", title, "ms per step", tuple(subjects), tuple(goals), 5 if full else 3)


def _map(full: bool) -> Workload:
    items, concurrency = 10_000 if full else 300, 50
    free, limited = f"{items:,} items", f"{items:,} items, {concurrency} at a time"
    specs = sides.ours(full) if full else sides.DOORBELL
    subjects: list[Subject] = []
    goals: list[Goal] = []
    for case, limit in ((free, None), (limited, concurrency)):
        take = functools.partial(mapped, items=items, concurrency=limit)
        subjects += [Subject(case, spec, take) for spec in specs]
    for spec in specs:
        goals.append(Goal(Point(limited, spec.name), Point(free, spec.name), 1.2))
    title = "ctx.map over many items, with and without a limit"
    return Workload("map", title, "ms per item", tuple(subjects), tuple(goals), 5 if full else 1, baseline="")
