"""Settling a step that is not the last one that its instance waits for: one less to wait for, and no pass."""

from __future__ import annotations

import logging

from orchestrator.core.attempts import AttemptSucceeded
from orchestrator.core.records import Outcome, State
from orchestrator.runtime.change import Change, Outbox
from orchestrator.runtime.logs import about
from orchestrator.runtime.transactions import Transactions
from orchestrator.store import counting, history, instances
from orchestrator.store.engine import Conflict, is_transient
from orchestrator.store.history import HistoryRow
from orchestrator.store.prepared import may_run_alone

logger = logging.getLogger("orchestrator")


def count_off(transactions: Transactions, row: HistoryRow, ended: AttemptSucceeded) -> Outbox | None:
    """Settle a step that was claimed while others were waited for as well; ``None``: it has to be done by a change."""
    if not counting.may_count_off(row) or transactions.owes_notices:
        return None
    values = {
        "state": State.SETTLED,
        "outcome": Outcome.SUCCEEDED,
        "result": ended.result,
        "failure": None,
        "awaited": None,
        **history.RELEASED,
    }
    try:
        return _count_off(transactions, row, values)
    except Conflict:
        return None
    except Exception as error:
        if not is_transient(error):
            otherwise = "%s: step %d could not be counted off, and is settled otherwise"
            logger.exception(otherwise, row.instance_id, row.seq, extra=about(row))
    # nobody can say what has become of it: the answer to the COMMIT may have been lost
    patience = transactions.settings.store_patience
    is_counted = transactions.store.retrying(lambda: _is_counted(transactions, row), patience_seconds=patience)
    return Outbox() if is_counted else None


def _count_off(transactions: Transactions, row: HistoryRow, values: dict[str, object]) -> Outbox:
    now = transactions.clock()
    outbox = Outbox()
    with transactions.store.begin("settle", locks_late=True) as connection:
        is_alone = may_run_alone(connection)
        if not is_alone:
            transactions.store.lock_late(connection)
        became = counting.count_off(connection, row, values, now, is_alone=is_alone)
        if transactions.observers is not None:
            change = Change(rows={row.seq: (row, {**values, "settled_at": became.last_at})})
            outbox.notices += transactions.observers.note(connection, became, change, now)
    return outbox


def _is_counted(transactions: Transactions, row: HistoryRow) -> bool:
    with transactions.store.begin("read-back") as connection:
        # the lock first: the server may be busy with that COMMIT still
        instances.lock_instance(connection, row.instance_id)
        found = history.find_row(connection, row.key)
    # nobody else settles this attempt, and as a success
    return found is not None and (found.attempt, found.outcome) == (row.attempt, Outcome.SUCCEEDED)
