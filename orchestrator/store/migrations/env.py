"""Alembic's entry point: migrate on the connection, and inside the transaction, that ``upgrade()`` opened."""

from __future__ import annotations

from alembic import context

from orchestrator.store.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    include_name=lambda name, kind, _parents: kind != "table" or str(name).startswith("orchestrator_"),
)
context.run_migrations()
