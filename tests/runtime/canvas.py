"""Tasks and workflows that follow one another in a canvas; what was called is told in files, a line for each call."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from celery import Task, shared_task

from orchestrator import Context, shared_workflow
from tests.waiting import wait_until


@shared_task
def add(left: int, right: int) -> int:
    return left + right


@shared_task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task
def refuse(number: int) -> None:
    raise LookupError(f"there is no {number}")


@shared_task
def undo(_result: Any) -> None: ...


@shared_task(bind=True)
def note(self: Task, value: Any, path: str) -> Any:
    """Tell that it was called, under which id, and with what."""
    _append(path, self.request.id, value)
    return value


@shared_task(bind=True)
def note_stamps(self: Task, _value: Any, path: str) -> None:
    _append(path, self.request.id, (self.request.stamps or {}).get("tenant"))


@shared_task
def note_failure(request: Any, error: Any, _traceback: Any, path: str) -> None:
    _append(path, request.id, f"{type(error).__name__}: {error}")


@shared_task
def note_headers(request: Any, error: Any, _traceback: Any, path: str) -> None:
    _append(path, request.id, [request.headers["tenant"], request.tenant])


@shared_task(bind=True)
def note_failed_id(self: Task, failed_id: str, path: str) -> None:
    """An errback of the old style: a task of its own, which gets the id of what failed."""
    _append(path, self.request.id, failed_id)


@shared_task
def hold(path: str, value: int) -> int:
    """Run until a file exists."""
    deadline = time.monotonic() + 180
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"nobody made {path}"
        time.sleep(0.02)
    return value


@shared_task(bind=True)
def becomes_workflow(self: Task, number: int) -> None:
    raise self.replace(doubles.s(number))


def _append(path: str, *what: Any) -> None:
    with Path(path).open("a") as file:
        file.write(json.dumps(what) + "\n")


def read_notes(path: Path) -> list[Any]:
    """Return what was told in a file so far: the id of each call, and what it got."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_notes(path: Path, count: int = 1) -> list[Any]:
    return wait_until(lambda: len(read_notes(path)) >= count and read_notes(path), f"{count} notes in {path}") or []


@shared_workflow
def doubles(ctx: Context, number: int) -> int:
    ctx.sleep(0.05)  # its first pass is not its end
    return int(ctx.run(add.s(number, number)))


@shared_workflow
def doubles_late(ctx: Context, number: int, seconds: float) -> int:
    ctx.sleep(seconds)
    return 2 * number


@shared_workflow
def doubles_all(ctx: Context, numbers: list[int]) -> int:
    ctx.sleep(0.05)
    return 2 * int(ctx.run(total.s(numbers)))


@shared_workflow
def fails(ctx: Context, number: int = 0) -> int:
    ctx.sleep(0.05)
    raise LookupError(f"there is no {number}")


@shared_workflow
def is_undone(ctx: Context, number: int = 0) -> int:
    ctx.run(add.s(number, 1), compensate=undo.s())
    return int(ctx.run(refuse.s(number)))


@shared_workflow
def waits(ctx: Context, number: int = 0) -> int:
    ctx.run(add.s(number, 1), compensate=undo.s())
    return int(ctx.receive("go on"))


@shared_workflow
def can_be_undone(ctx: Context) -> int:
    return int(ctx.run(add.s(1, 1), compensate=undo.s()))
