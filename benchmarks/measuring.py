"""Rounds: in each every subject is measured once, one after the other, in an order that turns round each time."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

from benchmarks.lab import Lab
from benchmarks.points import Measured, Point, Sample, Subject, Workload

#: What a run leaves to be done (acknowledgements, events) is over after so long.
PAUSE_SECONDS = 0.02

Tell = Callable[[str], None]


def measure(lab: Lab, workload: Workload, tell: Tell, rounds: int | None = None) -> Measured:
    """Measure a workload; what cannot be run, or breaks off, is noted and left out."""
    measured, began = Measured(workload), time.monotonic()
    tell(f"{workload.name}: starting")
    contenders, measured.skipped = lab.use(subject.spec for subject in workload.subjects)
    started = time.monotonic()
    for number in range(rounds or workload.rounds):
        if number and not rounds and time.monotonic() - started > (workload.enough_seconds or math.inf):
            break
        for place, subject in enumerate(_order(workload.subjects, number)):
            contender = contenders.get(subject.spec)
            is_over = subject.most_rounds is not None and number >= subject.most_rounds
            if contender is None or subject.point in measured.broken or is_over:
                continue
            tell(f"{workload.name}: round {number + 1}, {subject.case}, {subject.spec.name}")
            gc.collect()
            try:
                value = subject.take(contender)
                contender.settle()
            except Exception as error:  # a contender that breaks is a result, too
                measured.broken[subject.point] = f"{type(error).__name__}: {error}"
                continue
            measured.samples.append(Sample(subject.point, number, place, value))
            time.sleep(PAUSE_SECONDS)
    measured.seconds = time.monotonic() - began
    return measured


def _order(subjects: tuple[Subject, ...], number: int) -> tuple[Subject, ...]:
    """Who is first in one round is last in the next: what warms up or fills up favours nobody."""
    return subjects if number % 2 == 0 else subjects[::-1]


def list_points(measured: Measured) -> list[Point]:
    """Return the points that have samples, in the order of the workload."""
    taken = {sample.point for sample in measured.samples}
    return [point for point in dict.fromkeys(s.point for s in measured.workload.subjects) if point in taken]
