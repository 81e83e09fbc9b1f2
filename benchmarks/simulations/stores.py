"""What several stores would give (`docs/explanation/growth.md`): settlements simulated, and where ids would be put.

Processes take steps of many instances, one after the other.  A step has a body and messages (``think``), is claimed in
one commit and settled in another.  A commit takes one of its store's cores (``work``), then a flush that it shares with
all that wait for one; a settlement holds its instance meanwhile.  Left out: the network, polling, fan-outs.
"""

from __future__ import annotations

import heapq
import itertools
import random
from bisect import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.simulations.placement import NAMES, place, spread

Do = Callable[[], object]
STORES, SKEWS = (1, 2, 4, 8), (0.0, 0.8, 1.2)


@dataclass(frozen=True, slots=True)
class Setting:
    """Times are in milliseconds: means of an exponential distribution, but the flush always takes as long."""

    stores: int = 1
    skew: float = 0.0  # the n-th instance gets steps in proportion to 1 / n ** skew
    instances: int = 2000
    processes: int = 128  # of all workers
    cores: int = 2  # of each store
    think: float = 5.0  # to be measured
    work: float = 0.6  # to be measured
    flush: float = 1.0  # to be measured
    commits: int = 2  # of a step: 1 where it is handed over, for then nothing but its settlement commits
    steps: int = 10_000


class Places:
    """So many at a time, the others in turn."""

    def __init__(self, count: int = 1) -> None:
        self.free, self.waiting = count, deque[Do]()

    def take(self, do: Do) -> None:
        if self.free:
            self.free -= 1
            do()
        else:
            self.waiting.append(do)

    def leave(self) -> None:
        if self.waiting:
            self.waiting.popleft()()
        else:
            self.free += 1


class Run:
    """One run; ``waits`` are, sorted, the times from asking for an instance to the end of the commit that settles."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.random, self.now = setting, random.Random(1), 0.0  # noqa: S311
        self.events: list[tuple[float, int, Do]] = []
        self.count = itertools.count()  # of two at the same instant the one asked for first is first
        self.cores = [Places(setting.cores) for _ in range(setting.stores)]
        self.unflushed: list[list[Do]] = [[] for _ in range(setting.stores)]
        self.is_flushing, self.waits = [False] * setting.stores, list[float]()
        self.locks = [Places() for _ in range(setting.instances)]
        names, ids = NAMES[: setting.stores], [f"order-{number}" for number in range(setting.instances)]
        self.store_of = [names.index(place(each, names)) for each in ids]
        self.shares = list(itertools.accumulate((n + 1) ** -setting.skew for n in range(setting.instances)))
        for _ in range(setting.processes):
            self.begin()
        while len(self.waits) < setting.steps:
            self.now, _, do = heapq.heappop(self.events)
            do()
        self.waits.sort()
        self.per_second = 1000.0 * setting.steps / self.now

    def after(self, milliseconds: float, do: Do) -> None:
        heapq.heappush(self.events, (self.now + milliseconds, next(self.count), do))

    def after_about(self, mean: float, do: Do) -> None:
        self.after(self.random.expovariate(1 / mean) if mean else 0.0, do)

    def begin(self) -> None:
        chosen = bisect(self.shares, self.random.random() * self.shares[-1])
        think = partial(self.after_about, self.setting.think, partial(self.settle, chosen))
        (partial(self.commit, chosen, think) if self.setting.commits > 1 else think)()

    def settle(self, chosen: int) -> None:
        asked_at = self.now

        def settled() -> None:
            self.waits.append(self.now - asked_at)
            self.locks[chosen].leave()
            self.begin()

        self.locks[chosen].take(partial(self.commit, chosen, settled))

    def commit(self, chosen: int, do: Do) -> None:
        store = self.store_of[chosen]

        def worked() -> None:
            self.cores[store].leave()
            self.unflushed[store].append(do)
            if not self.is_flushing[store]:
                self.flush(store)

        self.cores[store].take(partial(self.after_about, self.setting.work, worked))

    def flush(self, store: int) -> None:
        together, self.unflushed[store] = self.unflushed[store], []
        self.is_flushing[store] = bool(together)

        def flushed() -> None:
            for do in together:
                do()
            self.flush(store)

        if together:
            self.after(self.setting.flush, flushed)


def main(**given: Any) -> None:
    setting, console = Setting(**given), Console(width=110)
    console.print(f"simulated, not measured: {setting}\n", highlight=False)
    table = Table("skew", "stores", "steps/s", "settle p50, ms", "p99, ms")
    for skew, stores in itertools.product(SKEWS, STORES):
        run = Run(replace(setting, skew=skew, stores=stores))
        p50, p99 = (run.waits[int(q * len(run.waits))] for q in (0.5, 0.99))
        table.add_row(f"{skew}", f"{stores}", f"{run.per_second:,.0f}", f"{p50:.1f}", f"{p99:.1f}")
    ids = Table("stores", "least, % of even", "most, %", "one store more: rehashed", "moved by the design")
    for stores in STORES:
        of = spread(stores, 100_000)
        ids.add_row(f"{stores}", f"{of.least:.1f}", f"{of.most:.1f}", f"{of.rehashed:,}", f"{of.moved:,}")
    console.print(table, ids)


if __name__ == "__main__":
    own = [each for each in fields(Setting) if each.name not in ("stores", "skew")]  # the table has all of these
    click.command(params=[click.Option([f"--{each.name}"], default=each.default) for each in own])(main)()
