"""Django within a test's own process: settings, and connections to databases that the test made."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import django
import pymysql  # type: ignore[import-untyped]
from django.conf import settings
from django.db import connections, transaction
from django.test.utils import override_settings
from sqlalchemy import make_url

_ENGINES = {"sqlite": "sqlite3", "postgresql": "postgresql", "mysql": "mysql"}

if not settings.configured:
    settings.configure(DATABASES={}, USE_TZ=True, TIME_ZONE="UTC")
    django.setup()


def _entry(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what settings.DATABASES has for a URL of SQLAlchemy's."""
    parsed = make_url(url)
    engine = _ENGINES[parsed.get_backend_name()]
    if engine == "sqlite3":
        options = {"timeout": 30, "transaction_mode": "IMMEDIATE", **options}
    return {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": parsed.database,
        "USER": parsed.username or "",
        "PASSWORD": parsed.password or "",
        "HOST": parsed.host or "",
        "PORT": str(parsed.port or ""),
        "OPTIONS": options,
    }


class Django:
    """Django's connections, by alias, for as long as the block lasts."""

    def __init__(
        self,
        urls: dict[str, str],
        *,
        options: dict[str, Any] | None = None,
        databases: dict[str, dict[str, Any]] | None = None,
        **own: Any,
    ) -> None:
        self._opened = {alias: _entry(url, options or {}) for alias, url in urls.items()}
        self._databases = {**self._opened, **(databases or {})}
        self._override = override_settings(**own)
        self.connections = connections

    def __enter__(self) -> Django:
        self._override.enable()
        known = "MySQLdb" in sys.modules
        pymysql.install_as_MySQLdb()
        connections.settings = connections.configure_settings({"default": {}, **self._databases})
        for alias in self._databases:
            connections[alias]
        for alias in self._opened:
            connections[alias].ensure_connection()
        if not known:  # SQLAlchemy is not to take it for mysqlclient
            del sys.modules["MySQLdb"]
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for alias in self._databases:
            connections[alias].close()
            del connections[alias]
        connections.settings = connections.configure_settings({})
        self._override.disable()

    @property
    def connection(self) -> Any:
        """This thread's."""
        return connections["default"]

    @property
    def is_postgresql(self) -> bool:
        return bool(self.connection.vendor == "postgresql")

    def atomic(self, using: str = "default", **options: Any) -> Any:
        return transaction.atomic(using, **options)

    def set_rollback(self) -> None:
        transaction.set_rollback(True)

    def set_autocommit(self, autocommit: bool) -> None:
        transaction.set_autocommit(autocommit)
