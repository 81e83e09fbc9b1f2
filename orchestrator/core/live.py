"""A workflow function that stands where it waits, and goes on from there.

``decide()`` runs the function from the top every time, so a pass costs as much as the history is long.  A live pass
keeps the suspended function, and goes on when more has come in: it costs as much as what is new.  What it decides is
exactly what ``decide()`` would over the whole history, which stays the truth: a live pass may be let go at any time,
and must be whenever what it decided was not written.  The idea is the sticky execution of Cadence and Temporal, whose
workers keep a workflow in memory and replay it only where they have lost it.

The function runs in a greenlet of its own, a coroutine that can stop in any depth of plain calls, so that workflow code
is what it always was.  To know of it:

* What the function holds over a wait (a file, a connection, a patched module) it holds until it goes on or is let go,
  and is met there by all else that the thread does meanwhile; who wants its lock then waits for ever.  A replay gives
  all that back at the end of each pass.
* The greenlet has a context of its own.  Context variables of the caller are there whenever it goes on, those that the
  function has set stay until it has ended, and none of these is seen outside.
* It belongs to the thread that made it.
* Nobody but ``let_go`` ends it: the function holds the pass, which holds the greenlet, and that is not garbage as long
  as it stands.  So no ``finally`` runs when the collector happens to come by; but what is forgotten stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context as Variables
from contextvars import ContextVar, Token, copy_context
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet

from orchestrator.core.context import Context
from orchestrator.core.host import Host
from orchestrator.core.news import CannotGoOn, check_news
from orchestrator.core.passes import Pass
from orchestrator.core.records import Decision, Ending, Event, History, Record, Waiting
from orchestrator.core.replay import conclude, run_function

__all__ = ["CannotGoOn", "LivePass"]


@dataclass(frozen=True, slots=True)
class _Raised:
    """What came out of the function that is none of the ways in which a pass ends."""

    error: BaseException


class LivePass:
    """A pass that can go on after it was suspended.

    Not for use by several threads, nor by several greenlets at a time.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        history: History,
        host: Host,
    ) -> None:
        self._call = function, args, kwargs
        self._pass = Pass(history, host)
        self._context = Context(self._pass, function)
        self._pass.park = self._park
        self._greenlet: Any = None
        self._thread = _main_greenlet()
        self._surroundings = _Surroundings()
        self._waiting: Waiting | None = None  # while it stands
        self._last: Decision | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it can go on: the last it decided was to wait."""
        return self._last is not None and self._waiting is not None

    def decide(self) -> Decision:
        """Run the function over the history, as ``decide()`` does; asked for once."""
        if self._greenlet is not None:
            raise CannotGoOn("the pass has begun already")
        self._thread = _main_greenlet()
        self._greenlet = greenlet(self._run)
        return self._proceed()

    def go_on(self, changed: Sequence[Record], events: Sequence[Event], *, passed_order: int | None) -> Decision:
        """Go on with what has come in since, and return what ``decide()`` would over the whole history.

        ``changed`` are the records that it does not know, or not as they are now, by ``seq``: among them all that its
        last decision asked for or changed, as they were written.  ``events`` are those of the inbox that it was not
        given yet, by ``order``; its own withdrawals may be among them.  ``passed_order`` is the last event that an
        earlier pass knew of, as in ``History.seen_order``.

        Raises ``CannotGoOn`` where it does not stand in this thread, and where what has come in does not follow from
        what it has decided; then it has let go, and the whole history has to be replayed.
        """
        if self._last is None or self._waiting is None:
            raise CannotGoOn("it does not stand at a wait")
        if self._thread is not _main_greenlet():
            raise CannotGoOn("it stands in another thread, and can go on only there")
        try:
            news = check_news(self._pass, self._last, changed, events)
        except CannotGoOn:
            self.let_go()
            raise
        self._pass.go_on(changed, news, passed_order)
        return self._proceed()

    def let_go(self) -> None:
        """End the function where it stands; nothing that it still does has any effect.

        The suspension of the pass is raised at its wait, and sticks, so ``finally`` blocks run; whatever they raise is
        dropped.  In another thread than its own nothing happens: it would have to be ended there.
        """
        if self._waiting is None or self._thread is not _main_greenlet():
            return
        self._pass.ending, self._last = self._waiting, None
        with suppress(BaseException):
            self._switch(None)
        self._pass.forget()

    # --- inside and outside of the greenlet ---------------------------------------------------------------------------

    def _proceed(self) -> Decision:
        self._last = None
        came = self._switch(copy_context())
        if isinstance(came, _Raised):
            raise came.error
        decision = conclude(self._pass, self._context, came)
        if isinstance(decision.ending, Waiting) and not self._pass.has_completed:
            self._last = decision
        else:
            self.let_go()  # what has diverged may stand at a wait
            self._pass.forget()
        return decision

    def _switch(self, variables: Variables | None) -> Any:
        # the caller may be in another greenlet than the one before it, as under gevent
        self._greenlet.parent = getcurrent()
        return self._greenlet.switch(variables)

    def _run(self, variables: Variables) -> Ending | _Raised:
        function, args, kwargs = self._call
        self._surroundings.enter(variables)
        try:
            return run_function(self._pass, self._context, function, args, kwargs)
        except BaseException as error:
            return _Raised(error)

    def _park(self, waiting: Waiting) -> None:
        if getcurrent() is not self._greenlet:  # it was called in a greenlet that workflow code has made itself
            self._pass.stop(waiting)
        self._waiting = waiting
        try:
            variables = self._greenlet.parent.switch(waiting)
        finally:
            self._waiting = None
        if variables is None:
            self._pass.stop(waiting)
        self._surroundings.enter(variables)


def _main_greenlet() -> Any:
    """Return what stands for the present thread; its number may be that of a greenlet, where gevent has patched it."""
    main = getcurrent()
    while main.parent is not None:
        main = main.parent
    return main


class _Surroundings:
    """The context variables of whoever lets a pass go on, as the function sees them.

    All that happens in the context of the function itself, which stays the same throughout, so that a token it has got
    before a wait is good after it.
    """

    def __init__(self) -> None:
        self._given: dict[ContextVar[Any], Any] = {}
        self._tokens: dict[ContextVar[Any], Token[Any]] = {}

    def enter(self, variables: Variables) -> None:
        """Set what the caller has set since; what it has left alone is as the function left it."""
        given = dict(variables.items())
        for variable, value in given.items():
            if variable not in self._given or self._given[variable] is not value:
                token = variable.set(value)
                if token.old_value is Token.MISSING:
                    self._tokens[variable] = token
        for variable in self._given.keys() - given.keys():
            token_or_none = self._tokens.pop(variable, None)
            if token_or_none is not None and variable.get(None) is self._given[variable]:
                variable.reset(token_or_none)
        self._given = given
