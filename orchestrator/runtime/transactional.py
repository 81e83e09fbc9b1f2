"""Tasks whose writes commit together with their result: ``@orchestrator.activity(transactional=True)``.

The body is given a session on a write transaction of the store.  When it has returned, the step is settled in that same
transaction: the instance is locked, the claim read again, the outcome written, and then all of it commits or none.  So
an attempt that is killed, or that was given up meanwhile, leaves nothing; one that settled took effect exactly once.

What rolls the transaction back without the body having had a say (a deadlock, a lost connection) leaves nothing either,
so the body is run again.  Only a COMMIT to which no answer came may have taken effect: that is read back first.

On SQLite the transaction is a ``BEGIN IMMEDIATE``: while the body runs, nobody else writes to the store.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from celery.local import PromiseProxy, Proxy
from sqlalchemy import Connection, exc, text

from orchestrator.core.attempts import AttemptSucceeded
from orchestrator.errors import ConfigurationError, TransactionEnded
from orchestrator.runtime.change import Change, Outbox
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import Dispatcher, begins_step
from orchestrator.runtime.logs import about
from orchestrator.store.engine import Store, is_rolled_back, is_transient
from orchestrator.store.history import HistoryRow

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

T = TypeVar("T")

logger = logging.getLogger("orchestrator")

#: The parameter by which a body gets its session.
SESSION = "session"
#: What the transactions of bodies are for, in logs and statistics.
PURPOSE = "transactional"

_session: ContextVar[Session | None] = ContextVar("orchestrator_session", default=None)


class GivenUp(Exception):
    """The attempt holds its claim no longer; what its body wrote is rolled back."""


class BodyRaised(Exception):
    """Carries what a body raised out of its transaction, so that it is never taken for an error of ours."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Committed:
    """A step that took effect: what its body returned, and what was written with it."""

    result: Any
    ended: AttemptSucceeded
    change: Change


class TransactionalBodies:
    """Runs the bodies of transactional tasks, on a store whose connections are theirs alone."""

    def __init__(self, store: Store, coordinator: Coordinator) -> None:
        self.store = store
        self.coordinator = coordinator

    def run_step(self, row: HistoryRow, body: Callable[..., Any], encode: Callable[[Any], str]) -> Committed:
        """Run the body of a step that was claimed, and settle it in the same transaction.

        Raises what the body raised, its writes rolled back and nothing settled; or ``GivenUp``.
        """
        tried: Committed | None = None

        def once() -> Committed | BodyRaised:
            nonlocal tried
            if tried is not None and self.coordinator.has_written(row.key, tried.change):
                return tried  # the answer to the COMMIT before was lost: all of it is in the store already
            tried = None
            try:
                with self.store.begin(PURPOSE) as connection:
                    tried = self._run_and_settle(connection, row, body, encode)
            except BodyRaised as raised:
                return raised
            return tried

        outcome = self.store.retrying(once, patience_seconds=self.coordinator.settings.store_patience)
        return _or_raise(outcome)

    def _run_and_settle(
        self, connection: Connection, row: HistoryRow, body: Callable[..., Any], encode: Callable[[Any], str]
    ) -> Committed:
        # at the beginning too: an attempt that was given up while it waited for the database must not run its body
        if not self.coordinator.is_held(connection, row.key, row.attempt):
            raise GivenUp
        result, ended = self._run(connection, row.name, lambda session: _encoded(body, session, encode))
        change = self.coordinator.end_inside(connection, row.key, row.attempt, ended)
        if change is None:
            raise GivenUp
        return Committed(result, ended, change)

    def run_alone(self, name: str, body: Callable[..., Any]) -> Any:
        """Run a body that is no step in a transaction that commits when it returns, or in the one that is open."""
        joined = _session.get()
        if joined is not None:  # called as a function by another transactional task: part of what that one does
            return body(session=joined)

        def once() -> Any:
            try:
                with self.store.begin(PURPOSE) as connection:
                    return self._run(connection, name, lambda session: body(session=session))
            except BodyRaised as raised:
                return raised

        return _or_raise(once())

    def _run(self, connection: Connection, name: str, body: Callable[[Session], T]) -> T:
        """Call a body inside an open transaction, which is whole, and still open, if this returns.

        Raises ``BodyRaised``, or as it is an error by which the database rolled the transaction back.
        """
        noted: list[exc.DBAPIError] = []
        connection.execution_options(orchestrator_errors=noted)
        root = connection.get_transaction()
        # what the body commits or rolls back is a savepoint: the transaction is not its to end
        from sqlalchemy.orm import Session  # late: only those who use it need the memory that it takes

        session = Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
        try:
            with self.store.lent(), _as_open(session):
                result = body(session)
            _raise_rolled_back(noted)  # the body may have swallowed it, and its writes before it are gone
            session.commit()
        except BaseException as error:
            with suppress(exc.SQLAlchemyError):
                session.close()
            if any(error is each for each in noted) or isinstance(error, exc.PendingRollbackError):
                _raise_rolled_back(noted)
            if self._has_ended(connection, root):
                raise BodyRaised(TransactionEnded(name)) from error
            raise BodyRaised(error) from error
        session.close()
        if self._has_ended(connection, root):
            raise BodyRaised(TransactionEnded(name))
        _check_usable(connection, noted)
        return result

    def _has_ended(self, connection: Connection, root: Any) -> bool:
        """Tell whether the body reached past its session and ended the transaction, with what it wrote before."""
        if connection.closed or not root.is_active:
            return not connection.invalidated  # a lost connection has taken everything back
        # SQLite rolls back by itself when the disk is full, and would commit each later statement for itself
        return self.store.is_sqlite and not getattr(connection.connection.dbapi_connection, "in_transaction", True)


def follow(coordinator: Coordinator, dispatcher: Dispatcher, outbox: Outbox) -> None:
    """Publish what a settlement brought about, and make the pass that it left owed, if its workflow is known here."""
    own = [owed for owed in outbox.owes_pass if coordinator.workflows.knows(owed.workflow)]
    outbox.owes_pass = [owed for owed in outbox.owes_pass if owed not in own]
    dispatcher.deliver(outbox)
    for owed in own:
        try:
            following = coordinator.advance(owed.id, owed.generation)
        except Exception as error:
            if not is_transient(error):
                raise
            # it is settled, and the pass recorded as owed: the task must not fail for what comes after it
            logger.warning(
                "%s: the pass after its step is left to the poller: %r", owed.id, error, extra=about(owed.id)
            )
        else:
            dispatcher.deliver(following)


# --- tasks --------------------------------------------------------------------------------------------------------


def open_when_made(task: Any, app: Any, bodies: Callable[[], TransactionalBodies]) -> None:
    """Open a task up as soon as there is one: a decorator may be given the promise of a task."""
    if isinstance(task, PromiseProxy):
        # before anybody can call it: ``.delay()`` alone does not finalize the app
        task.__then__(open_up, task, bodies)
    elif not isinstance(task, Proxy):
        open_up(task, bodies)
    elif app.finalized:  # a shared task has one of its kind in every app, made when that is finalized
        open_up(app.tasks[task.name], bodies)


def open_up(task: Any, bodies: Callable[[], TransactionalBodies]) -> None:
    """Have a task given its session by us instead of by its callers; doing it twice is doing it once."""
    body = task.run
    if getattr(body, "is_transactional", False):
        return
    _check_takes_session(task)
    from sqlalchemy.orm import Session

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        # who calls the task as a function may have a session of his own
        if isinstance(kwargs.get(SESSION), Session) or begins_step(task.request):
            return body(*args, **kwargs)
        return bodies().run_alone(task.name, functools.partial(body, *args, **kwargs))

    run.is_transactional = True  # type: ignore[attr-defined]
    task.run = run
    _leave_out_session(task)


def _check_takes_session(task: Any) -> None:
    parameters = list(inspect.signature(task.run).parameters.values())
    kinds = {parameter.name: parameter.kind for parameter in parameters}
    by_position = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if kinds.get(SESSION) is inspect.Parameter.KEYWORD_ONLY or by_position[-1:] == [SESSION]:
        return
    raise ConfigurationError(
        f"{task.name} is declared transactional, and its function takes no argument {SESSION!r} that can be given by "
        f"name, after all others: write def {task.name.rpartition('.')[2]}(…, *, {SESSION})"
    )


def _leave_out_session(task: Any) -> None:
    """Let Celery check the arguments of a call without the one that callers do not give."""
    header = getattr(task, "__header__", None)
    if header is None:
        return

    def checked(*args: Any, **kwargs: Any) -> None:
        if SESSION in kwargs:
            raise TypeError(f"{task.name} is transactional: it is given its {SESSION}, leave it out of the call")
        header(*args, **kwargs, session=None)

    task.__header__ = checked


# --- a body and its transaction -----------------------------------------------------------------------------------


def _encoded(body: Callable[..., Any], session: Session, encode: Callable[[Any], str]) -> tuple[Any, AttemptSucceeded]:
    """Call the body; what it returned is encoded while it can still fail the attempt, and be rolled back with it."""
    result = body(session=session)
    session.flush()  # a returned object may have its primary key only now
    return result, AttemptSucceeded(encode(result))


@contextmanager
def _as_open(session: Session) -> Iterator[None]:
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


def _raise_rolled_back(noted: list[exc.DBAPIError]) -> None:
    for error in noted:
        if is_rolled_back(error):
            raise error


def _check_usable(connection: Connection, noted: list[exc.DBAPIError]) -> None:
    """Find a transaction that an error has spoilt, though the body went on.

    PostgreSQL takes the COMMIT of such a one, and rolls back.
    """
    if not noted:
        return
    try:
        connection.execute(text("SELECT 1"))
    except exc.DBAPIError as error:
        _raise_rolled_back([error])
        raise BodyRaised(noted[0]) from error


def _or_raise(outcome: T | BodyRaised) -> T:
    if isinstance(outcome, BodyRaised):
        raise outcome.error
    return outcome
