"""Steps whose failure blocks their instance: past its pivot, or parked, it waits for an operator instead of undoing.

Such a step stays unsettled, so that nothing recorded ever changes: ``resume()`` gives it another attempt,
``fail_step()`` lets it raise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchestrator import codec
from orchestrator.core.records import Failure, Kind, Outcome, Role, State
from orchestrator.runtime.change import Change
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status


def is_blocking(instance: Instance, row: HistoryRow, outcome: Outcome) -> bool:
    """Tell whether an outcome of ``row`` blocks its instance instead of being raised."""
    if outcome is Outcome.SUCCEEDED or row.kind not in (Kind.STEP, Kind.CHILD) or row.run != instance.run:
        return False
    if row.is_draining or row.role is Role.OPTIONAL or instance.status.is_final:
        return False
    if row.is_detached and instance.status is Status.COMPENSATING:
        return False
    is_doubtful_pivot = row.role is Role.PIVOT and outcome is Outcome.UNKNOWN
    return instance.parks or instance.is_past_pivot or is_doubtful_pivot


def block(
    row: HistoryRow, values: dict[str, Any], outcome: Outcome, failure: str | None, blocked: Iterable[HistoryRow]
) -> Change:
    """Leave a step that has come to ``outcome`` unsettled, beside those that are ``blocked`` already."""
    change = Change()
    if values["state"] is State.TIMED_OUT:  # an attempt goes on, and may yet succeed
        held: dict[str, Any] = {"timeout_at": None, "due_at": None, "is_timed_out": True}
    else:
        is_in_doubt = row.is_in_doubt or values.get("is_in_doubt", False) or outcome is Outcome.UNKNOWN
        held = {**values, "state": State.BLOCKED, "is_timed_out": False, "is_in_doubt": is_in_doubt, "timeout_at": None}
    held["failure"] = failure
    change.change_row(row, held)
    still = sorted([row.changed(held), *(r for r in blocked if r.seq != row.seq)], key=lambda r: r.seq)
    change.instance = {"status": Status.BLOCKED, "blocked_steps": len(still), "blocked": explain(still)}
    return change


def release(instance: Instance, row: HistoryRow, change: Change, others: Iterable[HistoryRow]) -> None:
    """Note that ``row`` blocks its instance no longer."""
    still = [other for other in others if other.seq != row.seq]
    change.instance["blocked_steps"] = len(still)
    if is_blocked_for_code(instance):  # that it stays, and there is no pass that would go on with it
        return
    change.instance["blocked"] = explain(still) if still else None
    if not still and instance.status is Status.BLOCKED:
        change.instance["status"] = Status.RUNNING


def is_blocked_for_code(instance: Instance) -> bool:
    """Tell whether no code could make the pass of an instance; it may be blocked for steps besides."""
    is_stopped = instance.status is Status.BLOCKED and instance.pass_due_at is None
    return is_stopped and (instance.refused is not None or instance.blocked_steps == 0 or instance.waiting == 0)


def explain(rows: Iterable[HistoryRow]) -> str:
    """Say in words why an instance is blocked, and what mends it."""
    return "\n".join(_explain(row) for row in rows)


def _explain(row: HistoryRow) -> str:
    failure = codec.load(Failure, row.failure) if row.failure else None
    said = f"{failure.type}: {failure.message}" if failure else "it ended without an exception"
    if row.state is State.RUNNING:
        return (
            f"step {row.seq} ({row.name}) did not end in time, and an attempt of it goes on; wait for it, resume() "
            f"gives it as much time again, fail_step({row.seq}) lets the workflow go on without its result"
        )
    where = "nobody can say whether it took effect" if row.is_in_doubt else "it failed"
    return (
        f"step {row.seq} ({row.name}): {where}: {said}; resume() gives it another attempt, fail_step({row.seq}) lets "
        "it raise in the workflow"
    )


def outcome_of(row: HistoryRow) -> Outcome:
    """Return what a blocked step is settled as when an operator lets it fail."""
    if row.is_in_doubt or row.state is State.RUNNING:
        return Outcome.UNKNOWN
    return Outcome.FAILED if row.attempt else Outcome.WITHDRAWN
