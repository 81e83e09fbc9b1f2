"""Plain Celery tasks that exist if the caller's transaction commits: recorded by it, published afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.canvas import Signature, chunks, maybe_signature
from celery.result import AsyncResult
from celery.utils.time import maybe_make_aware
from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import codec, errors
from orchestrator.runtime import callers, running
from orchestrator.runtime.dispatch import check_arguments
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.transactions import Clock
from orchestrator.store import outbox
from orchestrator.store.engine import Store
from orchestrator.store.outbox import Enqueued

if TYPE_CHECKING:
    from orchestrator.runtime.callers import CallersSession

logger = logging.getLogger("orchestrator")

#: How many tasks one poll takes on.
BATCH = 200
#: Between attempts at one task that cannot be published: four times as long each, at most an hour.
BACKOFF, LONGEST_SECONDS = 4, 3600.0
#: For so long after the broker was found away, commits leave it to the poller: each would wait for it again.
AWAY_SECONDS = 2.0
#: A row that stays behind after its message is sent again; the store is given so long to take it away.
DELETE_PATIENCE_SECONDS = 5.0


class Enqueuer:
    """Records tasks in callers' transactions, and publishes them."""

    def __init__(self, app: Celery, store: Store, settings: Settings, clock: Clock) -> None:
        self.app = app
        self.store = store
        self.settings = settings
        self.clock = clock
        self._away_until = 0.0

    # --- in the caller's transaction ------------------------------------------------------------------------------

    def enqueue(self, signature: Any, session: CallersSession) -> AsyncResult:
        """Record a task in the caller's transaction; see ``Orchestrator.enqueue``."""
        checked = _check_signature(signature, self.app)
        running.check_outside_of_passes(checked.task)
        result, text = self._freeze(checked)
        now = self.clock()
        # until then it is the commit's own to publish; what is not told of its commit is due at once
        grace = self.settings.publish_grace if callers.tells_of_commits(session) else 0.0
        with callers.writing(session, self.store) as connection:
            entry = outbox.insert_enqueued(connection, str(result.id), text, now, now + timedelta(seconds=grace))
        callers.after_commit(session, lambda: self._publish_committed(entry))
        return result

    def _freeze(self, signature: Signature) -> tuple[AsyncResult, str]:
        """Return the result of a task, and its signature as text with all that is decided by now: ids and instants."""
        what = f"the signature of {signature.task}"
        # through its text: a copy that shares nothing with the caller's
        copy = self._read(codec.encode(signature, what))
        for each in _sent_at_once(copy):
            self._fix_instants(each.options)
            self._check_call(each)
        parent = self.app.current_worker_task
        if parent:
            # by then it may be another process that sends it
            ids = {"root_id": parent.request.root_id or parent.request.id, "parent_id": parent.request.id}
            copy.set(**{**ids, **copy.options})
        result: AsyncResult = copy.freeze()
        return result, codec.encode(copy, what, self.settings.max_payload_bytes)

    def _fix_instants(self, options: dict[str, Any]) -> None:
        """Count a countdown, and an expiry in seconds, from the call as Celery would, and not from the commit."""
        countdown, expires = options.pop("countdown", None), options.get("expires")
        if countdown:
            options["eta"] = self._later(countdown)
        if isinstance(expires, int | float):
            options["expires"] = self._later(expires)

    def _later(self, seconds: float) -> datetime:
        later: datetime = maybe_make_aware(self.app.now() + timedelta(seconds=seconds), tz=self.app.timezone)
        return later

    def _check_call(self, signature: Signature) -> None:
        """Refuse arguments that the task's message would be refused for when it is sent."""
        task = self.app.tasks.get(signature.task)
        if task is None or signature.subtask_type is not None:
            return
        if getattr(task, "is_workflow", False):
            task.encode_input(tuple(signature.args), signature.kwargs)
            return
        try:
            check_arguments(task, signature.args, signature.kwargs)
        except TypeError as error:
            raise errors.InputMismatch(signature.task, str(error)) from error

    def _read(self, text: str) -> Signature:
        return maybe_signature(codec.decode(text), app=self.app)

    # --- publishing -----------------------------------------------------------------------------------------------

    def publish_due(self) -> None:
        """Publish what was committed and not published: the process ended in between, or the broker was away."""
        with self.store.read("due-enqueued") as connection:
            entries = outbox.list_due_enqueued(connection, self.clock(), BATCH)
        for entry in entries:
            try:
                self._publish(entry)
            except (OSError, KombuError, SQLAlchemyError):
                raise  # the others would fail alike
            except Exception:
                logger.exception("the enqueued task %s could not be published, will be tried again", entry.task_id)

    def _publish_committed(self, entry: Enqueued) -> None:
        if time.monotonic() < self._away_until:
            return
        try:
            self._publish(entry)
        except (OSError, KombuError) as error:
            self._away_until = time.monotonic() + AWAY_SECONDS
            logger.warning("%s is enqueued, but could not be published; the poller will: %r", entry.task_id, error)

    def _publish(self, entry: Enqueued) -> None:
        again = self.clock() + timedelta(seconds=self._backoff(entry.attempts))
        # the next time is committed first, and the message is published with no lock held; nor is anything published
        # whose row was rolled back after all
        with self.store.begin("publish-enqueued") as connection:
            text = outbox.take_enqueued(connection, entry, again)
        if text is None:
            return
        try:
            self._send(self._read(text))
        except (OSError, KombuError):
            soon = self.clock() + timedelta(seconds=self.settings.publish_grace)
            with self.store.begin("publish-enqueued") as connection:
                outbox.take_back_enqueued(connection, entry, again, soon)
            raise
        self.store.retrying(lambda: self._delete(entry), patience_seconds=DELETE_PATIENCE_SECONDS)

    def _send(self, signature: Signature) -> None:
        try:
            self._check_call(signature)
        except errors.InvalidInput:  # a deploy changed the task since: running it will say what is wrong
            self.app.send_task(signature.task, signature.args, signature.kwargs, **signature.options)
        else:
            signature.apply_async()

    def _delete(self, entry: Enqueued) -> None:
        with self.store.begin("enqueued") as connection:
            outbox.delete_enqueued(connection, entry.id)

    def _backoff(self, attempts: int) -> float:
        return float(min(LONGEST_SECONDS, self.settings.publish_grace * BACKOFF ** min(attempts, 20)))


def _check_signature(signature: Any, app: Celery) -> Signature:
    """Refuse what is no signature of a plain task or of a canvas."""
    if not isinstance(signature, Signature):
        raise errors.InvalidOperation(f"enqueue takes a signature, such as task.s(…), and not {signature!r}")
    if getattr(app.tasks.get(signature.task), "is_workflow", False):
        raise errors.InvalidOperation(f"{signature.task} is a workflow: start it with orchestrator.start(…, session=…)")
    # chunks draw the ids of their parts only when they are applied
    return signature.group() if isinstance(signature, chunks) else signature


def _sent_at_once(signature: Signature) -> Iterator[Signature]:
    """Yield a signature and those in it that are sent with it; the others are sent by what comes before them."""
    yield signature
    match signature.subtask_type:
        case "group":
            members = list(signature.tasks)
        case "chain":
            members = list(signature.tasks)[:1]
        case "chord":
            header = signature.kwargs["header"]
            members = [header] if isinstance(header, Signature) else list(header)
        case _:
            members = []
    for member in members:
        yield from _sent_at_once(member)
