"""What a transaction is going to write to one instance, and what its commit leaves to be published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.core.records import Wake
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance


@dataclass(slots=True)
class Outbox:
    """What a commit left to be published."""

    steps: list[HistoryRow] = field(default_factory=list)
    owes_pass: Instance | None = None
    ended: Instance | None = None

    def extend(self, other: Outbox) -> None:
        self.steps += other.steps
        self.owes_pass = other.owes_pass or self.owes_pass
        self.ended = other.ended or self.ended


@dataclass(slots=True)
class Change:
    """What a transaction is going to write to one instance."""

    rows: dict[int, tuple[HistoryRow, dict[str, Any]]] = field(default_factory=dict)
    notes: list[tuple[HistoryRow, dict[str, Any]]] = field(default_factory=list)
    instance: dict[str, Any] = field(default_factory=dict)
    new_rows: list[dict[str, Any]] = field(default_factory=list)
    wakes: dict[int, Wake] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    ends: bool = False
    outbox: Outbox = field(default_factory=Outbox)

    def change_row(self, row: HistoryRow, values: Mapping[str, Any]) -> None:
        """Write ``values`` to a record, beside what is written to it already."""
        read, earlier = self.rows.get(row.seq, (row, {}))
        self.rows[row.seq] = (read, {**earlier, **values})


def with_values(instance: Instance, values: Mapping[str, Any]) -> Instance:
    """Return the instance as it will be."""
    return dataclasses.replace(instance, **values)
