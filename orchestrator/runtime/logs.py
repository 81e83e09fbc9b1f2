"""What lines of the log are about, in attributes of their records: for whoever formats lines as JSON."""

from __future__ import annotations

from typing import Any

from orchestrator.store.history import HistoryRow, StepKey


def about(what: HistoryRow | StepKey | str, attempt: int | None = None) -> dict[str, Any]:
    """Return the ``extra`` of a line about a step, one attempt of it, or an instance that is named by its id."""
    if isinstance(what, str):
        return {"instance_id": what}
    extra: dict[str, Any] = {"instance_id": what.instance_id, "run": what.run, "seq": what.seq}
    if isinstance(what, HistoryRow):
        attempt = attempt or what.attempt
    return extra if attempt is None else {**extra, "attempt": attempt}
