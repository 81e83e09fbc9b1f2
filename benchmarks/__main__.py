"""`python -m benchmarks`: servers and workers of its own, rounds, tables, and where we lose."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.status import Status

from benchmarks import workers
from benchmarks.lab import Lab, open_lab
from benchmarks.machine import describe_machine, list_versions
from benchmarks.measuring import measure
from benchmarks.points import Measured, Workload
from benchmarks.record import write_record
from benchmarks.report import show_goals, show_surroundings, show_workload
from benchmarks.workloads import list_workloads

OUT = workers.ROOT / "build" / "benchmarks"


@click.command()
@click.option("--full", is_flag=True, help="All contenders, in the complete sizes; takes more than an hour.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this workload; may be given again.")
@click.option("--rounds", type=click.IntRange(min=1), help="So many rounds of each workload.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, help="Where the results go.")
@click.option("--folder", type=click.Path(exists=True, path_type=Path), help="Where databases are made; default: TMP.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a goal is missed.")
@click.option("--list", "lists", is_flag=True, help="Say which workloads there are.")
def main(
    full: bool, only: Sequence[str], rounds: int | None, out: Path, folder: Path | None, strict: bool, lists: bool
) -> None:
    """Measure sagas beside what there is otherwise: interleaved rounds, medians, ratios of the same round."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    workloads = list_workloads(full=full)
    if lists:
        for workload in workloads:
            console.print(f"{workload.name:12} {workload.title} ({workload.unit})", highlight=False)
        return
    chosen = _choose(workloads, only, full=full)
    for number in (signal.SIGTERM, signal.SIGINT):  # what a shell starts in the background ignores the second
        signal.signal(number, _interrupt)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with open_lab(folder) as lab:
            has_won = _run(console, lab, chosen, rounds, out, {"full": full, "rounds": rounds})
    except KeyboardInterrupt:
        console.print("interrupted; what was started has been ended")
        sys.exit(130)
    if strict and not has_won:
        sys.exit(1)


def _choose(workloads: list[Workload], only: Sequence[str], *, full: bool) -> list[Workload]:
    """Return those that were named; else in the short run those that a goal is set for."""
    names = [workload.name for workload in workloads]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise click.BadParameter(f"there is no workload {', '.join(unknown)}; known are {', '.join(names)}")
    if only:
        return [workload for workload in workloads if workload.name in only]
    return [workload for workload in workloads if full or workload.goals]


def _run(
    console: Console, lab: Lab, workloads: list[Workload], rounds: int | None, out: Path, settings: dict[str, Any]
) -> bool:
    surroundings = {
        "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(lab.folder),
        "versions": list_versions(),
        "settings": {**settings, "worker": workers.list_options()},
    }
    show_surroundings(console, surroundings)
    every: list[Measured] = []
    began = time.monotonic()
    for workload in workloads:
        with console.status(workload.name) as status:
            measured = measure(lab, workload, _teller(console, status), rounds)
        every.append(measured)
        show_workload(console, measured)
        write_record(out / "results.json", every, surroundings)  # after each: an interruption loses nothing
        _plot(console, out, measured)
    has_won = show_goals(console, every)
    console.print(f"{time.monotonic() - began:.0f} s; the numbers and pictures are in {out}", highlight=False)
    return has_won


def _teller(console: Console, status: Status) -> Any:
    return status.update if console.is_terminal else lambda _text: None


def _plot(console: Console, out: Path, measured: Measured) -> None:
    try:
        from benchmarks.plots import write_plot

        write_plot(out, measured)
    except ImportError as error:
        console.print(f"no pictures: {error}", style="yellow", highlight=False)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
