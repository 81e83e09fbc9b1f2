"""Who looks dead: a heartbeat that this process saw unchanged for the whole limit, by its own monotonic clock.

An observer that could not read for a while (its database was away, it was frozen itself) has seen nothing of the others
in that time, and begins to observe anew: otherwise every outage would make everybody look dead.
"""

from __future__ import annotations


class Observer:
    """Remembers when each heartbeat was first seen as it is."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._longest_gap = limit_seconds / 2
        self._seen: dict[str, tuple[int, float]] = {}
        self._read_at: float | None = None

    def list_stale(self, beats: dict[str, int], now: float) -> dict[str, int]:
        """Take notice of ``beats``, read at ``now`` (monotonic); return those unchanged for the whole limit."""
        if self._read_at is None or now - self._read_at > self._longest_gap:
            self._seen.clear()
        self._read_at = now
        for incarnation, beat in beats.items():
            if self._seen.get(incarnation, (None, 0.0))[0] != beat:
                self._seen[incarnation] = (beat, now)
        self._seen = {incarnation: seen for incarnation, seen in self._seen.items() if incarnation in beats}
        return {i: beat for i, (beat, since) in self._seen.items() if now - since > self._limit}
