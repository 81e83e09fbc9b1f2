"""The tables, all prefixed ``orchestrator_``; ``migrations/`` creates the same ones."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

VERSION_TABLE = "orchestrator_schema_version"


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime, to the microsecond, on databases that do not keep time zones as well."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=dialect.name == "postgresql"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def _id(length: int) -> String:
    """A name compared byte by byte everywhere: MySQL's default would take ``Order-1`` for ``order-1``."""
    return String(length).with_variant(
        mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )


def _payload() -> Text:
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")


def _counter() -> BigInteger:
    return BigInteger().with_variant(Integer, "sqlite")  # the only type that SQLite counts up by itself


class Words(TypeDecorator[str]):
    """Text for people, from anywhere; what not every database keeps (NUL, lone surrogates) is replaced."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"))
        return super().load_dialect_impl(dialect)

    def process_bind_param(self, value: str | None, _dialect: Dialect) -> str | None:
        if value is None:
            return None
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


metadata = MetaData()

instance = Table(
    "orchestrator_instance",
    metadata,
    Column("id", _id(200), primary_key=True),
    Column("generation", String(32), nullable=False),
    Column("workflow", _id(255), nullable=False),
    Column("queue", _id(255)),
    Column("status", String(20), nullable=False),
    Column("run", Integer, nullable=False),
    Column("input", _payload(), nullable=False),
    Column("result", _payload()),
    Column("failure", _payload()),
    Column("blocked", Words),  # why it is BLOCKED, in words
    Column("not_undone", _payload()),
    Column("progress", Words),
    Column("request", _payload()),  # what Celery is owed when it ends: callbacks, chain, chord
    # what the next pass waits for
    Column("waiting", Integer, nullable=False),
    Column("wait_number", Integer, nullable=False),
    Column("next_seq", Integer, nullable=False),
    Column("next_order", Integer, nullable=False),
    Column("passed_order", Integer),
    Column("version", BigInteger, nullable=False),
    # a pass that is owed
    Column("pass_due_at", Instant),
    Column("pass_attempts", Integer, nullable=False),
    Column("pass_publications", Integer, nullable=False),
    Column("refused", _payload()),  # incarnations whose code does not match the history
    Column("created_at", Instant, nullable=False),
    Column("started_at", Instant),
    Column("last_at", Instant, nullable=False),
    Column("ended_at", Instant),
    # the record of another instance that this one is the child of
    Column("parent_id", _id(200)),
    Column("parent_generation", String(32)),
    Column("parent_run", Integer),
    Column("parent_seq", Integer),
    Column("root_id", _id(200)),
    # what makes a failing step block
    Column("parks", Boolean, nullable=False),
    Column("is_past_pivot", Boolean, nullable=False),
    Column("blocked_steps", Integer, nullable=False),
    # what came in for the instance as a whole, numbered like the outcomes
    Column("cancel_order", Integer),
    Column("cancel_at", Instant),
    Column("cancel_reason", Words),
    Column("deadline_at", Instant),
    Column("deadline_order", Integer),
    Column("deadline_passed_at", Instant),
    Column("undo_order", Integer),
    Column("undo_at", Instant),
    Column("undo_seq", Integer),  # the parent's record that waits for the undo
    Column("mail", Integer, nullable=False),  # how many messages this run has taken notice of
    Column("run_started_at", Instant),
    Column("seeds", _payload()),  # of a fork: what random numbers were drawn from in the history it shares
    Column("forked_from", _id(200)),
    Index("orchestrator_instance_parent", "parent_id"),
    Index("orchestrator_instance_deadline", "deadline_at"),
    Index("orchestrator_instance_ended", "ended_at"),
    Index("orchestrator_instance_pass_due", "pass_due_at"),
    Index("orchestrator_instance_created", "created_at", "id"),
    Index("orchestrator_instance_status", "status", "created_at", "id"),
    Index("orchestrator_instance_workflow", "workflow", "created_at", "id"),
    # few among many; MySQL has no partial indexes, the others none on so long a text
    Index(
        "orchestrator_instance_not_undone",
        "ended_at",
        postgresql_where=text("not_undone IS NOT NULL"),
        sqlite_where=text("not_undone IS NOT NULL"),
    ).ddl_if(dialect=("postgresql", "sqlite")),  # type: ignore[arg-type]
    Index("orchestrator_instance_left_undone", "not_undone", mysql_length=1, mariadb_length=1).ddl_if(
        dialect=("mysql", "mariadb")  # type: ignore[arg-type]
    ),
    Index("orchestrator_instance_workflow_status", "workflow", "status", "created_at", "id"),
    Index("orchestrator_instance_forked_from", "forked_from"),
    # of ids that begin with something, in the order of their bytes: the primary key has that of the locale
    Index("orchestrator_instance_prefix", text('id COLLATE "C"')).ddl_if(dialect="postgresql"),
)

history = Table(
    "orchestrator_history",
    metadata,
    Column("instance_id", _id(200), primary_key=True),
    Column("run", Integer, primary_key=True, autoincrement=False),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("generation", String(32), nullable=False),
    # the command
    Column("kind", String(16), nullable=False),
    Column("name", _id(255), nullable=False),
    Column("scope", _id(255), nullable=False),
    Column("undoes", Integer),
    Column("after_order", Integer, nullable=False),
    Column("arguments", _payload()),
    Column("options", _payload()),
    Column("passes", String(8)),
    Column("compensation", _payload()),
    Column("inherits_compensation", Boolean, nullable=False),
    Column("retry", _payload()),
    Column("timeout_seconds", Float),
    Column("is_foreign", Boolean, nullable=False),
    Column("lane", Integer),
    Column("lane_width", Integer),  # how many of the lane may be under way at a time
    Column("role", String(8)),  # pivot, or optional: its failure blocks at once, or never
    Column("child_id", _id(200)),
    Column("is_detached", Boolean, nullable=False),  # a child that its parent's end leaves alone
    # how far it has come
    Column("state", String(12), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("lost", Integer, nullable=False),
    Column("is_in_doubt", Boolean, nullable=False),
    Column("is_draining", Boolean, nullable=False),
    # its attempt goes on, and no other follows it
    Column("is_revoked", Boolean, nullable=False),
    Column("dispatch", Integer, nullable=False),
    Column("celery_retries", Integer, nullable=False),
    Column("publications", Integer, nullable=False),
    Column("claim_incarnation", String(36)),
    Column("claim_process", Integer),
    Column("awaited", Integer),
    Column("wake", String(8)),
    # what became of it
    Column("outcome", String(12)),
    Column("settled_order", Integer),
    Column("result", _payload()),
    Column("failure", _payload()),
    Column("is_timed_out", Boolean, nullable=False),
    Column("late_outcome", String(12)),
    Column("late_order", Integer),
    Column("late_result", _payload()),
    Column("late_at", Instant),
    Column("strays", _payload()),  # what attempts that were given up came to after all
    Column("resolution", Words),  # an operator's answer to a compensation that failed
    # when
    Column("scheduled_at", Instant, nullable=False),
    Column("dispatched_at", Instant),
    Column("started_at", Instant),
    Column("settled_at", Instant),
    Column("publish_at", Instant),
    Column("expires_at", Instant),
    Column("timeout_at", Instant),
    Column("due_at", Instant),
    Index("orchestrator_history_due", "due_at"),
    Index("orchestrator_history_claim", "claim_incarnation"),
    # the next item of a map, among tens of thousands
    Index(
        "orchestrator_history_lane",
        "instance_id",
        "run",
        "lane",
        "state",
        "seq",
        postgresql_where=text("lane IS NOT NULL"),
        sqlite_where=text("lane IS NOT NULL"),
    ),
)

attribute = Table(
    "orchestrator_attribute",
    metadata,
    Column("instance_id", _id(200), primary_key=True),
    Column("name", _id(100), primary_key=True),
    Column("value", _id(255), nullable=False),
    Column("created_at", Instant),  # the instance's: those that have an attribute are listed newest first
    Index("orchestrator_attribute_newest", "name", "value", "created_at", "instance_id"),
)

run = Table(
    "orchestrator_run",  # those that have ended in recur
    metadata,
    Column("instance_id", _id(200), primary_key=True),
    Column("run", Integer, primary_key=True, autoincrement=False),
    Column("generation", String(32), nullable=False),
    Column("input", _payload(), nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("ended_at", Instant, nullable=False),
)

message = Table(
    "orchestrator_message",
    metadata,
    Column("id", _counter(), primary_key=True, autoincrement=True),
    # within an address the same message_id is delivered once
    Column("address", _id(310), nullable=False),
    Column("message_id", _id(200)),
    # whom it is for; nobody yet where subscribers compete for it
    Column("instance_id", _id(200)),
    Column("generation", String(32)),
    Column("kind", String(8), nullable=False),
    Column("channel", _id(100), nullable=False),
    Column("payload", _payload()),
    Column("sent_at", Instant, nullable=False),
    # when the instance took notice of it, numbered like the outcomes
    Column("run", Integer),
    Column("taken_order", Integer),
    Column("taken_at", Instant),
    Column("received_seq", Integer),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Instant),
    Index("orchestrator_message_once", "address", "message_id", unique=True),
    Index("orchestrator_message_taken", "instance_id", "run", "taken_order"),
    Index("orchestrator_message_shared", "channel", "instance_id", "id"),
    Index("orchestrator_message_due", "due_at"),
)

subscription = Table(
    "orchestrator_subscription",
    metadata,
    Column("instance_id", _id(200), primary_key=True),
    Column("channel", _id(100), primary_key=True),
    Column("generation", String(32), nullable=False),
    Column("mode", String(10), nullable=False),
    Column("created_at", Instant, nullable=False),
    Index("orchestrator_subscription_channel", "channel", "mode"),
)

outbox = Table(
    "orchestrator_outbox",  # plain Celery tasks that a caller's transaction enqueued
    metadata,
    Column("id", _counter(), primary_key=True, autoincrement=True),
    Column("task_id", _id(255), nullable=False),
    Column("signature", _payload(), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("due_at", Instant, nullable=False),
    Index("orchestrator_outbox_due", "due_at"),
)

notice = Table(
    "orchestrator_notice",  # what receivers of signals are still to be told
    metadata,
    Column("id", String(32), primary_key=True),
    Column("instance_id", _id(200), nullable=False),
    Column("signal", String(40), nullable=False),
    Column("payload", _payload(), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("due_at", Instant, nullable=False),
    Index("orchestrator_notice_due", "due_at"),
)

purged = Table(
    "orchestrator_purged",  # ids that no late message may bring back to life
    metadata,
    Column("instance_id", _id(200), primary_key=True),
    Column("purged_at", Instant, nullable=False),
)

worker = Table(
    "orchestrator_worker",
    metadata,
    Column("incarnation", String(36), primary_key=True),
    Column("nodename", String(255), nullable=False),
    Column("process", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("beat_at", Instant, nullable=False),  # for people: nothing is decided by it
    Column("started_at", Instant, nullable=False),
    Column("dead_at", Instant),
    Column("workflows", _payload(), nullable=False),
    Column("tasks", _payload(), nullable=False),
    Column("queues", _payload(), nullable=False),
)

finish = Table(
    "orchestrator_finish",
    metadata,
    Column("instance_id", _id(200), primary_key=True),
    Column("generation", String(32), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("told", Integer, nullable=False, server_default="0"),  # how much of it has been told
    Column("due_at", Instant, nullable=False),
    Index("orchestrator_finish_due", "due_at"),
)
