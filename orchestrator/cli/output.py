"""What is printed: tables for people, one JSON document for scripts.

Names, arguments, messages and errors come from anywhere.  What a terminal would take for a command, or rich for
markup, is shown as what it is: ``clean`` has no control characters left, and text goes to rich as ``Text`` only.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from orchestrator.store.instances import Status

#: Where nobody looks at it: lines that are not folded are what ``grep`` and ``cut`` expect.
_WIDE = 1000

STYLES = {
    Status.PENDING: "dim",
    Status.RUNNING: "cyan",
    Status.COMPENSATING: "yellow",
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.COMPENSATED: "magenta",
    Status.COMPENSATION_FAILED: "bold red",
    Status.CANCELLED: "magenta",
    Status.TERMINATED: "magenta",
    Status.BLOCKED: "bold red",
}


def clean(value: object) -> str:
    """Return text in one line, in which whatever cannot be printed is written as Python would write it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value))


def make_console(*, stderr: bool = False) -> Console:
    context = click.get_current_context(silent=True)
    no_color = bool(getattr(context.obj if context else None, "no_color", False))
    stream = sys.stderr if stderr else sys.stdout
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:  # a terminal that cannot show a letter is no reason to fail
        reconfigure(errors="backslashreplace")
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        width=None if is_terminal else _WIDE,
        no_color=no_color or None,
        markup=False,
        highlight=False,
        emoji=False,
    )


def say(text: object) -> None:
    """Print a line."""
    click.echo(clean(text))


def complain(text: object) -> None:
    """Print a line to stderr."""
    click.echo(clean(text), err=True)


def styled(status: Status) -> Text:
    return Text(str(status), style=STYLES[status])


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; cells that are no ``Text`` are made safe.

    The last column takes the room that is left, on several lines if it must; the others, ids among them, are never
    broken: rather the table is wider than the terminal.
    """
    cells = [[cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings[:-1]):
        table.add_column(
            heading, no_wrap=True, min_width=max(len(heading), *(row[number].cell_len for row in cells), 0)
        )
    table.add_column(headings[-1], overflow="fold", min_width=20)
    for row in cells:
        table.add_row(*row)
    console = make_console()
    console.width = max(console.width, Measurement.get(console, console.options.update(width=_WIDE), table).minimum)
    console.print(table)


def print_json(document: object) -> None:
    """Print one JSON document; what is not ASCII is escaped, so that no terminal takes it for a command."""
    click.echo(json.dumps(as_json(document), indent=2))


def as_json(value: object) -> Any:
    """Return what ``json`` writes: dataclasses as objects, instants in ISO 8601 (UTC), durations in seconds."""
    match value:
        case None | bool() | int() | float():
            return value
        case Enum():
            return as_json(value.value)
        case str():
            return value
        case datetime():
            return as_instant(value)
        case timedelta():
            return value.total_seconds()
        case Mapping():
            return {str(key): as_json(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [as_json(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)


def as_instant(moment: datetime) -> str:
    utc = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return utc.astimezone(UTC).isoformat().replace("+00:00", "Z")


def as_time(moment: datetime | None) -> str:
    """Return an instant for people, to the second."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def as_duration(duration: timedelta) -> str:
    """Return a duration for people, in its two largest units."""
    seconds = max(0.0, duration.total_seconds())
    if seconds < 60:
        return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 60:
        return f"{minutes}m {int(seconds % 60):02}s"
    if hours < 24:
        return f"{hours}h {minutes % 60:02}m"
    return f"{days}d {hours % 24:02}h"


def as_value(value: object, longest: int = 300) -> str:
    """Return a payload for people, in one line that is not too long."""
    text = clean(json.dumps(as_json(value), ensure_ascii=False))
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"
