"""Instances, their history, attributes, workers, and what endings owe.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from orchestrator.store.migrations.columns import identifier, payload
from orchestrator.store.tables import Instant

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "orchestrator_attribute",
        sa.Column("instance_id", identifier(200), nullable=False),
        sa.Column("name", identifier(100), nullable=False),
        sa.Column("value", identifier(255), nullable=False),
        sa.PrimaryKeyConstraint("instance_id", "name"),
    )
    op.create_index("orchestrator_attribute_value", "orchestrator_attribute", ["name", "value"], unique=False)
    op.create_table(
        "orchestrator_finish",
        sa.Column("instance_id", identifier(200), nullable=False),
        sa.Column("generation", sa.String(length=32), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("instance_id"),
    )
    op.create_index("orchestrator_finish_due", "orchestrator_finish", ["due_at"], unique=False)
    op.create_table(
        "orchestrator_history",
        sa.Column("instance_id", identifier(200), nullable=False),
        sa.Column("run", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("generation", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", identifier(255), nullable=False),
        sa.Column("scope", identifier(255), nullable=False),
        sa.Column("undoes", sa.Integer(), nullable=True),
        sa.Column("after_order", sa.Integer(), nullable=False),
        sa.Column("arguments", payload(), nullable=True),
        sa.Column("options", payload(), nullable=True),
        sa.Column("passes", sa.String(length=8), nullable=True),
        sa.Column("compensation", payload(), nullable=True),
        sa.Column("inherits_compensation", sa.Boolean(), nullable=False),
        sa.Column("retry", payload(), nullable=True),
        sa.Column("timeout_seconds", sa.Float(), nullable=True),
        sa.Column("is_foreign", sa.Boolean(), nullable=False),
        sa.Column("lane", sa.Integer(), nullable=True),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("lost", sa.Integer(), nullable=False),
        sa.Column("is_in_doubt", sa.Boolean(), nullable=False),
        sa.Column("is_draining", sa.Boolean(), nullable=False),
        sa.Column("dispatch", sa.Integer(), nullable=False),
        sa.Column("celery_retries", sa.Integer(), nullable=False),
        sa.Column("publications", sa.Integer(), nullable=False),
        sa.Column("claim_incarnation", sa.String(length=36), nullable=True),
        sa.Column("claim_process", sa.Integer(), nullable=True),
        sa.Column("awaited", sa.Integer(), nullable=True),
        sa.Column("wake", sa.String(length=8), nullable=True),
        sa.Column("outcome", sa.String(length=12), nullable=True),
        sa.Column("settled_order", sa.Integer(), nullable=True),
        sa.Column("result", payload(), nullable=True),
        sa.Column("failure", payload(), nullable=True),
        sa.Column("is_timed_out", sa.Boolean(), nullable=False),
        sa.Column("late_outcome", sa.String(length=12), nullable=True),
        sa.Column("late_order", sa.Integer(), nullable=True),
        sa.Column("late_result", payload(), nullable=True),
        sa.Column("late_at", Instant(), nullable=True),
        sa.Column("strays", payload(), nullable=True),
        sa.Column("resolution", payload(), nullable=True),
        sa.Column("scheduled_at", Instant(), nullable=False),
        sa.Column("dispatched_at", Instant(), nullable=True),
        sa.Column("started_at", Instant(), nullable=True),
        sa.Column("settled_at", Instant(), nullable=True),
        sa.Column("publish_at", Instant(), nullable=True),
        sa.Column("expires_at", Instant(), nullable=True),
        sa.Column("timeout_at", Instant(), nullable=True),
        sa.Column("due_at", Instant(), nullable=True),
        sa.PrimaryKeyConstraint("instance_id", "run", "seq"),
    )
    op.create_index("orchestrator_history_claim", "orchestrator_history", ["claim_incarnation"], unique=False)
    op.create_index("orchestrator_history_due", "orchestrator_history", ["due_at"], unique=False)
    op.create_index(
        "orchestrator_history_lane",
        "orchestrator_history",
        ["instance_id", "run", "lane", "state", "seq"],
        unique=False,
        postgresql_where=sa.text("lane IS NOT NULL"),
        sqlite_where=sa.text("lane IS NOT NULL"),
    )
    op.create_table(
        "orchestrator_instance",
        sa.Column("id", identifier(200), nullable=False),
        sa.Column("generation", sa.String(length=32), nullable=False),
        sa.Column("workflow", identifier(255), nullable=False),
        sa.Column("queue", identifier(255), nullable=True),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("input", payload(), nullable=False),
        sa.Column("result", payload(), nullable=True),
        sa.Column("failure", payload(), nullable=True),
        sa.Column("blocked", payload(), nullable=True),
        sa.Column("not_undone", payload(), nullable=True),
        sa.Column("progress", payload(), nullable=True),
        sa.Column("request", payload(), nullable=True),
        sa.Column("waiting", sa.Integer(), nullable=False),
        sa.Column("wait_number", sa.Integer(), nullable=False),
        sa.Column("next_seq", sa.Integer(), nullable=False),
        sa.Column("next_order", sa.Integer(), nullable=False),
        sa.Column("passed_order", sa.Integer(), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("pass_due_at", Instant(), nullable=True),
        sa.Column("pass_attempts", sa.Integer(), nullable=False),
        sa.Column("pass_publications", sa.Integer(), nullable=False),
        sa.Column("refused", payload(), nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("started_at", Instant(), nullable=True),
        sa.Column("last_at", Instant(), nullable=False),
        sa.Column("ended_at", Instant(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("orchestrator_instance_created", "orchestrator_instance", ["created_at", "id"], unique=False)
    op.create_index("orchestrator_instance_pass_due", "orchestrator_instance", ["pass_due_at"], unique=False)
    op.create_index(
        "orchestrator_instance_status", "orchestrator_instance", ["status", "created_at", "id"], unique=False
    )
    op.create_index(
        "orchestrator_instance_workflow", "orchestrator_instance", ["workflow", "created_at", "id"], unique=False
    )
    op.create_table(
        "orchestrator_worker",
        sa.Column("incarnation", sa.String(length=36), nullable=False),
        sa.Column("nodename", sa.String(length=255), nullable=False),
        sa.Column("process", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(length=32), nullable=False),
        sa.Column("beat", sa.BigInteger(), nullable=False),
        sa.Column("beat_at", Instant(), nullable=False),
        sa.Column("started_at", Instant(), nullable=False),
        sa.Column("dead_at", Instant(), nullable=True),
        sa.Column("workflows", payload(), nullable=False),
        sa.Column("tasks", payload(), nullable=False),
        sa.Column("queues", payload(), nullable=False),
        sa.PrimaryKeyConstraint("incarnation"),
    )


def downgrade() -> None:
    op.drop_table("orchestrator_worker")
    op.drop_index("orchestrator_instance_workflow", table_name="orchestrator_instance")
    op.drop_index("orchestrator_instance_status", table_name="orchestrator_instance")
    op.drop_index("orchestrator_instance_pass_due", table_name="orchestrator_instance")
    op.drop_index("orchestrator_instance_created", table_name="orchestrator_instance")
    op.drop_table("orchestrator_instance")
    op.drop_index(
        "orchestrator_history_lane",
        table_name="orchestrator_history",
        postgresql_where=sa.text("lane IS NOT NULL"),
        sqlite_where=sa.text("lane IS NOT NULL"),
    )
    op.drop_index("orchestrator_history_due", table_name="orchestrator_history")
    op.drop_index("orchestrator_history_claim", table_name="orchestrator_history")
    op.drop_table("orchestrator_history")
    op.drop_index("orchestrator_finish_due", table_name="orchestrator_finish")
    op.drop_table("orchestrator_finish")
    op.drop_index("orchestrator_attribute_value", table_name="orchestrator_attribute")
    op.drop_table("orchestrator_attribute")
