"""What a process remembers of the instances that it made passes of last, so that a pass reads only what is new.

Decoded records that will not change any more, what has come in, and where that is asked for the workflow function
itself, as it stands where it waits.  What a pass has added counts when it is committed; whatever else happens to the
transaction, all is forgotten, and the next pass reads the whole history, as that of any other process does: nothing but
time depends on it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from orchestrator.core.live import LivePass
from orchestrator.core.records import Decision, Event, History, Kind, Outcome, Record, State
from orchestrator.runtime.change import Change
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance

#: So many instances a thread remembers, and so many records and characters of payloads all of them may have together.
MOST_INSTANCES, MOST_RECORDS, MOST_CHARACTERS = 200, 20_000, 16_000_000

_Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Remembered:
    """The history of a run as far as it is known: all records below ``mark``, all that came in up to ``order``."""

    key: _Key
    mark: int
    order: int
    records: tuple[Record, ...]
    inbox: tuple[Event, ...]
    characters: int  # of the payloads of these
    live: LivePass | None


@dataclass(slots=True)
class _Use:
    """What a transaction works with."""

    taken: list[LivePass] = field(default_factory=list)
    new: list[Remembered] = field(default_factory=list)


class _OfThread(threading.local):
    """A live pass can go on only in the thread that made it."""

    def __init__(self) -> None:
        self.kept: OrderedDict[_Key, Remembered] = OrderedDict()
        self.uses: list[_Use] = []


class Memory:
    """Of each thread of this process, and of as many workflow functions that stand as ``most_live``."""

    def __init__(self, most_live: int) -> None:
        self.most_live = most_live
        self._own = _OfThread()

    def take(self, instance: Instance) -> Remembered | None:
        """Return what is remembered of an instance, for one pass."""
        found = self._own.kept.pop((instance.id, instance.generation, instance.run), None)
        if found is None:
            return None
        # an operator's records, and what undoes a completed instance, are no part of it
        if instance.undo_order is not None or instance.next_seq < found.mark:
            _let_go(found)
            return None
        if found.live is not None:
            self.watch(found.live)
        return found

    def watch(self, live: LivePass) -> None:
        """Let go of a live pass, if the transaction that works with it is rolled back."""
        if self._own.uses:
            self._own.uses[-1].taken.append(live)

    def keep(
        self,
        seen: Instance,
        known: Remembered | None,
        history: History,
        rows: dict[int, HistoryRow],
        decision: Decision,
        live: LivePass | None,
        change: Change,
    ) -> None:
        """Remember, once it has been committed, what a pass was made of, and what it has come to."""
        key = (seen.id, seen.generation, seen.run)
        mark = _first_open(rows, decision, change, len(history.records))
        # what it came to (withdrawals) has later orders: it is read again with the records that it belongs to
        order = seen.next_order - 1
        records = tuple(history.records[:mark])
        before = 0 if known is None or known.mark > mark else known.mark
        characters = sum(map(_count_characters, records[before:])) + (known.characters if known and before else 0)
        remembered = Remembered(key, mark, order, records, tuple(history.inbox), characters, live)
        if self._own.uses:
            self._own.uses[-1].new.append(remembered)

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
        for remembered in use.new:
            self._keep(remembered)

    def _keep(self, remembered: Remembered) -> None:
        kept = self._own.kept
        kept[remembered.key] = remembered
        standing = [each for each in kept.values() if each.live is not None]
        for each in standing[: max(0, len(standing) - self.most_live)]:
            _let_go(each)
            kept[each.key] = replace(each, live=None)
        while len(kept) > MOST_INSTANCES or (len(kept) > 1 and self._is_too_much()):  # the last one is as long as it is
            _let_go(kept.popitem(last=False)[1])

    def _is_too_much(self) -> bool:
        every = self._own.kept.values()
        return sum(each.mark for each in every) > MOST_RECORDS or sum(e.characters for e in every) > MOST_CHARACTERS


def _let_go(remembered: Remembered) -> None:
    if remembered.live is not None:
        remembered.live.let_go()


def _count_characters(record: Record) -> int:
    return len(record.arguments or "") + len(record.result or "")


def _first_open(rows: dict[int, HistoryRow], decision: Decision, change: Change, size: int) -> int:
    """Return the first record that may change, or that the next pass has to be told of as it was written."""
    touched = [
        *(withdrawal.seq for withdrawal in decision.withdrawals),
        *(receipt.seq for receipt in decision.receipts),
    ]
    open_ones = [seq for seq, row in rows.items() if seq >= 0 and not _is_fixed(row, change)]
    return min([size, *touched, *open_ones])


def _is_fixed(row: HistoryRow, change: Change) -> bool:
    """Tell whether nothing that a pass looks at changes any more; of a failed compensation an operator may dispose."""
    if row.seq in change.rows:
        row = row.changed(change.rows[row.seq][1])
    is_repairable = row.kind in (Kind.COMPENSATION, Kind.UNDO) and row.outcome is not Outcome.SUCCEEDED
    return row.state is State.SETTLED and not is_repairable
