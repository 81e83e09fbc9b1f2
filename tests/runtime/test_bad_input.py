"""Bad input is refused where it is given, by an error that names it, and nothing of it is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain
from sqlalchemy import create_engine, func, select

from orchestrator import Context, Orchestrator, OrchestratorError, errors
from orchestrator.store.tables import metadata


@dataclass
class Order:
    sku: str
    quantity: int


def buy(ctx: Context, order: Order, note: str = "") -> str:
    return order.sku


@pytest.fixture
def app(broker_url: str) -> Iterator[Celery]:
    """An app with a workflow and a plain task, not bound to a store yet."""
    app = Celery("shop", broker=broker_url, set_as_current=False)
    yield app
    app.close()


@dataclass
class Shop:
    orchestrator: Orchestrator
    buy: Any
    reserve: Any
    store: str

    def count_rows(self) -> int:
        """Count what is recorded, in all tables."""
        with create_engine(self.store).connect() as connection:
            return sum(
                connection.execute(select(func.count()).select_from(table)).scalar_one()
                for table in metadata.tables.values()
            )

    def count_messages(self) -> int:
        with self.orchestrator.app.connection_for_read() as connection:
            return int(connection.default_channel.queue_declare("celery", passive=False).message_count)


@pytest.fixture
def shop(app: Celery, sqlite_url: str) -> Iterator[Shop]:
    orchestrator = Orchestrator(app, store=sqlite_url, max_payload_bytes=1000)
    reserve = app.task(dataclasses.asdict, name="reserve", shared=False)
    yield Shop(orchestrator, orchestrator.workflow(buy, name="buy"), reserve, sqlite_url)
    orchestrator.store.dispose()


ORDER = Order("book", 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda shop: shop.buy.delay({"sku": object()}), errors.NotEncodable, "the input of buy cannot be encoded"),
        (lambda shop: shop.buy.delay(ORDER, "x" * 1000), errors.PayloadTooLarge, "the input of buy takes 10.. bytes"),
        (lambda shop: shop.buy.delay({"sku": "book"}), errors.InputMismatch, "the input of buy is refused: .*quantity"),
        (lambda shop: shop.buy.delay(), errors.InputMismatch, "the input of buy is refused: missing .* 'order'"),
        (lambda shop: shop.buy.delay(ORDER, "a", "b"), errors.InputMismatch, "buy is refused: too many positional"),
        (lambda shop: shop.buy.delay(ORDER, nots="a"), errors.InputMismatch, "buy is refused: .*'nots'"),
        (lambda shop: shop.buy.delay(order=7), TypeError, "the input of buy is refused"),
        (lambda shop: shop.buy.apply_async((ORDER,), task_id="x" * 201), errors.InvalidInstanceId, "201 characters"),
        (lambda shop: shop.orchestrator.start(shop.buy.s(ORDER), instance_id="x" * 201), ValueError, "201 characters"),
        (lambda shop: shop.orchestrator.start(shop.buy.s(ORDER), instance_id=""), ValueError, "'' cannot be an"),
        (lambda shop: shop.orchestrator.start(shop.buy.s(ORDER), instance_id="a\nb"), ValueError, "cannot be printed"),
        (lambda shop: shop.orchestrator.start(shop.buy.s(ORDER), instance_id=7), ValueError, "int, not a string"),
        (lambda shop: shop.orchestrator.start(shop.reserve.s(ORDER)), errors.UnknownWorkflow, "'reserve' is not a"),
        (lambda shop: shop.orchestrator.start("buy"), errors.UnknownWorkflow, "'buy'"),
        (lambda shop: shop.orchestrator.start(shop.buy), errors.InvalidOperation, r"buy is a workflow; .*buy\.s\("),
        (lambda shop: shop.orchestrator.list(limit=0), errors.InvalidOperation, "the limit is 0"),
        (lambda shop: shop.orchestrator.start(chain(shop.buy.s(ORDER), shop.reserve.s())), LookupError, "celery.chain"),
        (lambda shop: shop.orchestrator.start(shop.buy.s()), errors.InputMismatch, "missing .* 'order'"),
        (lambda shop: shop.orchestrator.start(shop.buy.s(ORDER), on_conflict="x"), ValueError, "on_conflict is 'x'"),
        (lambda shop: shop.orchestrator.get("order-1"), errors.UnknownInstance, "there is no instance 'order-1'"),
        (lambda shop: shop.orchestrator.list(status="DONE"), ValueError, "'DONE' is not a valid Status.*COMPLETED"),
        (lambda shop: shop.orchestrator.list(started_after=datetime(2026, 1, 1)), errors.NaiveDatetime, "time zone"),  # noqa: DTZ001
        (lambda shop: shop.buy(ORDER), TypeError, r"buy is a workflow: start it with .delay\(\)"),
        (lambda shop: shop.buy.map([ORDER]), errors.InvalidOperation, r"buy is a workflow, which map\(\) would"),
        (lambda shop: shop.buy.starmap([(ORDER,)]), errors.InvalidOperation, r"which starmap\(\) would call"),
        (lambda shop: shop.buy.chunks([(ORDER,)], 2), errors.InvalidOperation, r"which chunks\(\) would call"),
        (lambda shop: shop.buy.apply(()), errors.InputMismatch, "missing .* 'order'"),
    ],
)
def test_a_bad_call_is_refused_and_nothing_is_recorded(
    shop: Shop, call: Callable[[Shop], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        call(shop)
    assert isinstance(refused.value, OrchestratorError)
    assert (shop.count_rows(), shop.count_messages()) == (0, 0)


async def is_async(ctx: Context) -> None: ...


def generates(ctx: Context) -> Iterator[int]:
    yield 1


async def generates_async(ctx: Context) -> Any:
    yield 1


def takes_nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (is_async, "is_async is async; a workflow is a plain function"),
        (generates_async, "generates_async is async"),
        (generates, "generates is a generator; a workflow is a plain function"),
        (takes_nothing, "takes_nothing takes no arguments; the first one of a workflow is its context"),
        (lambda ctx: None, "<lambda> has no name"),
        (print, "a workflow is a function, not <built-in function print>"),
        (Order, "a workflow is a function, not <class"),
    ],
)
def test_what_cannot_be_a_workflow_is_refused_where_it_is_decorated(shop: Shop, function: Any, message: str) -> None:
    with pytest.raises(errors.ContextMisused, match=message):
        shop.orchestrator.workflow(function)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_by", ["attribute", "keyword", "object", "namespace"])
def test_settings_are_read_wherever_celery_reads_its_own(given_by: str) -> None:
    keywords = {"orchestrator_max_lost": 7} if given_by == "keyword" else {}
    app = Celery("shop", set_as_current=False, **keywords)
    orchestrator = Orchestrator(app, store="sqlite:///a.db")
    match given_by:
        case "attribute":
            app.conf.orchestrator_max_lost = 7
        case "object":
            app.config_from_object(SimpleNamespace(orchestrator_max_lost=7, orchestrator_store="sqlite:///b.db"))
        case "namespace":
            app.config_from_object(SimpleNamespace(CELERY_ORCHESTRATOR_MAX_LOST=7), namespace="CELERY")
    assert (orchestrator.settings.max_lost, orchestrator.settings.store) == (7, "sqlite:///a.db")


def test_an_unknown_option_is_refused(app: Celery) -> None:
    with pytest.raises(errors.ConfigurationError, match="no option hearbeat_limit"):
        Orchestrator(app, hearbeat_limit=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orchestrator_hearbeat_limit": 3}, "no setting orchestrator_hearbeat_limit; known are .*heartbeat_limit"),
        ({"orchestrator_heartbeat_limit": -1}, "orchestrator_heartbeat_limit cannot be -1"),
        ({"orchestrator_max_lost": "many"}, "orchestrator_max_lost cannot be 'many'"),
        ({}, r"no store is set; give Orchestrator\(app, store=…\) or set orchestrator_store"),
        ({"orchestrator_store": "sqlite://"}, "an SQLite store in memory is one process's own"),
        ({"orchestrator_store": "postgres//nothing"}, "the store URL 'postgres//nothing' cannot be used"),
        ({"orchestrator_store": "oracle://u:secret@db/x"}, r"the store URL 'oracle://.*\*\*\*@db/x' cannot be used"),
    ],
)
def test_settings_that_cannot_be_used_are_named_without_a_password(
    app: Celery, settings: dict[str, Any], message: str
) -> None:
    orchestrator = Orchestrator(app)
    app.conf.update(settings)
    workflow = orchestrator.workflow(buy, name="buy")
    with pytest.raises(errors.ConfigurationError, match=message) as refused:
        orchestrator.start(workflow.s(ORDER))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://shop:secret@127.0.0.1:1/shop",
        "mysql+pymysql://shop:secret@127.0.0.1:1/shop",
        "sqlite:////no/such/folder/sagas.db",
    ],
)
def test_a_store_that_cannot_be_reached_is_named_without_its_password(app: Celery, url: str) -> None:
    orchestrator = Orchestrator(app, store=url, store_patience=0.1)
    workflow = orchestrator.workflow(buy, name="buy")
    with pytest.raises(
        errors.StoreUnreachable, match=r"cannot reach the store (post|my|sqlite).*(/shop|sagas.db)"
    ) as away:
        orchestrator.start(workflow.s(ORDER), instance_id="order-1")
    assert "secret" not in f"{away.value!r}"


def test_an_app_has_one_orchestrator(app: Celery) -> None:
    Orchestrator(app, store="sqlite:///a.db")
    with pytest.raises(errors.ConfigurationError, match="'shop' has an Orchestrator already"):
        Orchestrator(app, store="sqlite:///b.db")
    assert not Path("a.db").exists()
