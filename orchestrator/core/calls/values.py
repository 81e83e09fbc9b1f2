"""``ctx``: time, randomness, and what runs in the coordinator itself."""

from __future__ import annotations

import functools
import hashlib
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from orchestrator import errors
from orchestrator.core.calls.part import Part
from orchestrator.core.passes import Pass
from orchestrator.core.records import History

#: What the columns hold that ``orchestrator.list`` filters by.
LONGEST_ATTRIBUTE_NAME, LONGEST_ATTRIBUTE = 100, 255


class ValueCalls(Part):
    """What would differ from one replay to the next."""

    def __init__(self, current: Pass) -> None:
        super().__init__(current)
        self._drawn = 0
        self._uuids = 0
        self._keyed: dict[str, uuid.UUID] = {}
        self._attributes: dict[str, Any] = {}
        self._progress: str | None = None

    @functools.cached_property
    def logger(self) -> Any:
        """A logger that is silent while history is replayed."""
        # and in a suspended pass, whose ``finally`` blocks run again every time
        return self._pass.host.logger(lambda: self.is_replaying or self._pass.ending is not None)

    @property
    def instance_id(self) -> str:
        """The id of this instance: where others send their answers."""
        return self._pass.history.instance_id

    def now(self) -> datetime:
        """Return the time of the last outcome delivered: aware, UTC, never earlier than before."""
        self._pass.check_live()
        return self._pass.now

    def random(self) -> float:
        """Return a number in [0, 1), the same on every replay."""
        self._pass.check_live()
        self._drawn += 1
        return int.from_bytes(self._digest(f"random:{self._drawn}")[:7], "big") / 2**56

    def uuid4(self, key: str | None = None) -> uuid.UUID:
        """Return a UUID, the same on every replay: the next one, or the one of ``key``."""
        self._pass.check_live()
        if key is None:
            self._uuids += 1
            return self._uuid(f"uuid:{self._uuids}")
        if key not in self._keyed:
            self._keyed[key] = self._uuid(f"key:{key}")
        return self._keyed[key]

    def _uuid(self, name: str) -> uuid.UUID:
        return uuid.UUID(bytes=self._digest(name)[:16], version=4)

    def _digest(self, name: str) -> bytes:
        return hashlib.sha256(f"{self._seed()}\0{name}".encode()).digest()

    def _seed(self) -> str:
        history, asked = self._pass.history, len(self._pass.nodes)
        for before, seed in history.seeds:
            if asked < before:  # the history that a fork shares was made with what its origin drew
                return seed
        return seed_of(history)

    def local(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function(*args)`` here, without a message, and record its result in the same commit.

        It runs once, unless the commit is lost; ``ctx`` cannot be used inside.  What it raises is recorded as a failed
        step would be.
        """
        name = getattr(function, "__qualname__", None)
        if name is None:
            raise errors.ContextMisused(f"ctx.local takes a function, not {function!r}")
        return self._pass.value_of(self._pass.perform(name, function, args))

    def patched(self, change_id: str) -> bool:
        """Tell whether this run takes the new path of a change; the first answer for an id and run holds."""
        return self._pass.patched(change_id)

    @property
    def is_replaying(self) -> bool:
        """Whether an earlier pass has been here already."""
        seen = self._pass.seen_order
        return seen is not None and self._pass.order <= seen

    # --- what monitors show ---------------------------------------------------------------------------------------

    def set_attributes(self, **attributes: str | int | float | bool | None) -> None:
        """Set what ``orchestrator.list(attributes=…)`` filters by."""
        self._pass.check_live()
        for name, value in attributes.items():
            text = self._pass.host.encode(value, f"the attribute {name}")
            if len(name) > LONGEST_ATTRIBUTE_NAME:
                longest = f"at most {LONGEST_ATTRIBUTE_NAME} characters"
                raise errors.ContextMisused(f"{name[:60]!r}… cannot be the name of an attribute: {longest} are allowed")
            if len(text) > LONGEST_ATTRIBUTE:
                raise errors.PayloadTooLarge(f"the attribute {name}", len(text), LONGEST_ATTRIBUTE)
        self._attributes.update(attributes)

    def set_progress(self, text: str) -> None:
        """Set the line of text that monitors show for this instance."""
        self._pass.check_live()
        self._progress = text


def seed_of(history: History) -> str:
    """Return what the random numbers of a run are drawn from."""
    return f"{history.instance_id}\0{history.generation}\0{history.run}"
