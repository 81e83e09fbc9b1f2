"""Where instances are put among several stores, and found again (`docs/explanation/growth.md` has the design)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NAMES = [f"store-{number}" for number in range(9)]


def place(root_id: str, stores: Sequence[str]) -> str:
    """Return the store that ranks highest for an id (rendezvous hashing)."""
    return max(stores, key=lambda store: hashlib.blake2b(f"{store}\n{root_id}".encode(), digest_size=8).digest())


def find(root_id: str, epochs: Sequence[Sequence[str]], has: Callable[[str, str], bool]) -> str | None:
    """Return the store that has an instance: where the newest epoch puts it, or else an older one."""
    candidates = dict.fromkeys(place(root_id, stores) for stores in reversed(epochs))
    return next((store for store in candidates if has(store, root_id)), None)


@dataclass(frozen=True, slots=True)
class Spread:
    """Shares in percent of an even one; how many ids lie elsewhere once a store is added, hashed anew or found."""

    least: float
    most: float
    rehashed: int
    moved: int


def spread(stores: int, ids: int) -> Spread:
    old, new = NAMES[:stores], NAMES[: stores + 1]
    placed = {f"order-{number}": place(f"order-{number}", old) for number in range(ids)}
    shares = [100.0 * count * stores / ids for count in Counter(placed.values()).values()]
    rehashed = sum(place(each, new) != store for each, store in placed.items())
    found = {each: find(each, (old, new), lambda store, each: placed[each] == store) for each in placed}
    return Spread(min(shares), max(shares), rehashed, sum(found[each] != placed[each] for each in placed))
