"""What is told of things while they happen, in the very process: ``otel`` takes it up, by default nobody does.

What must not be missed when a process dies is told by signals instead.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from orchestrator.store.history import HistoryRow


class Instrumentation:
    """Does nothing.  What takes its place must not raise."""

    def attempt(self, _row: HistoryRow) -> AbstractContextManager[object]:
        """Return what is around an attempt that was claimed, until it is settled."""
        return nullcontext()

    def body(self, _row: HistoryRow) -> AbstractContextManager[object]:
        """Return what is around the body of an attempt; it may be run again, if it is transactional."""
        return nullcontext()

    def note_pass(self, workflow: str, seconds: float) -> None:
        """Take notice of a pass that was made; an instance may be locked meanwhile."""

    def note_due(self, seconds: float | None) -> None:
        """Take notice, in a worker's own process, of how long the oldest work has been due; ``None``: nobody knows."""

    def carry(self) -> dict[str, str]:
        """Return headers that are kept with an instance: in the context of what it was started."""
        return {}
