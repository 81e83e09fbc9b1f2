"""What a hand-off is to the transaction that makes it: a step that is recorded as claimed already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestrator.core.records import State
from orchestrator.runtime.change import Change
from orchestrator.runtime.executing import Executing, token_of
from orchestrator.store.claiming import Claimant, Held
from orchestrator.store.history import FRESH, HistoryRow


@dataclass(slots=True)
class Offer:
    """That a process is going to run one of the steps that a change records, if there is one that it may run."""

    claimant: Claimant
    executing: Executing
    may_run: Callable[[HistoryRow], bool]
    _announced: int | None = field(default=None, init=False)

    def announce(self, row: HistoryRow) -> None:
        """Tell the worker's parent of a step before the commit that claims it."""
        self._announced = token_of(row.key, row.dispatch)
        self.executing.begin(self._announced)

    def withdraw(self) -> None:
        """Announce nothing any more: the change was rolled back, or nobody can say what has become of it."""
        if self._announced is not None:
            self.executing.end(self._announced)
            self._announced = None


def take_up(change: Change, offer: Offer, now: datetime) -> None:
    """Let the first of the steps that ``change`` would publish, and its process may run, be claimed by that process."""
    row = next((each for each in change.outbox.steps if each.attempt == 0 and offer.may_run(each)), None)
    if row is None:
        return
    values: dict[str, Any] = {
        "state": State.RUNNING,
        "attempt": 1,
        "claim_incarnation": offer.claimant.incarnation,
        "claim_process": offer.claimant.process,
        "started_at": now,
        "publications": 0,
        "publish_at": None,
        "expires_at": None,
        "due_at": row.timeout_at,
    }
    fresh = next((new for new in change.new_rows if new["seq"] == row.seq), None)
    if fresh is not None:
        fresh.update(values)
        row = HistoryRow(**{**FRESH, **fresh})  # what it is awaited for was not known yet when it was to be published
    else:  # an item that its map had held back
        read, _ = change.rows[row.seq]
        if row.seq in change.wakes:
            values |= {"awaited": change.instance["wait_number"], "wake": change.wakes[row.seq]}
        change.change_row(read, values)
        row = read.changed(change.rows[row.seq][1])
    offer.announce(row)
    change.outbox.steps = [each for each in change.outbox.steps if each.seq != row.seq]
    change.outbox.handed = Held(row)
