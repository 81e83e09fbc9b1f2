"""Stores and brokers for tests; ``servers.py`` and ``brokers.py`` say where they come from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .brokers import embedded_valkey, empty, find_rabbitmq, find_redis, redis_database
from .servers import Databases, SqliteFiles, find_databases

STORES = ("sqlite", "postgresql", "mysql")

# --- stores -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sqlite_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    files = SqliteFiles(tmp_path_factory.mktemp("sqlite"))
    yield files
    files.close()


@pytest.fixture(scope="session")
def postgresql_databases() -> Iterator[Databases]:
    databases = find_databases("postgresql")
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def mysql_databases() -> Iterator[Databases]:
    databases = find_databases("mysql")
    yield databases
    databases.close()


def _fresh(databases: Databases, *, migrated: bool = True) -> Iterator[str]:
    url = databases.create(migrated=migrated)
    yield url
    if migrated:
        databases.recycle(url)
    else:
        databases.drop(url)


@pytest.fixture
def sqlite_url(sqlite_files: Databases) -> Iterator[str]:
    """A migrated SQLite file of the test's own."""
    yield from _fresh(sqlite_files)


@pytest.fixture
def postgresql_url(postgresql_databases: Databases) -> Iterator[str]:
    """A migrated PostgreSQL database of the test's own."""
    yield from _fresh(postgresql_databases)


@pytest.fixture
def mysql_url(mysql_databases: Databases) -> Iterator[str]:
    """A migrated MySQL or MariaDB database of the test's own."""
    yield from _fresh(mysql_databases)


@pytest.fixture(params=STORES)
def databases(request: pytest.FixtureRequest) -> Databases:
    """What makes databases, of each kind in turn."""
    name = "sqlite_files" if request.param == "sqlite" else f"{request.param}_databases"
    found: Databases = request.getfixturevalue(name)
    return found


@pytest.fixture
def store_url(databases: Databases) -> Iterator[str]:
    """A migrated database of the test's own, of each kind in turn."""
    yield from _fresh(databases)


@pytest.fixture
def empty_store_url(databases: Databases) -> Iterator[str]:
    """A database with nothing in it, of each kind in turn."""
    yield from _fresh(databases, migrated=False)


@pytest.fixture(scope="module", params=STORES)
def shared_databases(request: pytest.FixtureRequest) -> Databases:
    name = "sqlite_files" if request.param == "sqlite" else f"{request.param}_databases"
    found: Databases = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="module")
def shared_url(shared_databases: Databases) -> Iterator[str]:
    """A migrated database of the module's own, of each kind in turn."""
    url = shared_databases.create()
    yield url
    shared_databases.recycle(url)


# --- brokers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The embedded Valkey of this session, or of this worker of pytest-xdist."""
    with embedded_valkey() as url:
        yield url


@pytest.fixture
def broker_url(valkey_url: str) -> Iterator[str]:
    """The embedded Valkey, emptied."""
    empty(valkey_url)
    yield valkey_url
    empty(valkey_url)


@pytest.fixture(scope="session")
def redis_address() -> str:
    return find_redis()


@pytest.fixture
def redis_url(redis_address: str) -> Iterator[str]:
    """An empty database of the running Redis."""
    with redis_database(redis_address) as url:
        yield url


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    """The running RabbitMQ; all tests share it, so queues need names drawn at random."""
    return find_rabbitmq()


# --- order --------------------------------------------------------------------------------------------------------

#: What takes longest begins first, so that no process of pytest-xdist is left with it at the end.
LONGEST = (
    "test_crash_points",
    "test_lifecycle_crash_points",
    "test_documents",
    "test_stores_and_brokers",
    "test_outages",
    "test_compose",
    "test_frozen",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first, and leave the others as they are."""

    def rank(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)
