"""A store with much in it: whether what has ended or sleeps costs those who list, settle and poll."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

from benchmarks.contenders.contender import Contender
from benchmarks.contenders.ours import Ours, OursSpec
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.statements import StatementCounter
from benchmarks.usage import cpu_seconds
from benchmarks.workloads import sides

Take = Callable[[Contender], float]

MOST_RATIO, FEW = 1.5, 100
#: How long an idle worker is watched.
SECONDS, SHORT_SECONDS = 20.0, 2.5
#: So many instances are in the store of the short run, half of them asleep.
SHORT_COUNT = 10_000
LIST, SETTLE, POLL, CPU = "list, ms", "settle, ms per step", "idle, ms of statements per s", "idle, CPU ms per s"


def list_milliseconds(contender: Contender) -> float:
    """Return how long a page of a hundred takes: of all, of one status, of one workflow."""
    assert isinstance(contender, Ours)
    times = 10
    began = time.perf_counter()
    for _ in range(times):
        contender.orchestrators.list(limit=100)
        contender.orchestrators.list(limit=100, status="COMPLETED")
        contender.orchestrators.list(limit=100, workflow="benchmarks.sleeper")
    return 1000.0 * (time.perf_counter() - began) / (3 * times)


def settle_milliseconds(contender: Contender) -> float:
    return 1000.0 * sum(contender.sequence(10).seconds for _ in range(10)) / 100


def idle_milliseconds(contender: Contender, seconds: float) -> float:
    """Return how long in each second the worker's main process waits for the database while nothing is due."""
    assert isinstance(contender, Ours)
    counter = StatementCounter(contender.settings.broker, contender.settings.queue)
    time.sleep(1.5)  # what was begun before is told of
    began, before = time.monotonic(), counter.read()
    time.sleep(seconds)
    after = counter.read()
    return 1000.0 * (after.seconds - before.seconds) / (time.monotonic() - began)


def idle_cpu_milliseconds(contender: Contender, seconds: float) -> float:
    before = cpu_seconds(contender.list_pids())
    time.sleep(seconds)
    return 1000.0 * (cpu_seconds(contender.list_pids()) - before) / seconds


def make(full: bool) -> list[Workload]:
    return [_sleeping(full), _full(full)]


def _sleeping(full: bool) -> Workload:
    takes: dict[str, Take] = {POLL: functools.partial(idle_milliseconds, seconds=SECONDS if full else SHORT_SECONDS)}
    if not full:
        title = f"What a worker does while nothing is due, with {SHORT_COUNT // 2:,} instances asleep and with {FEW}"
        return _compare("sleeping", title, takes, _pairs(full, SHORT_COUNT, SHORT_COUNT // 2), rounds=1)
    count = 100_000
    takes[CPU] = functools.partial(idle_cpu_milliseconds, seconds=SECONDS)
    pairs = [
        (
            OursSpec(store, label="none-asleep", counts_statements=True),
            OursSpec(store, label="asleep", counts_statements=True, sleeping=count),
        )
        for store in sides.stores(full)
    ]
    title = f"What a worker does while nothing is due, with {count:,} instances asleep and with none"
    return _compare("sleeping", title, takes, pairs, rounds=3)


def _full(full: bool) -> Workload:
    count = 1_000_000 if full else SHORT_COUNT
    asleep = count // 10 if full else count // 2
    takes: dict[str, Take] = {LIST: list_milliseconds, SETTLE: settle_milliseconds}
    if full:  # in the short run those who sleep are in the same store
        takes[POLL] = functools.partial(idle_milliseconds, seconds=SECONDS)
    what = "Listing, settling and polling" if full else "Listing and settling"
    title = f"{what} with {count:,} instances in the store ({asleep:,} of them asleep), and with {2 * FEW}"
    return _compare("full-store", title, takes, _pairs(full, count, asleep), rounds=5 if full else 2)


def _pairs(full: bool, count: int, asleep: int) -> list[tuple[OursSpec, OursSpec]]:
    """Return stores with little and with much in them, both enough for a page: their lists are of the same length."""
    return [
        (
            OursSpec(store, label="few", counts_statements=True, ended=FEW, sleeping=FEW),
            OursSpec(store, label="full", counts_statements=True, ended=count - asleep, sleeping=asleep),
        )
        for store in sides.stores(full)
    ]


def _compare(
    name: str, title: str, takes: dict[str, Take], pairs: Sequence[tuple[OursSpec, OursSpec]], rounds: int
) -> Workload:
    """Hold stores that are full against such as are empty."""
    subjects = [Subject(case, spec, take) for case, take in takes.items() for pair in pairs for spec in pair]
    goals = [
        Goal(Point(case, full.name), Point(case, empty.name), MOST_RATIO)
        for case in takes
        if case != CPU  # of what is nearly nothing, a ratio says little
        for empty, full in pairs
    ]
    return Workload(name, title, "ms", tuple(subjects), tuple(goals), rounds, baseline="")
