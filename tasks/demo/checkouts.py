"""The orders on their way through the checkout workflows, as a client of the shop sees them."""

from collections import Counter, deque
from collections.abc import Collection, Sequence

from orchestrator import WorkflowHandle
from tasks.app import orchestrator
from tasks.models import Order
from tasks.workflows import checkout, prepaid_checkout

UNDER_WAY = 25  # at most, so that a run has orders in every stage instead of all of them in the first one
#: Which order waits for a payment that never comes until it is cancelled, and which one is sent back.
CANCELLED_ONE, SENT_BACK_ONE = 2, 4
NOT_ENDED = ("PENDING", "RUNNING", "COMPENSATING", "BLOCKED")


class Checkouts:
    """Starts the checkout of each order, and follows it to its end."""

    def __init__(self, orders: Sequence[Order]) -> None:
        self.orders = orders
        self.statuses: dict[str, str] = {}
        self._not_started = deque(orders)
        self._under_way: dict[str, WorkflowHandle] = {}

    def advance(self) -> None:
        """Look at the orders under way, and start others in the place of those that have ended."""
        for order_id, handle in list(self._under_way.items()):
            self.statuses[order_id] = handle.instance_status
            if self.statuses[order_id] not in NOT_ENDED:
                del self._under_way[order_id]
        while self._not_started and len(self._under_way) < UNDER_WAY:
            order = self._not_started.popleft()
            # the order's own id: started again, by a client that crashed here, it would still be one checkout
            workflow = prepaid_checkout if order.id == self.to_be_cancelled else checkout
            self._under_way[order.id] = orchestrator.start(workflow.s(order), instance_id=order.id)
            self.statuses[order.id] = "PENDING"

    def follow(self, order_id: str) -> None:
        """Follow an order again that had ended."""
        self._under_way[order_id] = orchestrator.get(order_id)
        self.statuses[order_id] = self._under_way[order_id].instance_status

    @property
    def to_be_cancelled(self) -> str | None:
        """The order that waits for a payment that never comes."""
        return self._order_at(CANCELLED_ONE)

    @property
    def to_be_sent_back(self) -> str | None:
        """The order that is sent back if it is delivered."""
        return self._order_at(SENT_BACK_ONE)

    def _order_at(self, place: int) -> str | None:
        # a few orders are run as they are
        return self.orders[place].id if len(self.orders) > SENT_BACK_ONE else None

    @property
    def total(self) -> int:
        """The number of orders, started or not."""
        return len(self.orders)

    @property
    def ended(self) -> int:
        """The number of orders that have ended, well or not."""
        return len(self.statuses) - len(self._under_way)

    @property
    def have_ended(self) -> bool:
        return self.ended == self.total

    def is_undoing(self) -> bool:
        """Return whether a worker is executing a compensation right now."""
        return any(
            entry.kind == "compensation" and entry.state == "running"
            for order_id in self.list_with("COMPENSATING")
            for entry in self._under_way[order_id].history()
        )

    def counts(self) -> Counter[str]:
        """Return how many of the started orders are in each status."""
        return Counter(self.statuses.values())

    def list_with(self, *statuses: str) -> Collection[str]:
        """Return the ids of the orders in one of these statuses."""
        return [order_id for order_id, status in self.statuses.items() if status in statuses]

    def list_unfinished(self) -> Collection[str]:
        """Return the ids of the orders that have not ended, those never started included."""
        return [order.id for order in self.orders if self.statuses.get(order.id, "PENDING") in NOT_ENDED]
