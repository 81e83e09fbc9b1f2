"""What a wait is for."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from orchestrator.core.records import Kind, Waiting, Wake
from orchestrator.core.saga import Node


@dataclass(slots=True, eq=False)
class Wanted:
    """What a wait is for: ``needed`` completions among ``pending``."""

    pending: dict[int, Node]
    needed: int
    wake: Wake = Wake.COUNT
    alone: Set[int] = frozenset()

    def note(self, seq: int) -> None:
        """Take notice of a delivered event."""
        node = self.pending.get(seq)
        if node is None or (self.wake is Wake.CLOSED and not node.is_closed):
            return
        del self.pending[seq]
        ends = seq in self.alone or (self.wake is Wake.FAILURE and node.is_failure)
        self.needed = 0 if ends else self.needed - 1

    def find_receive(self, channel: str) -> Node | None:
        """Return the first receive on ``channel`` among what the wait is for."""
        receives = [n for n in self.pending.values() if n.record.kind is Kind.RECEIVE and n.record.name == channel]
        return min(receives, key=lambda node: node.seq, default=None)

    def waiting(self, *, is_compensating: bool, draining: bool) -> Waiting:
        wakes = {seq: Wake.ALONE if seq in self.alone else self.wake for seq in self.pending}
        seqs = tuple(self.pending) if draining else ()
        return Waiting(self.needed, wakes, is_compensating, seqs)
