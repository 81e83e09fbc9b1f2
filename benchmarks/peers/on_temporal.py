"""Temporal: its development server keeps the history; a worker in this process runs workflows and activities."""

from __future__ import annotations

import asyncio
import os
import uuid
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from benchmarks.contenders.contender import Run
from benchmarks.marks import now
from benchmarks.peers.serving import serve

QUEUE = "benchmarks"
CONNECT_ATTEMPTS, CONNECT_PAUSE_SECONDS = 200, 0.2


@activity.defn
async def step() -> None:
    pass


@workflow.defn
class Sequence:
    @workflow.run
    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await workflow.execute_activity(step, start_to_close_timeout=timedelta(seconds=30))


async def connect() -> Client:
    for attempt in range(CONNECT_ATTEMPTS):
        try:
            return await Client.connect(os.environ["BENCHMARKS_TEMPORAL"])
        except RuntimeError:
            if attempt == CONNECT_ATTEMPTS - 1:
                raise
            await asyncio.sleep(CONNECT_PAUSE_SECONDS)
    raise AssertionError


async def run(client: Client, instances: int, steps: int) -> Run:
    def execute() -> Any:
        return client.execute_workflow(Sequence.run, steps, id=str(uuid.uuid4()), task_queue=QUEUE)

    began = now()
    await asyncio.gather(*[execute() for _ in range(instances)])
    return Run(began, now())


def main() -> None:
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(connect())
    runner = UnsandboxedWorkflowRunner()
    worker = Worker(client, task_queue=QUEUE, workflows=[Sequence], activities=[step], workflow_runner=runner)
    running = loop.create_task(worker.run())
    try:
        serve(
            {
                "sequence": lambda request: loop.run_until_complete(run(client, 1, request["steps"])),
                "crowd": lambda request: loop.run_until_complete(run(client, request["instances"], request["steps"])),
            }
        )
    finally:
        running.cancel()


if __name__ == "__main__":
    main()
