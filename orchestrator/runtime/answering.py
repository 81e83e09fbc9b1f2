"""Whether a result backend answers, asked in the way that costs least; of most kinds nothing is known of one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def find_ping(backend: Any) -> Callable[[], object] | None:
    """Return what raises where a backend does not answer, ``None`` if there is no cheap way to ask it."""
    kind = {each.__name__ for each in type(backend).__mro__}
    if "RedisBackend" in kind:
        return lambda: backend.client.ping()  # making the client may raise as well
    if "DatabaseBackend" in kind:
        return lambda: _connect(backend)
    return None


def _connect(backend: Any) -> None:
    # not by a session of the backend's, which makes its tables
    from celery.backends.database.session import SessionManager

    engine = SessionManager().get_engine(backend.url, **backend.engine_options)
    with engine.connect():
        pass
    engine.dispose()


def ask(ping: Callable[[], object], seconds: float) -> Exception | None:
    """Return why there is no answer within ``seconds``, ``None`` if there is one; drivers wait for longer than that."""
    found: list[Exception] = []

    def run() -> None:
        try:
            ping()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="orchestrator-ping", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"no answer within {seconds:g} s")
    return found[0] if found else None
