"""The store in one of Django's databases: its URL, from what ``settings.DATABASES`` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL

from orchestrator.errors import ConfigurationError
from orchestrator.runtime.django_connection import find_driver

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
