"""Who is measured."""

from __future__ import annotations

from benchmarks.contenders.chain import ChainSpec
from benchmarks.contenders.contender import Spec
from benchmarks.contenders.ours import OursSpec
from benchmarks.contenders.saga import SagaSpec

CHAIN = ChainSpec()
SAGA = SagaSpec()

SQLITE, POSTGRESQL, MARIADB = OursSpec("sqlite"), OursSpec("postgresql"), OursSpec("mariadb")
HANDED = (OursSpec("sqlite", hand_off=True), OursSpec("postgresql", hand_off=True))
#: The stores that goals are set for, and all.
DOORBELL = (SQLITE, POSTGRESQL)


def ours(full: bool) -> tuple[OursSpec, ...]:
    """Return our contenders: in the short run those that goals are set for."""
    return (*DOORBELL, *((MARIADB,) if full else ()), *HANDED)


def with_chain(full: bool) -> tuple[Spec, ...]:
    return (CHAIN, *ours(full))
