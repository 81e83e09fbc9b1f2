"""What the core asks of whoever calls it: reading signatures, encoding values, running local functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.core.records import Compensation, Delivery, Failure, Outcome, Payload
from orchestrator.core.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an activity, read from a signature, with the defaults registered for its task."""

    name: str
    arguments: Payload
    options: dict[str, Any] = field(default_factory=dict)
    compensation: Compensation | None = None
    retry: RetryPolicy | None = None
    timeout_seconds: float | None = None
    is_workflow: bool = False
    child_id: str | None = None  # of a workflow: the id that its signature asks for


class Host(Protocol):
    """The outside of a pass.  All of it is deterministic but ``perform``, whose result is recorded."""

    def read_members(self, step: object) -> Sequence[object] | None:
        """Return the members of a group of plain signatures, ``None`` for anything else."""

    def identify(self, step: object) -> tuple[str, bool] | None:
        """Return the name of the task that a signature or a bare task calls, and whether it is a workflow's here.

        Of what is recorded nothing else is looked at.  ``None`` where that takes more than a glance.
        """

    def read_call(self, step: object, item: tuple[Any, ...] = ()) -> Call:
        """Read a signature or a bare task, ``item`` going before its arguments; refuse what cannot be a step."""

    def check_known(self, name: str) -> None:
        """Refuse a task that nobody knows; asked only for what is not recorded yet, and so not on a replay."""

    def read_compensation(
        self, compensate: object, retry: RetryPolicy | None = None, *, of_step: bool = True
    ) -> Compensation:
        """Read what ``compensate=`` was given, or ``ctx.compensate``, which belongs to no step and gets no result."""

    def encode(self, value: object, what: str) -> Payload:
        """Encode, or raise ``NotEncodable`` or ``PayloadTooLarge`` naming ``what``."""

    def decode(self, payload: Payload, name: str, returns: object) -> Any:
        """Decode the result of ``name``, as ``returns`` unless that is ``None``."""

    def decode_message(self, payload: Payload, returns: object) -> Any:
        """Decode a message, as ``returns`` unless that is ``None``."""

    def encode_input(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
        """Encode the input of a workflow function, or refuse what does not fit its parameters."""

    def find_receiver(self, instance_id: str) -> Delivery:
        """Tell whether an instance can be sent messages; asked only for what is not recorded yet."""

    def perform(
        self, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Outcome, Payload | None, Failure | None]:
        """Run a ``ctx.local`` function."""

    def describe(self, error: BaseException) -> Failure:
        """Return what of an exception is recorded."""

    def logger(self, is_replaying: Callable[[], bool]) -> Any:
        """Return a logger that is silent while ``is_replaying()``."""
