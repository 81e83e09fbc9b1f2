"""Columns as the migrations make them; ``tables.py`` says the same of today's."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import mysql


def identifier(length: int) -> sa.String:
    """A name compared byte by byte."""
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )


def payload() -> sa.Text:
    """Text of any length."""
    return sa.Text().with_variant(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")


def counter() -> sa.BigInteger:
    """A number that every database counts up by itself."""
    return sa.BigInteger().with_variant(sa.Integer, "sqlite")
