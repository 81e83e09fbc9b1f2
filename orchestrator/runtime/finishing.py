"""Paying what the end of an instance owes to Celery.

A final status commits with a ``finish`` row, which is deleted when all has been told; until then the poller repeats
it, with the same task ids.  What ``ending`` lists is told in order.  Where a part of it fails, the row keeps how far it
came, so that only a process that dies in between has anything told twice.
"""

from __future__ import annotations

import logging

from celery import Celery
from celery.backends.base import DisabledBackend

from orchestrator.runtime import kept
from orchestrator.runtime.ending import Ending, is_passing
from orchestrator.runtime.logs import about
from orchestrator.store import history, instances
from orchestrator.store.engine import Store
from orchestrator.store.instances import Instance

logger = logging.getLogger("orchestrator")


class Finisher:
    """Tells Celery how an instance ended."""

    def __init__(self, app: Celery, store: Store, *, keeps_results: bool = True) -> None:
        self.app = app
        self.store = store
        self.keeps_results = keeps_results

    def owes(self, instance: Instance) -> bool:
        """Tell whether Celery is owed anything at the end of an instance, as far as this process is configured."""
        own = kept.read(instance.request).request
        is_followed = any(own.get(name) for name in ("callbacks", "errbacks", "chain", "chord", "group"))
        has_backend = self.keeps_results and not isinstance(self.app.backend, DisabledBackend)
        is_stored = not own.get("ignore_result") or self.app.conf.task_store_errors_even_if_ignored
        return is_followed or (has_backend and is_stored)

    def on_ended(self, instance: Instance) -> None:
        """Pay at once what the end of ``instance`` owes; the poller does what fails here."""
        self.finish(instance.id, instance.generation)

    def finish(self, instance_id: str, generation: str, *, is_repeated: bool = False) -> None:
        """Pay what an ending owes; ``is_repeated``: another process may have died while it paid."""
        with self.store.read("finishing") as connection:
            told = instances.find_told(connection, instance_id, generation)
            if told is None:
                return
            ending = None
            instance = instances.find_instance(connection, instance_id)
            if instance is not None and instance.generation == generation:
                parts = history.list_parts(connection, instance_id, instance.run)
                ending = Ending(self.app, instance, parts, is_repeated, self.keeps_results)
        if ending is None or self._tell(ending, told):
            with self.store.begin("finished") as connection:
                instances.delete_finish(connection, instance_id, generation)

    def _tell(self, ending: Ending, told: int) -> bool:
        """Tell all that has not been told; return ``False`` if it has to be gone on with later."""
        instance = ending.instance
        for number, tell in enumerate(ending.list_deeds()):
            if number < told:
                continue
            try:
                with ending.outside_of_the_trail():
                    tell()
            except Exception as error:
                level = logging.WARNING if is_passing(ending.backend, error) else logging.ERROR
                untold = "what follows %s could not be told yet: %r"
                logger.log(level, untold, instance.id, error, extra=about(instance.id))
                if number > told:
                    with self.store.begin("note-told") as connection:
                        instances.note_told(connection, instance.id, instance.generation, number)
                return False
        return True
