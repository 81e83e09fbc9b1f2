"""Migrations: safe when many processes start at once, and what they make is what the tables say."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, event, exc, inspect, text

from orchestrator.errors import StoreUnreachable
from orchestrator.store import due, migrations
from orchestrator.store.engine import Store
from orchestrator.store.tables import VERSION_TABLE, metadata
from tests.servers import Databases

from .processes import fork, wait_for

PREFIX_INDEX = "orchestrator_instance_prefix"

OpenStore = Callable[..., Store]


@pytest.fixture
def store_url(databases: Databases) -> Iterator[str]:
    """A migrated database that no other test will have."""
    url = databases.create()
    yield url
    databases.drop(url)


@pytest.fixture
def mysql_url(mysql_databases: Databases) -> Iterator[str]:
    url = mysql_databases.create()
    yield url
    mysql_databases.drop(url)


def differences(connection: Connection) -> list[object]:
    is_mysql = connection.dialect.name in ("mysql", "mariadb")
    elsewhere = {"orchestrator_instance_not_undone" if is_mysql else "orchestrator_instance_left_undone"}
    options = {
        "version_table": VERSION_TABLE,
        "compare_type": True,
        "include_name": lambda name, kind, _parents: kind != "table" or str(name).startswith("orchestrator_"),
        # Alembic does not know that an index is made for some databases only, nor understands one made of an expression
        "include_object": lambda _item, name, _kind, is_reflected, _other: (
            name != PREFIX_INDEX and (is_reflected or name not in elsewhere)
        ),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="autogenerate skipping .* expression-based index")
        found: list[object] = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    return found


def tables(store: Store) -> set[str]:
    with store.read("look") as connection:
        return set(inspect(connection).get_table_names())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_8_processes_that_start_at_once_on_an_empty_database_all_succeed(
    empty_store_url: str, open_store: OpenStore
) -> None:
    told, tells = os.pipe()
    children = [fork(lambda: use_when_told(empty_store_url, told, tells)) for _ in range(8)]
    os.close(tells)  # the last writer: all children read the end of the pipe at once
    assert [wait_for(child) for child in children] == [0] * 8
    os.close(told)
    with open_store(empty_store_url, migrate=False).read("look") as connection:
        assert migrations.find_revision(connection) == migrations.HEAD
        assert differences(connection) == []


def use_when_told(url: str, told: int, tells: int) -> None:
    os.close(tells)
    os.read(told, 1)
    store = Store(url)
    with store.read("look") as connection:
        assert due.find_next_due(connection) is None
    store.dispose()


@pytest.mark.parametrize(("level", "is_told"), [(logging.INFO, False), (logging.DEBUG, True)])
def test_whoever_migrates_says_nothing_of_it_unless_somebody_is_debugging(
    sqlite_files: Databases, open_store: OpenStore, caplog: pytest.LogCaptureFixture, level: int, is_told: bool
) -> None:
    caplog.set_level(level)
    before = logging.getLogger("alembic").level
    open_store(sqlite_files.create(migrated=False)).prepare()
    assert any(record.name.startswith("alembic") for record in caplog.records) is is_told
    assert logging.getLogger("alembic").level == before


def test_the_schema_that_migrations_make_is_what_the_tables_say(store: Store) -> None:
    with store.read("compare") as connection:
        assert differences(connection) == []


def test_only_postgresql_has_an_index_for_prefixes_of_its_own(store: Store) -> None:
    with store.read("look") as connection:
        found = {index["name"] for index in inspect(connection).get_indexes("orchestrator_instance")}
    assert (PREFIX_INDEX in found) == (store.backend == "postgresql")


def test_attributes_of_before_are_given_the_time_of_their_instance(empty_store_url: str, open_store: OpenStore) -> None:
    with open_store(empty_store_url, migrate=False).read("open") as connection:
        engine = connection.engine
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
    now = "'2024-05-01 10:00:00'"
    columns = "id, generation, workflow, status, run, input, waiting, wait_number, next_seq, next_order, version"
    columns += ", pass_attempts, pass_publications, created_at, last_at"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO orchestrator_instance ({columns}) "
                f"VALUES ('order-1', 'g', 'w', 'PENDING', 0, '{{}}', 0, 0, 0, 1, 0, 0, 0, {now}, {now})"
            )
        )
        connection.execute(text("INSERT INTO orchestrator_attribute VALUES ('order-1', 'customer', '7')"))
    migrations.upgrade(engine)
    with engine.begin() as connection:
        found = connection.execute(
            text("SELECT a.created_at = i.created_at FROM orchestrator_attribute a, orchestrator_instance i")
        )
        assert [bool(row[0]) for row in found] == [True]
        assert differences(connection) == []
    engine.dispose()


def test_the_comparison_finds_a_column_that_is_missing(store: Store) -> None:
    with store.begin("spoil") as connection:
        connection.execute(text("ALTER TABLE orchestrator_worker DROP COLUMN version"))
        connection.execute(text("ALTER TABLE orchestrator_worker ADD COLUMN extra INTEGER"))
    with store.read("compare") as connection:
        assert len(differences(connection)) == 2


def test_head_is_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [migrations.HEAD]


def test_all_tables_carry_our_prefix_and_the_version_is_kept_apart(store: Store) -> None:
    assert tables(store) == {*metadata.tables, VERSION_TABLE}
    assert all(name.startswith("orchestrator_") for name in tables(store))


def test_migrate_false_leaves_an_empty_database_alone(empty_store_url: str, open_store: OpenStore) -> None:
    store = open_store(empty_store_url, migrate=False)
    assert tables(store) == set()
    with pytest.raises(exc.DBAPIError, match="orchestrator_worker"), store.read("look") as connection:
        connection.execute(text("SELECT count(*) FROM orchestrator_worker"))
    assert tables(store) == set()


def test_tables_of_others_are_left_alone(empty_store_url: str, open_store: OpenStore) -> None:
    with open_store(empty_store_url, migrate=False).begin("prepare") as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('theirs')"))
    store = open_store(empty_store_url)
    assert tables(store) == {*metadata.tables, VERSION_TABLE, "alembic_version"}
    with store.read("look") as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "theirs"
        assert differences(connection) == []


# the last ones: between a table and the index that keeps messages from coming twice, or that finds notices
@pytest.mark.parametrize("statements", [1, 4, 9, 23, 31], ids=lambda count: f"after-{count}-statements")
def test_a_migration_that_was_interrupted_is_made_by_the_next_process(
    empty_store_url: str, open_store: OpenStore, statements: int
) -> None:
    killed = open_store(empty_store_url, migrate=False)
    with killed.read("open"):
        engine = killed._engine
    assert engine is not None
    left = iter(range(statements))

    def dies(_connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.lstrip().startswith("CREATE") and next(left, None) is None:
            raise KeyboardInterrupt

    event.listen(engine, "before_cursor_execute", dies)
    with pytest.raises(KeyboardInterrupt):
        migrations.upgrade(engine)
    store = open_store(empty_store_url)
    with store.read("compare") as connection:
        assert differences(connection) == []
        assert migrations.find_revision(connection) == migrations.HEAD


def test_a_table_without_a_version_is_not_dropped_while_it_holds_anything(
    mysql_url: str, open_store: OpenStore
) -> None:
    with open_store(mysql_url).begin("spoil") as connection:
        connection.execute(text(f"DELETE FROM {VERSION_TABLE}"))
        columns = "(instance_id, generation, attempts, due_at)"
        connection.execute(text(f"INSERT INTO orchestrator_finish {columns} VALUES ('order-1', 'g', 0, '2024-05-01')"))
    with pytest.raises(StoreUnreachable, match="already exists"), open_store(mysql_url).read("look"):
        pass
    with open_store(mysql_url, migrate=False).read("look") as connection:
        assert connection.execute(text("SELECT count(*) FROM orchestrator_finish")).scalar() == 1


def test_a_newer_schema_is_left_to_the_code_it_belongs_to(store_url: str) -> None:
    engine = create_engine(store_url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    migrations.upgrade(engine)
    with engine.begin() as connection:
        assert migrations.find_revision(connection) == "9999"
    engine.dispose()
