"""A monitor for tests, which keeps what Flower keeps."""

from __future__ import annotations

import threading
from typing import Any

from celery.events import EventReceiver
from celery.events.state import State

from tests.waiting import wait_until


class Watcher:
    """A monitor: it keeps what Flower keeps, and every state it saw."""

    def __init__(self, app: Any) -> None:
        self.state = State()
        self.states: dict[str, list[str]] = {}
        self.seen: list[str] = []
        self._connection = app.connection_for_read()
        self._receiver = EventReceiver(self._connection, handlers={"*": self._on_event}, app=app)
        self._thread = threading.Thread(target=self._receiver.capture, kwargs={"limit": None}, daemon=True)
        self._thread.start()

    def _on_event(self, event: dict[str, Any]) -> None:
        self.state.event(event)
        self.seen.append(repr(event))
        if "uuid" in event:
            states = self.states.setdefault(event["uuid"], [])
            now = self.state.tasks[event["uuid"]].state
            if not states or states[-1] != now:
                states.append(now)

    def wait(self, task_id: str, state: str) -> Any:
        wait_until(lambda: self.states.get(task_id, [""])[-1] == state, f"{task_id} being {state} ({self.states})")
        return self.state.tasks[task_id]

    def stop(self) -> None:
        self._receiver.should_stop = True
        self._thread.join(timeout=10)
        self._connection.release()
