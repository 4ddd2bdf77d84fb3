"""What the terminal shows: a line per step that lives while it runs, tables, and errors without tracebacks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

#: Wide enough for the tables where output goes to a file or a pipe.
WIDTH = None if sys.stdout.isatty() else 130
console = Console(highlight=False, width=WIDTH)
errors = Console(stderr=True, highlight=False)


class StepLine:
    """The running line of one step: ``say`` shows what it is doing, ``done`` what came of it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.result = ""
        self.details: list[str] = []
        self._status = console.status("")
        self._start = time.perf_counter()
        self._plain = not console.is_terminal
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        """Show what the step is doing now."""
        if self._plain:
            if text in self._said:
                return
            self._said.add(text)
            console.print(f"  [dim]{time.perf_counter() - self._start:6.1f} s[/dim]  {escape(text)}")
        else:
            self._status.update(f"[bold]{escape(self.title)}[/bold] [dim]{escape(text)}[/dim]")

    def done(self, text: str, *details: str) -> None:
        """What came of the step; details are shown on lines of their own."""
        self.result, self.details = text, [detail for detail in details if detail not in self._said]


@contextmanager
def step(title: str) -> Iterator[StepLine]:
    """Show one step with its time; an error marks the line and goes on up."""
    line = StepLine(title)
    start = time.perf_counter()
    if line._plain:
        console.print(f"[bold]{escape(title)}[/bold] ...")
    else:
        line._status.start()
    try:
        line.say("starting")
        yield line
    except BaseException:
        line._status.stop()
        console.print(f"[red]✗[/red] [bold]{escape(title)}[/bold] failed after {time.perf_counter() - start:.1f} s")
        raise
    line._status.stop()
    console.print(f"[green]✓[/green] [bold]{escape(title)}[/bold] [dim]{time.perf_counter() - start:.1f} s[/dim]  {escape(line.result)}")
    for detail in line.details:
        console.print(f"    [dim]{escape(detail)}[/dim]")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table; the first column is text, the others are right-aligned."""
    out = Table(title=title, title_justify="left", title_style="bold", caption=note or None, caption_justify="left")
    for index, name in enumerate(header):
        out.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*[escape(cell) for cell in row])
    console.print(out)
