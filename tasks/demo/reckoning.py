"""What is printed at the end: do the books balance, and what happened to some of the orders that were undone."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from orchestrator.runtime.descriptions import HistoryEntry
from tasks.app import orchestrator
from tasks.books import check_books, count_pieces
from tasks.demo.checkouts import Checkouts
from tasks.demo.picture import MEANINGS, STYLES
from tasks.samples import get_initial_stock

OUTCOME_STYLES = {"succeeded": "green", "failed": "red", "unknown": "yellow", "withdrawn": "dim"}

WAITS = {"receive": "the message {}", "timer": "the time to pass"}


def reckon(console: Console, checkouts: Checkouts) -> bool:
    """Print the reconciliation; return whether every order has ended and the books balance."""
    unfinished = checkouts.list_unfinished()
    not_undone = checkouts.list_with("COMPENSATION_FAILED")
    _print_orders(console, checkouts)
    is_balanced = _print_books(console, checkouts)
    histories = {order_id: orchestrator.get(order_id).history() for order_id in checkouts.statuses}
    _print_lost(console, histories)
    for example in _choose_examples(checkouts, histories):
        console.print()
        console.print(_draw_history(example, histories[example]))
    console.print()
    for order_id in unfinished:
        status = checkouts.statuses.get(order_id, "never started")
        console.print(f"[bold red]{escape(order_id)} has not ended: {status}")
    for order_id in not_undone:
        console.print(f"[bold red]{escape(order_id)} could not be undone fully")
    if is_balanced and not unfinished and not not_undone:
        console.print("[bold green]Every order has ended, and the books balance.")
        return True
    console.print("[bold red]This must not happen.")
    return False


def _print_orders(console: Console, checkouts: Checkouts) -> None:
    table = Table(title="Orders", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    counts = checkouts.counts()
    for status in [status for status in STYLES if counts[status]]:
        table.add_row(str(counts[status]), Text(status, STYLES[status]), MEANINGS.get(status, ""))
    table.add_row(str(checkouts.total), "in all", "")
    console.print()
    console.print(table)


def _print_books(console: Console, checkouts: Checkouts) -> bool:
    initial_stock = get_initial_stock()
    books = check_books(checkouts.orders, checkouts.list_with("COMPLETED"), initial_stock)
    initial, (on_hand, reserved) = sum(initial_stock.values()), count_pieces()
    table = Table(title="Books", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for label, cents in [
        ("charged to cards", books.charged_cents),
        ("refunded", -books.refunded_cents),
        ("kept", books.net_cents),
        ("price of the completed orders", books.expected_cents),
    ]:
        table.add_row(label, f"{cents / 100:,.2f}")
    table.add_row("[bold]difference in money", f"[bold]{(books.net_cents - books.expected_cents) / 100:,.2f}")
    table.add_section()
    for label, pieces in [
        ("on the shelves at first", initial),
        ("reserved", reserved),
        ("on the shelves now", on_hand),
    ]:
        table.add_row(label, f"{pieces:,}")
    table.add_row("[bold]difference in pieces", f"[bold]{on_hand + reserved - initial:,}")
    console.print()
    console.print(table)
    for discrepancy in books.discrepancies:
        console.print(f"[bold red]{escape(discrepancy)}")
    return books.is_balanced


def _print_lost(console: Console, histories: dict[str, list[HistoryEntry]]) -> None:
    lost = [(order_id, entry) for order_id, history in histories.items() for entry in history if entry.lost]
    console.print()
    if not lost:
        console.print("No step was being executed at the moment when the worker was killed.")
    for order_id, entry in lost:
        console.print(
            f"{escape(order_id)}: {_short(entry.name)} was being executed when the worker was killed; "
            f"it was run again and {entry.outcome}.",
            highlight=False,
        )


def _choose_examples(checkouts: Checkouts, histories: dict[str, list[HistoryEntry]]) -> Iterator[str]:
    """Yield the failed order with most to see, one that was cancelled and one that was sent back.

    Most to see: lost attempts before all, then compensations, then attempts.
    """

    def interest(order_id: str) -> tuple[int, int, int]:
        history = histories[order_id]
        return (
            sum(entry.lost for entry in history),
            sum(entry.kind == "compensation" for entry in history),
            sum(entry.attempts for entry in history),
        )

    undone = checkouts.list_with("COMPENSATED", "COMPENSATION_FAILED")
    chosen = [order_id for order_id in (checkouts.to_be_cancelled, checkouts.to_be_sent_back) if order_id is not None]
    failed = [order_id for order_id in undone if order_id not in chosen]
    if failed:
        yield max(failed, key=interest)
    for order_id in chosen:
        if order_id in undone or order_id in checkouts.list_with("CANCELLED"):
            yield order_id


def _draw_history(order_id: str, history: Sequence[HistoryEntry]) -> Tree:
    order = orchestrator.get(order_id).describe()
    why = "" if order.error is None else f": {order.error.message}"
    title = Text.assemble("What became of ", (order_id, "bold"), ", ", (order.status, STYLES[order.status]), why)
    tree = Tree(title)
    branches: dict[int, Tree] = {}
    for entry in sorted(history, key=lambda entry: entry.scheduled_at):
        # what undoes a step hangs beneath it
        parent = tree if entry.undoes is None else branches.get(entry.undoes, tree)
        branches[entry.seq] = parent.add(_describe(order_id, entry))
    return tree


def _describe(order_id: str, entry: HistoryEntry) -> Text:
    outcome = entry.outcome or entry.state
    if entry.kind in WAITS:
        what = WAITS[entry.kind].format(entry.name)
        return Text.assemble("waited for ", (what, "bold"), " ", (outcome, OUTCOME_STYLES.get(outcome, "")))
    own = [arg for arg in entry.args if isinstance(arg, str | int) and arg != order_id]
    line = Text("undone by " if entry.undoes is not None else "")
    line.append(_short(entry.name), "bold")
    line.append(f"({', '.join(map(str, own))}) ")
    line.append(outcome, OUTCOME_STYLES.get(outcome, ""))
    if entry.error is not None and outcome != "succeeded":
        line.append(f": {entry.error.type.rpartition('.')[2]}")
    elif entry.result is not None:
        line.append(f": {entry.result}")
    if entry.attempts != 1:
        line.append(f", {entry.attempts} attempts", "yellow")
    if entry.lost:
        line.append(f", {entry.lost} lost when the worker was killed", "bold yellow")
    return line


def _short(name: str) -> str:
    return name.rpartition(".")[2]
