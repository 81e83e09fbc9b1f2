"""Medians, spreads, and ratios of what was measured in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.points import Goal, Measured


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of some numbers and how far they lie apart."""

    median: float
    least: float
    most: float
    count: int

    @property
    def width_percent(self) -> float:
        """How far the least and the most lie apart, in percent of the median."""
        return 100.0 * (self.most - self.least) / abs(self.median) if self.median else 0.0


def find_spread(numbers: Iterable[float]) -> Spread | None:
    """Return the spread of ``numbers``, ``None`` if there are none."""
    every = list(numbers)
    return Spread(statistics.median(every), min(every), max(every), len(every)) if every else None


def list_ratios(subject: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Return the subject's value over the baseline's for each round that has both: what slows a machine slows both."""
    return [subject[n] / baseline[n] for n in sorted(subject.keys() & baseline.keys()) if baseline[n]]


def list_numbers(goal: Goal, measured: Measured) -> list[float]:
    """Return what a goal speaks of, for each round that has it."""
    subject = measured.by_round(goal.subject)
    if goal.against is None:
        return [subject[n] for n in sorted(subject)]
    baseline = measured.by_round(goal.against)
    if goal.kind == "ratio":
        return list_ratios(subject, baseline)
    return [subject[n] - baseline[n] for n in sorted(subject.keys() & baseline.keys())]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a goal came out; ``spread`` is ``None`` where it could not be measured."""

    goal: Goal
    spread: Spread | None

    @property
    def is_met(self) -> bool | None:
        return None if self.spread is None else self.goal.is_met_by(self.spread.median)


def judge(measured: Measured) -> list[Verdict]:
    """Hold the median of each goal's numbers against its bound."""
    return [Verdict(goal, find_spread(list_numbers(goal, measured))) for goal in measured.workload.goals]
