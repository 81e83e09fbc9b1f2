"""The store in one of Django's databases: its URL, from what ``settings.DATABASES`` says, and how both write to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from sqlalchemy import URL, Connection

from orchestrator.errors import ConfigurationError, InvalidOperation
from orchestrator.runtime.django_connection import find_driver
from orchestrator.store.engine import Store

#: What ``OPTIONS`` has for Django or its driver and not for the server: our connections have settings of their own.
_DJANGOS_OWN = frozenset(
    {
        "assume_role",
        "charset",
        "client_encoding",
        "connect_timeout",
        "cursor_factory",
        "isolation_level",
        "pool",
        "prepare_threshold",
        "server_side_binding",
        "sql_mode",
        "use_unicode",
    }
)


#: For so long other processes may have the lock of an SQLite file, of which this thread has an open transaction.
_LOCK_SECONDS = 2.0


class SharedStore(Store):
    """A store in a database of Django's, whose own transactions it must not wait for where they wait for it."""

    def __init__(self, alias: str, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.alias = alias

    @contextmanager
    def begin(self, purpose: str, *, locks_late: bool = False) -> Iterator[Connection]:
        """Open a write transaction.  Raises ``InvalidOperation`` on SQLite where Django's own keeps it from ending."""
        if self.is_sqlite:
            self._check_unlocked()
        with super().begin(purpose, locks_late=locks_late) as connection:
            yield connection

    def _check_unlocked(self) -> None:
        from django.db import connections

        wrapper = connections[self.alias]  # this thread's
        if wrapper.in_atomic_block and (_locks_at_once(wrapper) or self._is_locked()):
            raise InvalidOperation(
                f"this is inside of transaction.atomic(), which keeps {self.describe()} locked, as SQLite has one "
                "writer at a time: give session=connection to what takes it, or do this when the block has ended, by "
                "transaction.on_commit()"
            )

    def _is_locked(self) -> bool:
        """Tell whether the file stays locked: a transaction of Django's locks it at its first write, untold."""
        with closing(
            sqlite3.connect(self.url.database or "", timeout=_LOCK_SECONDS, isolation_level=None)
        ) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            connection.execute("ROLLBACK")
            return False


def _locks_at_once(wrapper: Any) -> bool:
    # the setting is as old as Django 5.1
    return str(getattr(wrapper, "transaction_mode", None)).upper() in ("IMMEDIATE", "EXCLUSIVE")


def find_alias(store: str) -> str | None:
    """Return the alias of ``django`` and ``django:alias``, ``None`` for a store that is a URL of its own."""
    name, _, alias = store.partition(":")
    return (alias or "default") if name == "django" else None


def url_of(alias: str) -> str:
    """Return the SQLAlchemy URL of one of Django's databases; the test database while Django's tests run.

    Raises ``ConfigurationError`` if there is no such database, or none of a kind that a store can be on.
    """
    try:
        from django.db import connections
    except ImportError as error:
        raise ConfigurationError("the store is 'django', and Django is not installed") from error
    if alias not in connections:
        raise ConfigurationError(f"the store is one of Django's, and there is no settings.DATABASES[{alias!r}]")
    wrapper = connections[alias]
    driver, settings = find_driver(wrapper), wrapper.settings_dict
    if driver is None:
        raise ConfigurationError(
            f"the ENGINE of settings.DATABASES[{alias!r}] is {settings['ENGINE']!r}; a store can be on sqlite3, "
            "postgresql and mysql"
        )
    if wrapper.vendor == "sqlite":
        if wrapper.is_in_memory_db():
            raise ConfigurationError(
                f"the SQLite database {alias!r} of Django is in memory, and so one process's own; name a file, for "
                f"tests by settings.DATABASES[{alias!r}]['TEST'] = {{'NAME': BASE_DIR / 'test.sqlite3'}}"
            )
        url = URL.create(driver, database=str(settings["NAME"]))
    else:
        url = _server_url(driver, settings, wrapper.vendor)
    return url.render_as_string(hide_password=False)


def _server_url(driver: str, settings: Mapping[str, Any], vendor: str) -> URL:
    options = dict(settings["OPTIONS"])
    query = _flat({name: value for name, value in options.items() if name not in _DJANGOS_OWN})
    if "assume_role" in options:
        # the tables are to belong to whom Django's belong
        query["options"] = f"{query.get('options', '')} -c role={options['assume_role']}".strip()
    host, port = settings["HOST"] or None, settings["PORT"] or None
    if host and (host.startswith("/") or "," in host):  # the path of a socket, or several hosts, have no place in a URL
        query["host" if vendor == "postgresql" else "unix_socket"] = host
        if port and vendor == "postgresql":
            query["port"] = str(port)
        host = port = None
    return URL.create(
        driver,
        username=settings["USER"] or None,
        password=settings["PASSWORD"] or None,
        host=host,
        port=int(port) if port else None,
        database=str(settings["NAME"]) if settings["NAME"] else None,
        query=query,
    )


def _flat(options: Mapping[str, Any]) -> dict[str, str]:
    """Return options as a URL has them; those of MySQL's ``ssl`` are taken as ``ssl_ca``, ``ssl_key`` and so on."""
    flat: dict[str, str] = {}
    for name, value in options.items():
        match value:
            case bool():
                flat[name] = str(value).lower()
            case str() | int():
                flat[name] = str(value)
            case Mapping():
                flat |= {f"{name}_{key}": text for key, text in _flat(value).items()}
    return flat
