"""Two of the customers change their minds: one before having paid, one after the delivery."""

from contextlib import suppress

from orchestrator.errors import InvalidOperation
from tasks.demo.checkouts import Checkouts
from tasks.demo.picture import Picture
from tasks.webhooks import cancel_order, send_back


class Customers:
    """Watches for the moment at which each of the two can do it."""

    def __init__(self, checkouts: Checkouts) -> None:
        self._checkouts = checkouts
        self._to_cancel = checkouts.to_be_cancelled
        self._to_send_back = checkouts.to_be_sent_back

    def act(self, picture: Picture) -> None:
        """Do what can be done now; each is done once, also when the same orders are run again."""
        statuses = self._checkouts.statuses
        if self._to_cancel is not None and statuses.get(self._to_cancel) == "RUNNING":
            with suppress(InvalidOperation):  # it has failed just now
                cancel_order(self._to_cancel, "ordered by mistake")
                picture.tell(f"{self._to_cancel} waits for its payment, and is cancelled by its customer")
            self._to_cancel = None
        if self._to_send_back is not None and statuses.get(self._to_send_back) == "COMPLETED":
            send_back(self._to_send_back)
            self._checkouts.follow(self._to_send_back)
            picture.tell(f"{self._to_send_back} was delivered, and is sent back by its customer")
            self._to_send_back = None
