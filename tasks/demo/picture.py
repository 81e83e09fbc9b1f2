"""What is seen while the orders run: a picture that moves on a terminal, lines of text elsewhere."""

import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tasks.demo.checkouts import Checkouts

STYLES = {
    "PENDING": "dim",
    "RUNNING": "cyan",
    "COMPENSATING": "yellow",
    "COMPLETED": "green",
    "COMPENSATED": "magenta",
    "FAILED": "red",
    "COMPENSATION_FAILED": "bold red",
    "BLOCKED": "bold red",
    "CANCELLED": "blue",
    "TERMINATED": "red",
}
MEANINGS = {
    "PENDING": "recorded, a worker has yet to take it up",
    "RUNNING": "under way",
    "COMPENSATING": "being undone",
    "COMPLETED": "delivered",
    "COMPENSATED": "failed or sent back, and all that was done has been undone",
    "FAILED": "failed before anything was done",
    "CANCELLED": "cancelled by the customer, and all that was done has been undone",
    "COMPENSATION_FAILED": "failed, and some of it could not be undone",
    "BLOCKED": "waits for a person",
}


class Picture(ABC):
    """Shows how far the checkouts are, and tells what happens to the worker."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.worker = "workers elsewhere"
        self._began = time.monotonic()

    def elapsed(self) -> str:
        return f"{time.monotonic() - self._began:5.1f} s"

    def tell(self, event: str) -> None:
        """Print something that happened, to stay."""
        self.console.print(f"{self.elapsed()}  {event}", highlight=False)

    @abstractmethod
    def show(self, checkouts: Checkouts) -> None:
        """Show how far they are."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class MovingPicture(Picture):
    """A table and a bar that are drawn anew in place."""

    def __enter__(self) -> Self:
        self._live = Live(console=self.console, auto_refresh=False)
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def show(self, checkouts: Checkouts) -> None:
        self._live.update(self._draw(checkouts), refresh=True)

    def _draw(self, checkouts: Checkouts) -> RenderableType:
        counts = checkouts.counts()
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right")
        for status in [status for status in STYLES if counts[status] or status in ("RUNNING", "COMPLETED")]:
            table.add_row(str(counts[status]), Text(status, STYLES[status]), Text(MEANINGS.get(status, ""), "dim"))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(checkouts.total, checkouts.ended, width=50), f"{checkouts.ended} of {checkouts.total} ended"
        )
        return Group("", bar, "", table, "", Text(f"{self.elapsed()}  {self.worker}"))


class Lines(Picture):
    """A line each time that another tenth of the orders has ended, or after a while."""

    SILENCE_SECONDS = 5.0

    def __enter__(self) -> Self:
        self._shown = -1
        self._shown_at = time.monotonic()
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    def show(self, checkouts: Checkouts) -> None:
        tenth = 10 * checkouts.ended // checkouts.total
        if tenth == self._shown and time.monotonic() - self._shown_at < self.SILENCE_SECONDS:
            return
        self._shown, self._shown_at = tenth, time.monotonic()
        counts = checkouts.counts()
        listing = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
        self.tell(f"{checkouts.ended} of {checkouts.total} ended: {listing}")


def open_picture(console: Console) -> Picture:
    """Return the picture that suits the console."""
    return MovingPicture(console) if console.is_terminal else Lines(console)
