"""The code of one project at several times: ``TEST_VERSION`` says which of them a worker was deployed with."""

from __future__ import annotations

import os

from orchestrator import Context, shared_workflow
from tests.runtime.workflows import do, undo

VERSION = os.environ.get("TEST_VERSION", "first")


@shared_workflow
def changes(ctx: Context, served_by_all: str, served_by_newest: str) -> list[str]:
    """Later versions have a step more, or another one, in the middle."""
    results = [ctx.run(do.s("a"), compensate=undo.s("a"))]
    if VERSION in ("second", "third"):
        results.append(ctx.run(do.s(f"of the {VERSION}")))
    go_on = ctx.receive("go on")
    for name, queue in (("c", served_by_newest), ("d", served_by_all), ("e", served_by_newest)):
        results.append(ctx.run(do.s(name).set(queue=queue), compensate=undo.s(name)))
    return [*results, str(go_on)]


@shared_workflow
def has_a_typo(ctx: Context) -> str:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.receive("go on")
    if VERSION in ("second", "third"):
        raise NameError(f"name 'undefind' is not defined in the {VERSION}")
    return str(ctx.run(do.s("b")))


if VERSION != "second":

    @shared_workflow
    def is_new(ctx: Context) -> str:
        return str(ctx.run(do.s("a")))
