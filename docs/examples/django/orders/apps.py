from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_migrate


class OrdersConfig(AppConfig):
    name = "orders"

    def ready(self) -> None:
        post_migrate.connect(make_tables_of_store, sender=self)


def make_tables_of_store(**_kwargs: Any) -> None:
    """Make the orchestrator's tables with Django's own, and not with the first order."""
    from proj import orchestrator

    orchestrator.migrate()
    orchestrator.close()
