"""What a revoke tells the result backend at once, and what is left for the end of an instance to tell.

Where a task is revoked before a worker has begun with it, and where its message is dropped, Celery has the result
backend say so.  Of an instance that is recorded it would say too much: it is yet to be undone, or declines.  Which ids
are those of instances the store knows, for which whoever takes the revoke must not wait.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

from celery import states
from celery.backends.base import DisabledBackend

from orchestrator.runtime.dispatch import START_HEADER

Leave = Callable[[str], None]
_leave: weakref.WeakKeyDictionary[Any, Leave] = weakref.WeakKeyDictionary()


def leave_to(app: Any, leave: Leave) -> None:
    """Give ``leave`` the ids that Celery would mark for having been revoked; it looks them up, and marks the others."""
    _leave[app] = leave


class BackendOfStarts:
    """The result backend of an app for a workflow's start task, whose end is not the workflow's."""

    def __init__(self, app: Any, backend: Any) -> None:
        self._app = app
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, **options: Any) -> None:
        """Mark it unless it is recorded; with a request its message was dropped, without one a revoke names it."""
        leave = _leave.get(self._app)
        if request is None and leave is not None:
            leave(task_id)
        elif getattr(request, START_HEADER, None) is None:
            self._backend.mark_as_revoked(task_id, reason, request=request, **options)


class _Unread:
    """The result backend of an app that is not to be asked now, only to be told later."""

    def __init__(self, backend: Any, leave: Leave) -> None:
        self._backend = backend
        self._leave = leave

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def get_state(self, _task_id: str) -> str:
        return str(states.PENDING)

    def mark_as_revoked(self, task_id: str, *_args: Any, **_options: Any) -> None:
        self._leave(task_id)


class _App:
    """A Celery app with another result backend."""

    def __init__(self, app: Any, backend: Any) -> None:
        self._app = app
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)


def leaving_marks(state: Any) -> Any:
    """Return what a control command is given of its worker, such that it leaves to us what to mark as revoked."""
    leave = _leave.get(state.app)
    if leave is None:
        return state
    seen = copy.copy(state)
    seen.app = _App(state.app, _Unread(state.app.backend, leave))
    return seen


def mark_revoked(backend: Any, task_id: str) -> None:
    """Mark a task as Celery does that was revoked: unless it has ended, or its worker has told of it."""
    if isinstance(backend, DisabledBackend):
        return
    if backend.get_state(task_id) in (states.PENDING, states.RECEIVED, states.RETRY, states.REJECTED):
        backend.mark_as_revoked(task_id, reason="revoked", store_result=True)
