"""All that was measured, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.points import Goal, Measured, Point
from benchmarks.spread import Verdict, judge


def write_record(path: Path, measured: Sequence[Measured], surroundings: Mapping[str, Any]) -> None:
    """Write every number, and what it was measured with and held against."""
    content = {**surroundings, "workloads": [_workload(one) for one in measured]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _workload(measured: Measured) -> dict[str, Any]:
    workload = measured.workload
    return {
        "name": workload.name,
        "title": workload.title,
        "unit": workload.unit,
        "more_is_better": workload.more_is_better,
        "seconds": round(measured.seconds, 1),
        "samples": [
            {**_point(s.point), "round": s.round, "place": s.place, "value": s.value} for s in measured.samples
        ],
        "goals": [_verdict(verdict) for verdict in judge(measured)],
        "skipped": measured.skipped,
        "broken": [{**_point(point), "reason": reason} for point, reason in measured.broken.items()],
    }


def _point(point: Point) -> dict[str, str]:
    return {"case": point.case, "contender": point.contender}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    goal: Goal = verdict.goal
    spread = verdict.spread
    return {
        **_point(goal.subject),
        "against": None if goal.against is None else _point(goal.against),
        "kind": goal.kind,
        "bound": goal.bound,
        "at_least": goal.at_least,
        "is_met": verdict.is_met,
        "median": None if spread is None else spread.median,
        "least": None if spread is None else spread.least,
        "most": None if spread is None else spread.most,
    }
