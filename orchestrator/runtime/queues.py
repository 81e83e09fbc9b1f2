"""How full queues are: only an empty one allows a first publication to be repeated early."""

from __future__ import annotations

import time

from amqp.exceptions import NotFound
from celery import Celery
from kombu.exceptions import ChannelError, KombuError

_FRESH_SECONDS = 1.0


class Queues:
    """Asks the broker, at most once a second for each queue."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._answers: dict[str, tuple[bool, float]] = {}

    def is_empty(self, name: str | None) -> bool:
        """Tell whether no message waits in the queue; ``False`` where the broker does not say."""
        if name is None:
            return False
        is_empty, read_at = self._answers.get(name, (False, -_FRESH_SECONDS))
        if time.monotonic() - read_at < _FRESH_SECONDS:
            return is_empty
        is_empty = self._ask(name)
        self._answers[name] = (is_empty, time.monotonic())
        return is_empty

    def _ask(self, name: str) -> bool:
        try:
            with self._app.connection_for_read() as connection, connection.channel() as channel:
                count: int = channel.queue_declare(queue=name, passive=True).message_count
                return count == 0
        except (NotFound, ChannelError):
            return True  # Redis keeps no empty lists, and a queue that does not exist holds nothing
        except (OSError, KombuError):
            return False
