"""What follows a commit besides messages to be published: endings, mail, children to be started.

All of it is in the store already; whatever does not succeed here, the poller does.
"""

from __future__ import annotations

from orchestrator import codec, errors
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import Dispatcher
from orchestrator.runtime.finishing import Finisher
from orchestrator.runtime.mail import Postman
from orchestrator.runtime.notices import Notice
from orchestrator.runtime.observing import Observers
from orchestrator.runtime.writing import ChildExists, generation_of_child
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance


class Aftermath:
    """Does what a commit leaves to be done."""

    def __init__(
        self,
        coordinator: Coordinator,
        dispatcher: Dispatcher,
        finisher: Finisher,
        postman: Postman,
        observers: Observers | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.dispatcher = dispatcher
        self.finisher = finisher
        self.postman = postman
        self.observers = observers

    def on_ended(self, instance: Instance) -> None:
        self.finisher.on_ended(instance)

    def wake(self, instance_id: str) -> Outbox:
        return self.postman.wake(instance_id)

    def hand_out(self, channel: str) -> Outbox:
        return self.postman.hand_out(channel)

    def tell(self, told: list[Notice]) -> None:
        if self.observers is not None:
            self.observers.tell(told)

    def start_child(self, row: HistoryRow) -> Outbox:
        """Begin the life of the child that ``row`` asks for, and publish its start task."""
        assert row.child_id is not None
        queue = self.dispatcher.workflow_queue(row.name, row.message_options)
        try:
            begun, outbox = self.coordinator.start_child(row.key, row.dispatch, queue)
        except ChildExists:
            error = errors.InstanceExists(row.child_id, "and is not the child of this instance")
            return self.coordinator.end_child_unbegun(row.key, codec.describe_error(error))
        if begun is not None:
            self.dispatcher.publish_start_of_child(begun, generation_of_child(begun))
        return outbox
