"""What is measured: subjects in cases, the samples taken of them, and the goals that these are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.contenders.contender import Contender, Spec


@dataclass(frozen=True, slots=True)
class Point:
    """A contender in a case: what a sample belongs to, and a goal speaks of."""

    case: str
    contender: str


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing to measure, once in each round (or in the first ``most_rounds``)."""

    case: str
    spec: Spec
    take: Callable[[Contender], float]
    most_rounds: int | None = None

    @property
    def point(self) -> Point:
        return Point(self.case, self.spec.name)


@dataclass(frozen=True, slots=True)
class Goal:
    """What the subject's value is to be, as its ratio or difference to another's of the same round, or by itself."""

    subject: Point
    against: Point | None
    bound: float
    kind: Literal["ratio", "difference", "value"] = "ratio"
    at_least: bool = False

    def is_met_by(self, number: float) -> bool:
        return number >= self.bound if self.at_least else number <= self.bound


@dataclass(frozen=True, slots=True)
class Workload:
    """Subjects that are measured in the same rounds, in one unit."""

    name: str
    title: str
    unit: str
    subjects: tuple[Subject, ...]
    goals: tuple[Goal, ...]
    rounds: int
    #: The contender that ratios are shown to, in each case where it was measured.
    baseline: str = "chain"
    more_is_better: bool = False
    #: After so long no further round begins, unless rounds were asked for; ``None``: whatever it takes.
    enough_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement; ``place`` is the subject's in the order of its round."""

    point: Point
    round: int
    place: int
    value: float


@dataclass(slots=True)
class Measured:
    """What came of a workload."""

    workload: Workload
    samples: list[Sample] = field(default_factory=list)
    #: Contenders that could not be run here, and points that broke off, with the reason.
    skipped: dict[str, str] = field(default_factory=dict)
    broken: dict[Point, str] = field(default_factory=dict)
    seconds: float = 0.0

    def by_round(self, point: Point) -> dict[int, float]:
        return {sample.round: sample.value for sample in self.samples if sample.point == point}
