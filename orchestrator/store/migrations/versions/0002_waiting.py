"""The mailbox, runs, children, cancellation, blocked steps, the outbox of callers, and ids that were purged.

Every part of it is made only where it is missing: MySQL commits each by itself, and the process may be killed between.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from orchestrator.store.migrations.columns import counter, identifier, payload
from orchestrator.store.tables import Instant

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _claim(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false())


def _instance_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("parent_id", identifier(200), nullable=True),
        sa.Column("parent_generation", sa.String(length=32), nullable=True),
        sa.Column("parent_run", sa.Integer(), nullable=True),
        sa.Column("parent_seq", sa.Integer(), nullable=True),
        sa.Column("root_id", identifier(200), nullable=True),
        _claim("parks"),
        _claim("is_past_pivot"),
        sa.Column("blocked_steps", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("cancel_order", sa.Integer(), nullable=True),
        sa.Column("cancel_at", Instant(), nullable=True),
        sa.Column("cancel_reason", payload(), nullable=True),
        sa.Column("deadline_at", Instant(), nullable=True),
        sa.Column("deadline_order", sa.Integer(), nullable=True),
        sa.Column("deadline_passed_at", Instant(), nullable=True),
        sa.Column("undo_order", sa.Integer(), nullable=True),
        sa.Column("undo_at", Instant(), nullable=True),
        sa.Column("undo_seq", sa.Integer(), nullable=True),
        sa.Column("mail", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("run_started_at", Instant(), nullable=True),
        sa.Column("seeds", payload(), nullable=True),
    ]


_INSTANCE_INDEXES = {
    "orchestrator_instance_parent": ["parent_id"],
    "orchestrator_instance_deadline": ["deadline_at"],
    "orchestrator_instance_ended": ["ended_at"],
}


def _history_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("lane_width", sa.Integer(), nullable=True),
        sa.Column("role", sa.String(length=8), nullable=True),
        sa.Column("child_id", identifier(200), nullable=True),
        _claim("is_detached"),
    ]


def _tables() -> dict[str, list[Any]]:
    return {
        "orchestrator_run": [
            sa.Column("instance_id", identifier(200), nullable=False),
            sa.Column("run", sa.Integer(), autoincrement=False, nullable=False),
            sa.Column("generation", sa.String(length=32), nullable=False),
            sa.Column("input", payload(), nullable=False),
            sa.Column("started_at", Instant(), nullable=False),
            sa.Column("ended_at", Instant(), nullable=False),
            sa.PrimaryKeyConstraint("instance_id", "run"),
        ],
        "orchestrator_message": [
            sa.Column("id", counter(), autoincrement=True, nullable=False),
            sa.Column("address", identifier(310), nullable=False),
            sa.Column("message_id", identifier(200), nullable=True),
            sa.Column("instance_id", identifier(200), nullable=True),
            sa.Column("generation", sa.String(length=32), nullable=True),
            sa.Column("kind", sa.String(length=8), nullable=False),
            sa.Column("channel", identifier(100), nullable=False),
            sa.Column("payload", payload(), nullable=True),
            sa.Column("sent_at", Instant(), nullable=False),
            sa.Column("run", sa.Integer(), nullable=True),
            sa.Column("taken_order", sa.Integer(), nullable=True),
            sa.Column("taken_at", Instant(), nullable=True),
            sa.Column("received_seq", sa.Integer(), nullable=True),
            sa.Column("attempts", sa.Integer(), nullable=False),
            sa.Column("due_at", Instant(), nullable=True),
            sa.PrimaryKeyConstraint("id"),
        ],
        "orchestrator_subscription": [
            sa.Column("instance_id", identifier(200), nullable=False),
            sa.Column("channel", identifier(100), nullable=False),
            sa.Column("generation", sa.String(length=32), nullable=False),
            sa.Column("mode", sa.String(length=10), nullable=False),
            sa.Column("created_at", Instant(), nullable=False),
            sa.PrimaryKeyConstraint("instance_id", "channel"),
        ],
        "orchestrator_outbox": [
            sa.Column("id", counter(), autoincrement=True, nullable=False),
            sa.Column("task_id", identifier(255), nullable=False),
            sa.Column("signature", payload(), nullable=False),
            sa.Column("attempts", sa.Integer(), nullable=False),
            sa.Column("created_at", Instant(), nullable=False),
            sa.Column("due_at", Instant(), nullable=False),
            sa.PrimaryKeyConstraint("id"),
        ],
        "orchestrator_purged": [
            sa.Column("instance_id", identifier(200), nullable=False),
            sa.Column("purged_at", Instant(), nullable=False),
            sa.PrimaryKeyConstraint("instance_id"),
        ],
    }


#: Apart from their tables: MySQL commits each of these statements by itself.
_INDEXES_OF_TABLES = {
    "orchestrator_message": {
        "orchestrator_message_once": ["address", "message_id"],
        "orchestrator_message_taken": ["instance_id", "run", "taken_order"],
        "orchestrator_message_shared": ["channel", "instance_id", "id"],
        "orchestrator_message_due": ["due_at"],
    },
    "orchestrator_subscription": {
        "orchestrator_subscription_channel": ["channel", "mode"],
    },
    "orchestrator_outbox": {
        "orchestrator_outbox_due": ["due_at"],
    },
}
_UNIQUE = ("orchestrator_message_once",)


def upgrade() -> None:
    inspector = sa.inspect(op.get_bind())
    for table, columns in (
        ("orchestrator_instance", _instance_columns()),
        ("orchestrator_history", _history_columns()),
    ):
        known = {column["name"] for column in inspector.get_columns(table)}
        for column in columns:
            if column.name not in known:
                op.add_column(table, column)
    indexes = {index["name"] for index in inspector.get_indexes("orchestrator_instance")}
    for name, names in _INSTANCE_INDEXES.items():
        if name not in indexes:
            op.create_index(name, "orchestrator_instance", names, unique=False)
    for table, parts in _tables().items():
        if not inspector.has_table(table):
            op.create_table(table, *parts)
    for table, wanted in _INDEXES_OF_TABLES.items():
        made = {index["name"] for index in sa.inspect(op.get_bind()).get_indexes(table)}
        for name, names in wanted.items():
            if name not in made:
                op.create_index(name, table, names, unique=name in _UNIQUE)


def downgrade() -> None:
    for table in _tables():
        op.drop_table(table)
    for name in _INSTANCE_INDEXES:
        op.drop_index(name, table_name="orchestrator_instance")
    for column in _instance_columns():
        op.drop_column("orchestrator_instance", column.name)
    for column in _history_columns():
        op.drop_column("orchestrator_history", column.name)
