"""A live pass beside the passes that a shell makes: whatever ``decide()`` decides, it must decide as well.

It has a function and a host of its own, so that what the two of them log and draw can be compared at the end.  Now and
then it is let go and made anew, so it comes to begin at any point of a history, and now and then it misses a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from orchestrator.core.live import LivePass
from orchestrator.core.records import Decision, History, Record, Waiting

from .host import FakeHost


@dataclass(slots=True)
class Twin:
    """The live pass of one instance."""

    function: Callable[..., Any]
    host: FakeHost
    random: Random
    #: Out of 100 passes, how many are made by a new live pass.
    renewals: int = 10
    #: How many are made elsewhere: the live pass then replays what was asked for there.
    absences: int = 15
    live: LivePass | None = None
    known: list[Record] = field(default_factory=list)
    order: int = 0
    passes: int = 0
    gone_on: int = 0

    def check_pass(self, args: tuple[Any, ...], history: History, decided: Decision, lines: list[str]) -> None:
        """Make a pass that is going to be written, or let another process make it, which has logged ``lines`` then."""
        self.passes += 1
        if self.live is not None and isinstance(decided.ending, Waiting) and self.random.randrange(100) < self.absences:
            self.host.log.lines[:] = lines
            return
        assert self._decide(args, history) == decided
        self._look_at(history)

    def check_quiet(self, args: tuple[Any, ...], history: History, decided: Decision) -> None:
        """Make a pass in between, of which nothing is written; one that had something to write cannot go on."""
        if self.live is None or self.random.random() < 0.5:
            return
        lines = len(self.host.log.lines)
        assert self._decide(args, history) == decided
        del self.host.log.lines[lines:]
        self._look_at(history)
        if decided.receipts:
            self.let_go()

    def let_go(self) -> None:
        if self.live is not None:
            lines = len(self.host.log.lines)
            self.live.let_go()
            assert len(self.host.log.lines) == lines, "what was let go has logged something"
            assert not self.live.is_waiting
            self.live = None

    def _decide(self, args: tuple[Any, ...], history: History) -> Decision:
        if self.live is not None and self.random.randrange(100) < self.renewals:
            self.let_go()
        if self.live is None:
            self.live = LivePass(self.function, args, {}, history, self.host)
            decision = self.live.decide()
        else:
            self.gone_on += 1
            news = list(history.records[len(self.known) :])
            changed = [new for new, old in zip(history.records, self.known, strict=False) if new != old] + news
            events = [event for event in history.inbox if event.order > self.order]
            decision = self.live.go_on(changed, events, passed_order=history.seen_order)
        if not self.live.is_waiting:
            self.live = None
        return decision

    def _look_at(self, history: History) -> None:
        self.known = list(history.records)
        self.order = history.inbox[-1].order if history.inbox else 0
