"""The shop's own tables, on SQLite or PostgreSQL. What the shop did to the world is what these rows say."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from sqlalchemy import CheckConstraint, Connection, Engine, Integer, NullPool, create_engine, event, literal_column
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class ShopTable(DeclarativeBase):
    """What every table of the shop is declared under."""


class Stock(ShopTable):
    __tablename__ = "stock"
    __table_args__ = (CheckConstraint("on_hand >= 0", name="stock_never_negative"),)

    sku: Mapped[str] = mapped_column(primary_key=True)
    on_hand: Mapped[int]


class Reservation(ShopTable):
    __tablename__ = "reservations"

    id: Mapped[str] = mapped_column(primary_key=True)
    order_id: Mapped[str]
    sku: Mapped[str]
    quantity: Mapped[int]
    is_released: Mapped[bool] = mapped_column(default=False)


class Payment(ShopTable):
    """One movement of money: `kind` is "charge" or "refund", `cents` is positive in both."""

    __tablename__ = "payments"

    id: Mapped[str] = mapped_column(primary_key=True)
    order_id: Mapped[str]
    kind: Mapped[str]
    card_last4: Mapped[str]
    cents: Mapped[int]


class PaymentRequest(ShopTable):
    """What a customer was asked to pay, at the payment provider's page; one that is not open cannot be paid."""

    __tablename__ = "payment_requests"

    order_id: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]
    is_open: Mapped[bool] = mapped_column(default=True)


class GatewayCall(ShopTable):
    """The payment gateway's memory of how often it was asked; it is what lets it fail a known number of times."""

    __tablename__ = "gateway_calls"

    order_id: Mapped[str] = mapped_column(primary_key=True)
    operation: Mapped[str] = mapped_column(primary_key=True)
    calls: Mapped[int]


class Shipment(ShopTable):
    __tablename__ = "shipments"

    id: Mapped[str] = mapped_column(primary_key=True)
    order_id: Mapped[str]
    address: Mapped[str]
    is_cancelled: Mapped[bool] = mapped_column(default=False)


class SentReceipt(ShopTable):
    __tablename__ = "receipts"

    order_id: Mapped[str] = mapped_column(primary_key=True)
    email: Mapped[str]
    cents: Mapped[int]


def transaction() -> AbstractContextManager[Connection]:
    """Open a connection to `SHOP_DATABASE` in a transaction: committed at the end, rolled back by an exception."""
    return _engine(os.environ.get("SHOP_DATABASE", "sqlite:///shop.db")).begin()


def create_tables() -> None:
    """Create the tables that are not there yet."""
    with transaction() as connection:
        ShopTable.metadata.create_all(connection)


def stock_up(stock: Mapping[str, int]) -> None:
    """Put `stock` (sku: pieces) on the shelves. A sku that is already there is left as it is."""
    with transaction() as connection:
        for sku, pieces in stock.items():
            insert_once(connection, Stock, sku=sku, on_hand=pieces)


def insert_once(connection: Connection, table: type[ShopTable], **values: Any) -> bool:
    """Insert a row unless its key is taken, and say whether it was inserted.

    Of two workers that insert one key at the same time, the second waits for the first one's transaction.
    """
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    inserted = insert(table).values(**values).on_conflict_do_nothing().returning(literal_column("1", Integer))
    return connection.execute(inserted).first() is not None


@cache
def _engine(url: str) -> Engine:
    # no pool: a connection opened before a prefork worker forks would be shared by its children
    engine = create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    # without this the driver begins transactions by itself, and not as _begin_immediate does
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA journal_mode = WAL")


def _begin_immediate(connection: Connection) -> None:
    # a plain BEGIN that needs the write lock later fails at once when another worker has it; this one waits
    connection.exec_driver_sql("BEGIN IMMEDIATE")
