"""DBOS in process: the caller's thread runs the workflow and its steps, each step a commit."""

from __future__ import annotations

import os
from collections.abc import Callable

from dbos import DBOS, DBOSConfig

from benchmarks.contenders.contender import Run
from benchmarks.marks import now
from benchmarks.peers.serving import serve

QUEUE = "benchmarks"
#: How often its queue is looked at: its default, a second, would be all that is measured.
POLL_SECONDS = 0.01

#: When the last steps of instances were over.
ended: list[float] = []


@DBOS.step()
def step() -> None:
    pass


@DBOS.workflow()
def sequence(steps: int) -> None:
    for _ in range(steps):
        step()
    ended.append(now())


def run_sequence(request: dict[str, int]) -> Run:
    """Run an instance in this thread."""
    began = now()
    sequence(request["steps"])
    return Run(began, now())


def run_crowd(request: dict[str, int]) -> Run:
    """Start instances in the threads of its executor."""
    return wait_for(request["instances"], lambda: DBOS.start_workflow(sequence, request["steps"]))


def wait_for(instances: int, begin: Callable[[], object]) -> Run:
    """Begin so many instances and wait until the last step of each is over."""
    from time import sleep

    ended.clear()
    began = now()
    for _ in range(instances):
        begin()
    while len(ended) < instances:
        sleep(0.004)
    return Run(began, max(ended))


def launch() -> None:
    url = os.environ["BENCHMARKS_STORE"].replace("+psycopg", "")
    config: DBOSConfig = {"name": "benchmarks", "system_database_url": url, "log_level": "ERROR"}
    DBOS(config=config)
    DBOS.launch()


def main() -> None:
    launch()
    try:
        serve({"sequence": run_sequence, "crowd": run_crowd})
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    main()
