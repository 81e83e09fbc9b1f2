"""Messages that a worker took from the broker and has not begun when it is told to stop.

Celery holds them until its last body has ended, which may take hours.  Ours go back to the queue at once.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from queue import Empty
from typing import Any

from orchestrator.runtime.dispatch import HEADER
from orchestrator.runtime.inputs import is_workflow

logger = logging.getLogger("orchestrator")

OWN = "orchestrator."
#: A Redis that does not answer must not keep a worker from ending.
ANSWER_SECONDS = 1.0


def list_unbegun(worker: Any) -> list[Any]:
    """Return the requests of ours that no process or thread of a worker has begun, as far as it knows."""
    state = worker.state
    held = {each.id: each for each in (*_list_scheduled(worker.timer), *list(state.requests.values()))}
    unbegun = [each for each in held.values() if each not in state.active_requests]
    return [each for each in unbegun if _is_own(each) and not each.acknowledged]


def _list_scheduled(timer: Any) -> list[Any]:
    """Return what waits for its countdown or eta; before Celery 5.7 nothing else knows of it."""
    waiting = [next(iter(each.entry.args or ()), None) for each in list(timer.schedule.queue)]
    return [each for each in waiting if hasattr(each, "request_dict")]


def give_back(requests: list[Any]) -> None:
    """Put the messages of ``requests`` back into their queues; called when the worker takes no more."""
    for request in requests:
        # one that begins at this moment meets its double: a step is claimed once, a pass made and an instance recorded
        request.message.reject_log_error(logger, request.connection_errors, requeue=True)
        request.acknowledged = True


def end_polling(connection: Any) -> None:
    """Take the answer to what was asked of Redis before the worker took no more; a message goes back to its queue.

    It would be the next message of the queue, for the worker asks for it ahead, and would look at it only when its
    last body has ended.
    """
    for channel in getattr(connection.transport, "channels", None) or ():
        polled = getattr(channel, "_in_poll", None)
        if not polled:
            continue
        with suppress(Empty, *connection.connection_errors):
            # kombu does the same when it closes the channel, and waits for as long as that takes
            if polled.can_read(timeout=(getattr(channel, "brpop_timeout", None) or 1) + ANSWER_SECONDS):
                channel._brpop_read()


def _is_own(request: Any) -> bool:
    return HEADER in request.request_dict or is_workflow(request.task) or request.task.name.startswith(OWN)
