"""The shop's Celery app. What names the orchestrator, its import and the last statement, is all that was added."""

import os

from celery import Celery

from orchestrator import Orchestrator

app = Celery(
    "shop",
    broker=os.environ.get("SHOP_BROKER", "redis://localhost:6379/0"),
    backend=os.environ.get("SHOP_RESULTS"),
    include=["tasks.stock", "tasks.payments", "tasks.couriers", "tasks.receipts", "tasks.workflows"],
)
app.conf.broker_connection_retry_on_startup = True

orchestrator = Orchestrator(
    app,
    store=os.environ.get("SHOP_STORE", "sqlite:///shop-sagas.db"),
    heartbeat_limit=os.environ.get("SHOP_HEARTBEAT_LIMIT"),  # seconds; unset is the library's default
    # nobody who watches needs the numbers of cards
    mask={
        "tasks.payments.charge_card": ["card"],
        "tasks.workflows.checkout": ["order.card"],
        "tasks.workflows.prepaid_checkout": ["order.card"],
    },
)
