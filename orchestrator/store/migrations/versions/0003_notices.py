"""What observers and Celery are still to be told, revoked steps, where forks came from, and what lists are read by.

Every part of it is made only where it is missing: MySQL commits each by itself, and the process may be killed between.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from orchestrator.store.migrations.columns import identifier, payload
from orchestrator.store.tables import Instant

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


#: Indexes by table; the last is made of an expression, on PostgreSQL alone.
_INDEXES = {
    "orchestrator_notice": {"orchestrator_notice_due": ["due_at"]},
    "orchestrator_instance": {
        "orchestrator_instance_workflow_status": ["workflow", "status", "created_at", "id"],
        "orchestrator_instance_forked_from": ["forked_from"],
    },
    "orchestrator_attribute": {
        "orchestrator_attribute_newest": ["name", "value", "created_at", "instance_id"],
    },
}
_PREFIX = "orchestrator_instance_prefix"
_REPLACED = "orchestrator_attribute_value"


def upgrade() -> None:
    inspector = sa.inspect(op.get_bind())
    if not inspector.has_table("orchestrator_notice"):
        op.create_table(
            "orchestrator_notice",
            sa.Column("id", sa.String(length=32), nullable=False),
            sa.Column("instance_id", identifier(200), nullable=False),
            sa.Column("signal", sa.String(length=40), nullable=False),
            sa.Column("payload", payload(), nullable=False),
            sa.Column("attempts", sa.Integer(), nullable=False),
            sa.Column("created_at", Instant(), nullable=False),
            sa.Column("due_at", Instant(), nullable=False),
            sa.PrimaryKeyConstraint("id"),
        )
    _add_column(
        "orchestrator_history", sa.Column("is_revoked", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    _add_column("orchestrator_finish", sa.Column("told", sa.Integer(), nullable=False, server_default="0"))
    name, columns, options = _not_undone_index()
    if name not in _indexes("orchestrator_instance"):
        op.create_index(name, "orchestrator_instance", columns, **options)
    _add_column("orchestrator_instance", sa.Column("forked_from", identifier(200), nullable=True))
    _add_column("orchestrator_attribute", sa.Column("created_at", Instant(), nullable=True))
    op.execute(
        "UPDATE orchestrator_attribute SET created_at = (SELECT orchestrator_instance.created_at FROM "
        "orchestrator_instance WHERE orchestrator_instance.id = orchestrator_attribute.instance_id) "
        "WHERE created_at IS NULL"
    )
    for table, wanted in _INDEXES.items():
        present = _indexes(table)
        for name, columns in wanted.items():
            if name not in present:
                op.create_index(name, table, columns)
    if op.get_bind().dialect.name == "postgresql" and _PREFIX not in _indexes("orchestrator_instance"):
        op.create_index(_PREFIX, "orchestrator_instance", [sa.text('id COLLATE "C"')])
    if _REPLACED in _indexes("orchestrator_attribute"):
        op.drop_index(_REPLACED, "orchestrator_attribute")


def _not_undone_index() -> tuple[str, list[str], dict[str, Any]]:
    # MySQL has no partial indexes, the others none on so long a text
    if op.get_bind().dialect.name in ("mysql", "mariadb"):
        return "orchestrator_instance_left_undone", ["not_undone"], {"mysql_length": 1, "mariadb_length": 1}
    where = sa.text("not_undone IS NOT NULL")
    return "orchestrator_instance_not_undone", ["ended_at"], {"postgresql_where": where, "sqlite_where": where}


def _indexes(table: str) -> set[str | None]:
    return {index["name"] for index in sa.inspect(op.get_bind()).get_indexes(table)}


def _add_column(table: str, column: sa.Column[Any]) -> None:
    if column.name not in {each["name"] for each in sa.inspect(op.get_bind()).get_columns(table)}:
        op.add_column(table, column)


def downgrade() -> None:
    op.drop_index(_not_undone_index()[0], table_name="orchestrator_instance")
    op.create_index(_REPLACED, "orchestrator_attribute", ["name", "value"])
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index(_PREFIX, "orchestrator_instance")
    for table, wanted in _INDEXES.items():
        for name in wanted:
            op.drop_index(name, table_name=table)
    op.drop_column("orchestrator_attribute", "created_at")
    op.drop_column("orchestrator_instance", "forked_from")
    op.drop_table("orchestrator_notice")
    op.drop_column("orchestrator_history", "is_revoked")
    op.drop_column("orchestrator_finish", "told")
