"""What a transaction is going to write to one instance, and what its commit leaves to be published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.core.records import Outcome, Payload, PublishMessage, Subscribe, Unsubscribe, Wake
from orchestrator.store.claiming import Held
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Instance
from orchestrator.store.mailbox import NewMail, TakenMail

if TYPE_CHECKING:
    from orchestrator.runtime.notices import Notice


#: One statement for each number and kind of writes is kept, and the time that it takes grows faster than they do.
MOST_PLAIN_ROWS = 3


@dataclass(slots=True)
class Outbox:
    """What a commit left to be published, and whom to tell of it."""

    steps: list[HistoryRow] = field(default_factory=list)
    handed: Held | None = None  # a step that is claimed already, by the process that committed
    owes_pass: list[Instance] = field(default_factory=list)
    ended: Instance | None = None
    wakes: list[str] = field(default_factory=list)  # instances that were sent something
    shared: list[str] = field(default_factory=list)  # channels on which somebody competes for something
    notices: list[Notice] = field(default_factory=list)  # what observers are told

    def extend(self, other: Outbox) -> None:
        self.steps += other.steps
        self.handed = other.handed or self.handed
        self.owes_pass += other.owes_pass
        self.ended = other.ended or self.ended
        self.wakes += other.wakes
        self.shared += other.shared
        self.notices += other.notices


@dataclass(frozen=True, slots=True)
class Report:
    """What the end of a child, or of its undoing, is for the record of its parent that waits for it."""

    key: StepKey
    outcome: Outcome
    result: Payload | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class StartedChild:
    """That a record begins the life of another instance, and the queue that serves it."""

    row: HistoryRow
    queue: str | None


@dataclass(slots=True)
class Change:
    """What a transaction is going to write to one instance."""

    rows: dict[int, tuple[HistoryRow, dict[str, Any]]] = field(default_factory=dict)
    notes: list[tuple[HistoryRow, dict[str, Any]]] = field(default_factory=list)
    instance: dict[str, Any] = field(default_factory=dict)
    new_rows: list[dict[str, Any]] = field(default_factory=list)
    wakes: dict[int, Wake] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    has_pass: bool = False  # workflow code has decided on a part of it
    ends: bool = False
    may_have_subscribed: bool = True  # of an instance that ends
    taken: list[TakenMail] = field(default_factory=list)
    receipts: list[tuple[int, int]] = field(default_factory=list)  # order of the message, seq of the receive
    mail: list[NewMail] = field(default_factory=list)
    published: list[PublishMessage] = field(default_factory=list)
    subscriptions: list[Subscribe | Unsubscribe] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    started_child: StartedChild | None = None
    ends_run: bool = False
    report: Report | None = None
    outbox: Outbox = field(default_factory=Outbox)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is written but the instance, a few records of its own that there were, and a new one."""
        more = (self.notes, self.wakes, self.attributes, self.taken, self.receipts, self.mail, self.published)
        is_followed = self.ends and (self.outbox.ended is not None or self.may_have_subscribed)
        rest = (self.subscriptions, self.unread, self.started_child, is_followed, self.ends_run, self.report)
        is_small = len(self.rows) <= MOST_PLAIN_ROWS and len(self.new_rows) <= 1
        return is_small and not any(more) and not any(rest)

    def change_row(self, row: HistoryRow, values: Mapping[str, Any]) -> None:
        """Write ``values`` to a record, beside what is written to it already."""
        read, earlier = self.rows.get(row.seq, (row, {}))
        self.rows[row.seq] = (read, {**earlier, **values})
