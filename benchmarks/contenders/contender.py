"""What a contender is: something that runs workloads and says how long they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from benchmarks.lab import Lab


class Unavailable(Exception):
    """A contender, or a server that it needs, cannot be run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Run:
    """The instants of one run, by the machine's monotonic clock: asked for, first step done, all done."""

    began: float
    ended: float
    first: float | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Spec(Protocol):
    """Names a contender, and opens it."""

    @property
    def name(self) -> str: ...

    def open(self, lab: Lab) -> Contender:
        """Begin to start it.  Raises ``Unavailable``."""


class Contender:
    """Runs no-op steps; what a contender cannot do, it leaves as it is here."""

    name = ""

    def warm(self) -> None:
        """Wait until it runs, and have every process do something."""

    def settle(self) -> None:
        """Let what a run left behind come to its end, so that the next one is not slowed by it."""

    def tell_to_stop(self) -> None:
        """Have its processes end, without waiting for them."""

    def close(self) -> None:
        """End every process that was started."""

    def check(self) -> None:
        """Raise if a process has ended."""

    def list_pids(self) -> list[int]:
        """The main processes that do the work; their children are found."""
        raise NotImplementedError

    def sequence(self, steps: int) -> Run:
        """Run one instance of ``steps`` steps, one after the other."""
        raise NotImplementedError

    def crowd(self, instances: int, steps: int) -> Run:
        """Run many instances at once, each a sequence."""
        raise NotImplementedError

    def echoes(self, steps: int, size: int) -> Run:
        """Run ``steps`` steps, of which all but the first take a text of ``size`` bytes and return it to the next."""
        raise NotImplementedError

    def fan_out(self, width: int) -> Run:
        """Run ``width`` steps at once, then one that takes all results."""
        raise NotImplementedError

    def map(self, items: int, concurrency: int | None) -> Run:
        """Run a step for each item, at most ``concurrency`` at a time, then one that takes all results."""
        raise NotImplementedError

    def undo(self) -> Run:
        """Run five steps, of which the fifth fails, and undo the other four."""
        raise NotImplementedError

    def local(self, steps: int) -> Run:
        """Run steps in the process that runs the workflow function."""
        raise NotImplementedError
