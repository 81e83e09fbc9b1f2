"""Edda: workflow and activities in the event loop of one process, each activity recorded."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from edda import EddaApp, WorkflowContext, activity, workflow

from benchmarks.contenders.contender import Run
from benchmarks.marks import now
from benchmarks.peers.serving import serve


@activity
async def step(ctx: WorkflowContext) -> dict[str, Any]:  # noqa: ARG001 - its first parameter
    return {}


@workflow
async def sequence(ctx: WorkflowContext, steps: int) -> dict[str, Any]:
    for _ in range(steps):
        await step(ctx)
    return {}


async def run_sequence(request: dict[str, int]) -> Run:
    began = now()
    await sequence.start(steps=request["steps"])
    return Run(began, now())


async def run_crowd(request: dict[str, int]) -> Run:
    began = now()
    await asyncio.gather(*[sequence.start(steps=request["steps"]) for _ in range(request["instances"])])
    return Run(began, now())


def main() -> None:
    loop = asyncio.new_event_loop()
    url = os.environ["BENCHMARKS_STORE"].replace("+psycopg", "+asyncpg")
    app = EddaApp(service_name="benchmarks", db_url=url)
    loop.run_until_complete(app.initialize())
    try:
        serve(
            {
                "sequence": lambda request: loop.run_until_complete(run_sequence(request)),
                "crowd": lambda request: loop.run_until_complete(run_crowd(request)),
            }
        )
    finally:
        loop.run_until_complete(app.shutdown())


if __name__ == "__main__":
    main()
