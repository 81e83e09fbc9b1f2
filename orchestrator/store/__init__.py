"""The store: SQLAlchemy Core over SQLite, PostgreSQL, MySQL and MariaDB.

Functions take a ``Connection`` and do one thing each; the caller owns the transaction.  Whoever changes an instance or
its history locks the instance's row first, with a statement of its own, and reads by later ones: at READ COMMITTED a
statement that locks and reads at once sees what was there before it waited.  Only a claim changes a history row without
that lock; everything that depends on a record not being claimed is therefore an UPDATE on the state and attempt as
read.
"""
