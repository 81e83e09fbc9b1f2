"""Who is measured."""

from __future__ import annotations

from benchmarks.contenders.chain import ChainSpec
from benchmarks.contenders.contender import Spec
from benchmarks.contenders.ours import OursSpec
from benchmarks.contenders.peer import PeerSpec, TemporalSpec
from benchmarks.contenders.saga import SagaSpec

CHAIN = ChainSpec()
SAGA = SagaSpec()

SQLITE, POSTGRESQL, MARIADB = OursSpec("sqlite"), OursSpec("postgresql"), OursSpec("mariadb")
HANDED = (OursSpec("sqlite", hand_off=True, live=True), OursSpec("postgresql", hand_off=True, live=True))
#: By doorbell, with functions that stand where they wait: for long instances.
LIVE = (OursSpec("sqlite", live=True), OursSpec("postgresql", live=True))
#: The stores that goals are set for, and all.
DOORBELL = (SQLITE, POSTGRESQL)


def ours(full: bool) -> tuple[OursSpec, ...]:
    """Return our contenders: in the short run those that goals are set for."""
    return (*DOORBELL, *((MARIADB,) if full else ()), *HANDED)


def stores(full: bool) -> tuple[str, ...]:
    return tuple(spec.store for spec in ours(full) if not spec.hand_off)


def with_chain(full: bool) -> tuple[Spec, ...]:
    return (CHAIN, *ours(full))


DBOS_SQLITE = PeerSpec("dbos-sqlite", "on_dbos", "sqlite", ("dbos",))
DBOS_POSTGRESQL = PeerSpec("dbos-postgresql", "on_dbos", "postgresql", ("dbos",))
DBOS_QUEUE = PeerSpec("dbos-queue-postgresql", "on_dbos_queue", "postgresql", ("dbos",))
EDDA_SQLITE = PeerSpec("edda-sqlite", "on_edda", "sqlite", ("edda-framework",))
EDDA_POSTGRESQL = PeerSpec("edda-postgresql", "on_edda", "postgresql", ("edda-framework", "asyncpg"))
TEMPORAL = TemporalSpec()


def engines(full: bool) -> tuple[Spec, ...]:
    """Return the engines that do not run on Celery; in the short run there is no time for them."""
    if not full:
        return ()
    return (DBOS_SQLITE, DBOS_POSTGRESQL, DBOS_QUEUE, EDDA_SQLITE, EDDA_POSTGRESQL, TEMPORAL)
