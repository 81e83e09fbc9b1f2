"""What a client pays to start something, before a worker hears of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from benchmarks.contenders.contender import Contender
from benchmarks.contenders.ours import Ours, OursSpec
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.workloads import sides

TASK, WORKFLOW, START = "task.delay()", "workflow.delay()", "orchestrator.start()"


def milliseconds_per_call(contender: Contender, call: str, times: int) -> float:
    assert isinstance(contender, Ours)
    workflow = contender.task("sequence")
    calls: dict[str, Callable[[], object]] = {
        TASK: lambda: contender.task("step").delay(10),
        WORKFLOW: lambda: workflow.delay(10),
        START: lambda: contender.orchestrators.start(workflow.s(10)),
    }
    calls[call]()  # connections are made
    began = time.perf_counter()
    for _ in range(times):
        calls[call]()
    return 1000.0 * (time.perf_counter() - began) / times


def make(full: bool) -> list[Workload]:
    specs = [OursSpec(store, label="client", has_worker=False) for store in sides.stores(full)]
    subjects: list[Subject] = []
    for call in (TASK, WORKFLOW, START):
        take = functools.partial(milliseconds_per_call, call=call, times=500 if full else 200)
        subjects += [Subject(call, spec, take) for spec in specs]
    goals = [Goal(Point(WORKFLOW, spec.name), Point(TASK, spec.name), 1.2) for spec in specs]
    title = "A client's call, without a worker; no result backend"
    return [Workload("starting", title, "ms per call", tuple(subjects), tuple(goals), 9 if full else 5, baseline="")]
