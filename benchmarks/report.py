"""What was measured, for people: a table for each workload, then the goals, and where we lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measuring import list_points
from benchmarks.points import Goal, Measured, Point
from benchmarks.spread import Spread, Verdict, find_spread, judge, list_ratios


def show_surroundings(console: Console, surroundings: Mapping[str, Any]) -> None:
    machine, versions = surroundings["machine"], surroundings["versions"]
    console.print(
        f"{machine['system']}, {machine['cores']} cores, load {machine['load_before']}, "
        f"a flush to disk takes {machine['flush_milliseconds']} ms",
        highlight=False,
    )
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()), style="dim", highlight=False)


def show_workload(console: Console, measured: Measured) -> None:
    """Print medians, spreads and ratios of a workload, and what could not be run."""
    workload = measured.workload
    better = "more is better" if workload.more_is_better else "less is better"
    table = Table(title=f"{workload.title}\n{workload.unit}, {better}", title_justify="left", title_style="bold")
    table.add_column("case")
    table.add_column("contender")
    for heading in ("median", "least to most", "rounds", f"to {workload.baseline}" if workload.baseline else "", ""):
        table.add_column(heading, justify="right")
    case = ""
    for point in list_points(measured):
        if case and point.case != case:
            table.add_section()
        table.add_row("" if point.case == case else point.case, point.contender, *_cells(measured, point))
        case = point.case
    console.print()
    console.print(table)
    for name, reason in measured.skipped.items():
        console.print(f"skipped: {name}: {escape(reason)}", style="yellow", highlight=False)
    for point, reason in measured.broken.items():
        console.print(f"broke off: {point.contender}, {point.case}: {escape(reason)}", style="red", highlight=False)


def _cells(measured: Measured, point: Point) -> list[str]:
    spread = find_spread(measured.by_round(point).values())
    assert spread is not None
    cells = [_number(spread.median), f"{_number(spread.least)} to {_number(spread.most)}", str(spread.count)]
    baseline = Point(point.case, measured.workload.baseline)
    ratios = find_spread(list_ratios(measured.by_round(point), measured.by_round(baseline)))
    if ratios is None or point == baseline:
        return [*cells, "", ""]
    return [*cells, f"{ratios.median:.2f}", f"{ratios.least:.2f} to {ratios.most:.2f}"]


def show_goals(console: Console, every: Sequence[Measured]) -> bool:
    """Print each goal with what came of it, and where we lose; return whether we lose nowhere."""
    verdicts = [(measured.workload.name, verdict) for measured in every for verdict in judge(measured)]
    if not verdicts:
        return True
    table = Table(title="Goals", title_justify="left", title_style="bold")
    for heading in ("workload", "case", "ours", "goal"):
        table.add_column(heading)
    table.add_column("measured", justify="right")
    table.add_column("least to most", justify="right")
    table.add_column("")
    for name, verdict in verdicts:
        goal, spread = verdict.goal, verdict.spread
        table.add_row(
            name, goal.subject.case, goal.subject.contender, _goal(goal), *_outcome(spread), _word(verdict.is_met)
        )
    console.print()
    console.print(table)
    lost = [(name, verdict) for name, verdict in verdicts if verdict.is_met is False]
    unknown = sum(verdict.is_met is None for _, verdict in verdicts)
    _show_lost(console, lost, unknown, len(verdicts))
    return not lost


def _show_lost(console: Console, lost: Sequence[tuple[str, Verdict]], unknown: int, total: int) -> None:
    console.print()
    if lost:
        console.print("We lose here:", style="bold red")
        for name, verdict in lost:
            goal, spread = verdict.goal, verdict.spread
            assert spread is not None
            console.print(
                f"  {name}, {goal.subject.case}, {goal.subject.contender}: "
                f"{_number(spread.median)}, the goal is {_goal(goal)}",
                highlight=False,
            )
    elif unknown < total:
        console.print("We lose nowhere that was measured.", style="bold green")
    console.print(f"{total - unknown - len(lost)} of {total} goals met, {len(lost)} missed, {unknown} not measured")


def _outcome(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return "", ""
    return _number(spread.median), f"{_number(spread.least)} to {_number(spread.most)}"


def _word(is_met: bool | None) -> str:
    if is_met is None:
        return "[dim]not measured[/dim]"
    return "[green]met[/green]" if is_met else "[bold red]missed[/bold red]"


def _goal(goal: Goal) -> str:
    sign = "at least" if goal.at_least else "at most"
    if goal.against is None:
        return f"{sign} {goal.bound:g}"
    other = goal.against.contender
    if goal.against.case != goal.subject.case:
        other = goal.against.case if other == goal.subject.contender else f"{other}, {goal.against.case}"
    if goal.kind == "difference":
        return f"{sign} {goal.bound:g} over {other}"
    return f"{sign} {goal.bound:g} x {other}"


def _number(value: float) -> str:
    """Write three digits that matter, and no exponents."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"
