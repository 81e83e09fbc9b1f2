"""Which workers live, as far as somebody can tell who looks once.

Whoever was killed last is given up by nobody, and its row goes on saying that it lives.  What beat lately by this
host's clock is believed; of the others, with a clock that is wrong or dead, another look tells whether the beat moved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from orchestrator.store import workers
from orchestrator.store.engine import Store
from orchestrator.store.workers import Worker


@dataclass(frozen=True, slots=True)
class Liveness:
    """Workers that beat, those of them whose clock differs and by how much, and workers that no longer do."""

    beating: tuple[Worker, ...]
    skewed: tuple[tuple[Worker, timedelta], ...]
    silent: tuple[Worker, ...]


def list_recent(store: Store, seconds: float) -> list[Worker]:
    """Return the workers that beat within the last ``seconds``, by this host's clock."""
    recent = timedelta(seconds=seconds)
    return [each for each in _list_workers(store) if abs(datetime.now(UTC) - each.beat_at) <= recent]


def look(store: Store, heartbeat_limit: float) -> Liveness:
    """Tell which workers live; takes up to a fifth of the limit (in seconds) longer if there is a doubt."""
    known, here = _list_workers(store), datetime.now(UTC)
    recent = timedelta(seconds=heartbeat_limit / 3)
    doubtful = {each.incarnation: each for each in known if abs(here - each.beat_at) > recent}
    beating = [each for each in known if each.incarnation not in doubtful]
    if not doubtful:
        return Liveness(tuple(beating), (), ())
    time.sleep(heartbeat_limit / 5 + 0.5)
    again, here = {each.incarnation: each for each in _list_workers(store)}, datetime.now(UTC)
    # one that has been given up meanwhile is listed no more
    alive = [own for name, own in again.items() if name in doubtful and own.beat != doubtful[name].beat]
    silent = [own for name, own in again.items() if name in doubtful and own.beat == doubtful[name].beat]
    return Liveness((*beating, *alive), tuple((each, each.beat_at - here) for each in alive), tuple(silent))


def _list_workers(store: Store) -> list[Worker]:
    with store.read("liveness") as connection:
        return workers.list_workers(connection)
