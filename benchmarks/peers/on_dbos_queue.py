"""DBOS on its queue: instances are enqueued in the database and begun by who polls it."""

from __future__ import annotations

from dbos import DBOS

from benchmarks.contenders.contender import Run
from benchmarks.peers import on_dbos
from benchmarks.peers.serving import serve


def enqueue(steps: int) -> object:
    return DBOS.enqueue_workflow(on_dbos.QUEUE, on_dbos.sequence, steps)


def run_sequence(request: dict[str, int]) -> Run:
    return on_dbos.wait_for(1, lambda: enqueue(request["steps"]))


def run_crowd(request: dict[str, int]) -> Run:
    return on_dbos.wait_for(request["instances"], lambda: enqueue(request["steps"]))


def main() -> None:
    on_dbos.launch()
    DBOS.register_queue(on_dbos.QUEUE, polling_interval_sec=on_dbos.POLL_SECONDS)
    try:
        serve({"sequence": run_sequence, "crowd": run_crowd})
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    main()
