"""What the page about one instance shows, read in a few short transactions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.core.records import Kind, State
from orchestrator.flower import stack, timeline, words
from orchestrator.flower.stack import Stack
from orchestrator.flower.timeline import Timeline
from orchestrator.runtime.app import Orchestrator
from orchestrator.runtime.descriptions import Description
from orchestrator.store import reviewing
from orchestrator.store.instances import Status
from orchestrator.store.reviewing import Brief, EndedRun, Letter, Relative

#: How many records, compensations and others a page has at most.
RECORDS, COMPENSATIONS, OTHERS, OPEN = 100, 100, 50, 10

#: How often an instance is read for one page at most.
_READS = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Which records are asked for: of a run (``None``: the present one), from one on, or one alone and whole."""

    run: int | None = None
    from_seq: int | None = None
    is_alone: bool = False


@dataclass(frozen=True, slots=True)
class Review:
    """An instance as its page shows it."""

    description: Description
    part: Part
    run: int
    timeline: Timeline
    next_seq: int | None
    open: tuple[Brief, ...]
    stack: Stack
    children: tuple[Relative, ...]
    forks: tuple[Relative, ...]
    runs: tuple[EndedRun, ...]
    letters: tuple[Letter, ...]
    read_at: datetime

    @property
    def blocked(self) -> tuple[Brief, ...]:
        """The steps that an operator has to decide on."""
        return tuple(brief for brief in self.open if brief.is_blocked)

    @property
    def is_live(self) -> bool:
        """Whether it may change by itself; a repair goes on in an instance that has ended."""
        return not Status(self.description.status).is_final or bool(self.open)

    @property
    def age(self) -> str:
        description = self.description
        return words.duration((description.ended_at or self.read_at) - description.created_at)


def read(orchestrator: Orchestrator, instance_id: str, part: Part) -> Review:
    """Read an instance; payloads come from its handle, which masks them.  Raises ``UnknownInstance``.

    The records and the status come from several transactions.  Where the status has changed meanwhile all is read
    again, so that they fit each other; a page about an instance that goes on changing shows what was read last.
    """
    before = orchestrator.get(instance_id).describe()
    for _ in range(_READS):
        shown = _read_once(orchestrator, before, part)
        if shown.description.status == before.status:
            break
        before = shown.description
    return shown


def _read_once(orchestrator: Orchestrator, before: Description, part: Part) -> Review:
    instance_id = before.instance_id
    handle = orchestrator.get(instance_id)
    run = before.run if part.run is None else part.run
    limit = 1 if part.is_alone else RECORDS + 1
    entries = handle.history(run, from_seq=part.from_seq, limit=limit)
    with orchestrator.current.store.read("review") as connection:
        briefs = reviewing.list_undoing(connection, instance_id, run, 2 * COMPENSATIONS + 1)
        missing = {b.undoes for b in briefs if b.undoes is not None} - {b.seq for b in briefs}
        steps = reviewing.list_undone(connection, instance_id, run, sorted(missing)) if missing else []
        # an operator's own are in the run whose step they undo
        open_ones = reviewing.list_open(connection, instance_id, run, OPEN)
        children = reviewing.list_children(connection, instance_id, OTHERS)
        forks = reviewing.list_forks(connection, instance_id, OTHERS)
        runs = reviewing.list_latest_runs(connection, instance_id, OTHERS)
        letters = reviewing.list_letters(connection, instance_id, OTHERS)
    # last: what was not open any more has had its effect on the status by now, so a page that is final shows the end
    description = handle.describe()
    now = datetime.now(UTC)
    return Review(
        description,
        part,
        run,
        timeline.draw(entries[:RECORDS], now),
        entries[RECORDS].seq if len(entries) > RECORDS else None,
        tuple(open_ones),
        stack.build(description, run, briefs, steps, COMPENSATIONS),
        tuple(children),
        tuple(forks),
        tuple(runs),
        tuple(letters),
        now,
    )


def waits_for(brief: Brief, now: datetime) -> str:
    """Say what an open record waits for."""
    since = words.duration(now - (brief.started_at or brief.scheduled_at))
    match brief.kind:
        case Kind.TIMER:
            return f"a timer, for another {words.duration(brief.due_at - now)}" if brief.due_at else "a timer"
        case Kind.RECEIVE:
            return f"a message on the channel {brief.name!r}, for {since} so far"
        case Kind.CHILD:
            return f"the child {brief.name}, for {since} so far"
    what = f"step {brief.seq} ({brief.name})" if brief.undoes is None else f"{brief.name}, which undoes {brief.undoes}"
    if brief.is_blocked:
        return f"somebody to decide on {what}"
    if brief.state is State.HELD:
        return f"{what}: its turn in a map"
    if brief.state is State.SCHEDULED and brief.attempts:
        later = words.duration(brief.publish_at - now) if brief.publish_at else "a while"
        return f"{what}: {brief.attempts} attempts failed or were lost, the next one begins in {later} at most"
    if brief.state is State.SCHEDULED:
        return f"{what}: a worker to take it, for {since} so far"
    return f"{what}: running for {since}, attempt {brief.attempts}"
