"""What a database tells of itself: its clock, its isolation, whether it takes what is written."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from sqlalchemy import Connection, insert, select, text

from orchestrator.store.tables import purged


def load_now(connection: Connection) -> datetime | None:
    """Return the database's own time; ``None`` where it has none: SQLite's is that of whoever asks."""
    match connection.dialect.name:
        case "postgresql":
            found: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
            return found.astimezone(UTC)
        case "mysql" | "mariadb":
            found = connection.execute(text("SELECT UTC_TIMESTAMP(6)")).scalar_one()
            return found.replace(tzinfo=UTC)
    return None


def load_version(connection: Connection) -> str:
    """Return name and version of the database."""
    version = ".".join(str(part) for part in connection.dialect.server_version_info or ())
    name = "mariadb" if getattr(connection.dialect, "is_mariadb", False) else connection.dialect.name
    return f"{name} {version}".strip()


def load_isolation(connection: Connection) -> str:
    """Return the isolation level of a transaction, or of SQLite the journal mode."""
    if connection.dialect.name == "sqlite":
        return str(connection.execute(text("PRAGMA journal_mode")).scalar_one()).upper()
    return str(connection.get_isolation_level())


def write_and_read(connection: Connection) -> bool:
    """Write a row and read it again; the caller rolls back."""
    name = f"doctor-{uuid.uuid4()}"
    connection.execute(insert(purged), {"instance_id": name, "purged_at": datetime.now(UTC)})
    return connection.execute(select(purged.c.instance_id).where(purged.c.instance_id == name)).first() is not None
