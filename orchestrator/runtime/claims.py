"""Claiming steps for the processes of this worker."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from orchestrator.runtime.executing import Executing, token_of
from orchestrator.runtime.notices import Notice
from orchestrator.runtime.observing import Observers
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.transactions import Clock, utc_now
from orchestrator.store import claiming, history, workers
from orchestrator.store.claiming import Claimant, Held
from orchestrator.store.engine import Store
from orchestrator.store.history import StepKey


class Claims:
    """Takes steps under the worker's incarnation."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        executing: Executing,
        clock: Clock = utc_now,
        observers: Observers | None = None,
    ) -> None:
        self.store = store
        self.settings = settings
        self.state = executing
        self.clock = clock
        self.observers = observers

    @contextmanager
    def executing(self, key: StepKey, dispatch: int) -> Iterator[None]:
        """Tell the worker that this process works on an attempt: before it is claimed, until it is settled."""
        token = token_of(key, dispatch)
        self.state.begin(token)
        try:
            yield
        finally:
            self.state.end(token)

    def claim(self, key: StepKey, name: str, dispatch: int, compensation: str | None) -> Held | None:
        """Claim a step of the task ``name``; ``None`` where it is not to be had, or this worker has been given up."""
        if not self.beat_first():
            return None
        claimant = Claimant(self.state.incarnation, os.getpid())
        tried_at: set[datetime] = set()
        told: list[Notice] = []

        def once() -> Held | None:
            # one statement, which needs no transaction around it where nothing else is written
            is_alone = self.observers is None or not self.observers.owes_notices
            with self.store.begin("claim", locks_late=is_alone) as connection:
                row = history.find_row(connection, key) if tried_at else None
                own = (claimant.incarnation, claimant.process)
                if row is not None and row.dispatch == dispatch and any(row.is_held_by(*own, at) for at in tried_at):
                    # the answer to the COMMIT before was lost: the claim is held already, by this very call
                    return Held(row)
                now = self.clock()
                tried_at.add(now)
                claimed = claiming.claim(connection, key, name, dispatch, claimant, now, compensation)
                if claimed is not None and self.observers is not None:
                    told[:] = self.observers.note_claim(connection, claimed.row, now)
                return claimed

        held = self.store.retrying(once, patience_seconds=self.settings.store_patience)
        if held is not None and self.observers is not None:
            self.observers.tell(told)
        return held

    def beat_first(self) -> bool:
        """Beat, where the worker's last beat is old, before a step is begun; ``False``: the worker was given up."""
        limit = self.settings.heartbeat_limit
        deadline = time.monotonic() + limit
        while self.state.seconds_since_beat > limit / 2:
            incarnation = self.state.incarnation
            if incarnation and self._beat(incarnation):
                self.state.note_beat(incarnation)
                return True
            # given up (or not begun): its parent starts afresh as soon as it beats itself
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _beat(self, incarnation: str) -> bool:
        def once() -> bool:
            with self.store.begin("beat") as connection:
                return workers.beat(connection, incarnation, self.clock())

        return self.store.retrying(once, patience_seconds=self.settings.store_patience)
