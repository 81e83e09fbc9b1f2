"""Workflow functions that stand where they wait: a pass that goes on with one costs what is new, not what was.

A process keeps those that it made passes of last.  What one has decided counts only when it is committed; whatever
else happens to the transaction, it is let go, and the next pass replays the history, as the pass of any process does
that has none: nothing but time depends on them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.core.live import LivePass
from orchestrator.core.records import Decision, Kind, Outcome, State
from orchestrator.runtime.change import Change
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance

#: So many records all of those may have together that a thread keeps.
MOST_RECORDS = 100_000

_Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Standing:
    """A live pass, and how much of the history it knows."""

    live: LivePass
    key: _Key
    mark: int  # records below it are as they will be, and it knows them
    order: int  # the last event that it was given
    size: int


@dataclass(slots=True)
class _Use:
    """What a transaction works with."""

    taken: list[LivePass] = field(default_factory=list)
    standing: list[Standing] = field(default_factory=list)


class _OfThread(threading.local):
    """A live pass can go on only in the thread that made it."""

    def __init__(self) -> None:
        self.kept: OrderedDict[_Key, Standing] = OrderedDict()
        self.uses: list[_Use] = []


class LivePasses:
    """Keeps as many live passes as ``most`` for each thread of this process, those that were used last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._own = _OfThread()

    def take(self, instance: Instance) -> Standing | None:
        """Return what stands for an instance, for one pass; ``None`` where its history has to be replayed."""
        standing = self._own.kept.pop((instance.id, instance.generation, instance.run), None)
        # an operator's records, and what undoes a completed instance, are no part of what it knows
        if standing is not None and (instance.undo_order is not None or instance.next_seq < standing.mark):
            standing.live.let_go()
            return None
        if standing is not None:
            self.watch(standing.live)
        return standing

    def watch(self, live: LivePass) -> None:
        """Let go of a live pass, if the transaction that works with it is rolled back."""
        if self._own.uses:
            self._own.uses[-1].taken.append(live)

    def keep(
        self,
        live: LivePass,
        instance: Instance,
        rows: dict[int, HistoryRow],
        decision: Decision,
        change: Change,
    ) -> None:
        """Keep a live pass, when what it has decided has been committed."""
        key = (instance.id, instance.generation, instance.run)
        size: int = change.instance["next_seq"]
        mark = _first_open(rows, decision, change, size)
        standing = Standing(live, key, mark, change.instance["next_order"] - 1, size)
        self._own.uses[-1].standing.append(standing)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Keep what the block, a transaction, works with when it has been committed; let it go where it was not."""
        use = _Use()
        self._own.uses.append(use)
        try:
            yield
        except BaseException:
            for live in use.taken:
                live.let_go()
            raise
        finally:
            self._own.uses.pop()
        for standing in use.standing:
            self._keep(standing)

    def _keep(self, standing: Standing) -> None:
        kept = self._own.kept
        kept[standing.key] = standing
        while len(kept) > self.most or sum(each.size for each in kept.values()) > MOST_RECORDS:
            _, oldest = kept.popitem(last=False)
            oldest.live.let_go()


def _first_open(rows: dict[int, HistoryRow], decision: Decision, change: Change, size: int) -> int:
    """Return the first record that may change, or that the pass has to be told of as it was written."""
    touched = [
        *(new.seq for new in decision.records),
        *(withdrawal.seq for withdrawal in decision.withdrawals),
        *(receipt.seq for receipt in decision.receipts),
    ]
    open_ones = [seq for seq, row in rows.items() if not _is_fixed(row.changed(change.rows.get(seq, (row, {}))[1]))]
    return min([size, *touched, *open_ones])


def _is_fixed(row: HistoryRow) -> bool:
    """Tell whether nothing that a pass looks at changes any more; of a failed compensation an operator may dispose."""
    is_repairable = row.kind in (Kind.COMPENSATION, Kind.UNDO) and row.outcome is not Outcome.SUCCEEDED
    return row.state is State.SETTLED and not is_repairable
