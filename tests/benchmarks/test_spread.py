"""Medians, ratios of the same round, and what they say of goals."""

from __future__ import annotations

import pytest

from benchmarks.contenders.chain import ChainSpec
from benchmarks.points import Goal, Measured, Point, Sample, Subject, Workload
from benchmarks.spread import find_spread, judge, list_numbers, list_ratios

OURS, THEIRS = Point("10 steps", "ours"), Point("10 steps", "theirs")


def measured(ours: list[float], theirs: list[float], *goals: Goal) -> Measured:
    subjects = tuple(Subject("10 steps", ChainSpec(name), lambda _contender: 0.0) for name in ("ours", "theirs"))
    workload = Workload("w", "a workload", "ms", subjects, goals, rounds=len(ours))
    samples = [Sample(OURS, number, 0, value) for number, value in enumerate(ours)]
    samples += [Sample(THEIRS, number, 1, value) for number, value in enumerate(theirs)]
    return Measured(workload, samples)


def test_spread_is_the_median_and_both_ends() -> None:
    spread = find_spread([9.0, 1.0, 2.0])
    assert spread is not None
    assert (spread.median, spread.least, spread.most, spread.count) == (2.0, 1.0, 9.0, 3)
    assert spread.width_percent == pytest.approx(400.0)
    assert find_spread([]) is None


def test_ratios_are_of_the_same_round() -> None:
    # the machine was three times slower in the second round, for both
    assert list_ratios({0: 10.0, 1: 30.0}, {0: 20.0, 1: 60.0}) == [0.5, 0.5]


def test_rounds_that_one_side_missed_are_left_out() -> None:
    assert list_ratios({0: 10.0, 2: 30.0}, {1: 20.0, 2: 60.0}) == [0.5]


@pytest.mark.parametrize(
    ("goal", "is_met"),
    [
        (Goal(OURS, THEIRS, 0.5), True),
        (Goal(OURS, THEIRS, 0.49), False),
        (Goal(OURS, THEIRS, 0.5, at_least=True), True),
        (Goal(OURS, THEIRS, 0.51, at_least=True), False),
        (Goal(OURS, THEIRS, -10.0, kind="difference"), True),
        (Goal(OURS, THEIRS, -11.0, kind="difference"), False),
        (Goal(OURS, None, 10.0, kind="value"), True),
        (Goal(OURS, None, 9.0, kind="value"), False),
    ],
)
def test_goal_is_held_against_the_median(goal: Goal, is_met: bool) -> None:
    # medians: 10 and 20, a ratio of 0.5; one round of ours was bad
    (verdict,) = judge(measured([10.0, 90.0, 10.0], [20.0, 20.0, 20.0], goal))
    assert verdict.is_met is is_met


def test_goal_that_was_not_measured_is_neither_met_nor_missed() -> None:
    goal = Goal(OURS, THEIRS, 1.0)
    (verdict,) = judge(measured([10.0], [], goal))
    assert verdict.is_met is None
    assert list_numbers(goal, measured([10.0], [], goal)) == []
