"""Names that begin with some letters, for whoever types one."""

from __future__ import annotations

from sqlalchemy import Connection, select

from orchestrator.store.tables import instance


def list_instance_ids(connection: Connection, beginning: str, limit: int) -> list[str]:
    """Return ids that begin with ``beginning``; of all of them, the newest."""
    statement = select(instance.c.id).limit(limit)
    if not beginning:
        return list(connection.execute(statement.order_by(instance.c.created_at.desc())).scalars())
    statement = statement.where(instance.c.id.startswith(beginning, autoescape=True))
    return list(connection.execute(statement.order_by(instance.c.id)).scalars())
