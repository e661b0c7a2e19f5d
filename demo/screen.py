"""The output of the demo: live on a terminal, lines of plain text in a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, ContextManager, Iterator, List, Optional, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress import TaskID as RichTask
from rich.rule import Rule
from rich.table import Table
from rich.text import Text


class Bar:
    """One line of the live part: a name, how much of it is done, and a note."""

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.text = ""
        self.started = time.monotonic()
        #: Set by :meth:`finish`.
        self.seconds: Optional[float] = None

    def advance(self, steps: int = 1) -> None:
        """Count *steps* more as done."""
        self.to(self.done + steps)

    def to(self, done: int) -> None:
        """Count *done* steps as done."""
        self.done = done

    def note(self, text: str) -> None:
        """Show *text* beside the bar."""
        self.text = text

    def finish(self, text: str) -> None:
        """Stop the clock, and show *text* for good."""
        self.seconds = time.monotonic() - self.started
        self.note(text)


class _RichBar(Bar):
    def __init__(self, progress: Progress, name: str, total: int) -> None:
        super().__init__(name, total)
        self._progress = progress
        self._task: RichTask = progress.add_task(escape(name), total=total, note="", clock="")

    def to(self, done: int) -> None:
        super().to(done)
        self._progress.update(self._task, completed=done, clock=self._clock())

    def note(self, text: str) -> None:
        super().note(text)
        self._progress.update(self._task, note=escape(text), clock=self._clock())

    def _clock(self) -> str:
        seconds = self.seconds
        return f"{time.monotonic() - self.started if seconds is None else seconds:.1f} s"


class Screen:
    """Plain text, with a line for every finished step."""

    def __init__(self) -> None:
        #: Log files whose ends are shown if the demo fails.
        self.logs: List[Path] = []

    def title(self, name: str, text: str) -> None:
        """Begin."""
        self.line(f"{name}: {text}")

    def heading(self, text: str, remark: str = "") -> None:
        """Begin a part."""
        self.line("")
        self.line(f"{text} ({remark})" if remark else text)

    def line(self, text: str) -> None:
        """Show a line."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self.line(text)

    def good(self, text: str) -> None:
        """Show that all is well."""
        self.line(text)

    def status(self, doing: str) -> ContextManager[Any]:
        """Show a description of the work while the block runs."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def step(self, doing: str) -> Iterator[List[str]]:
        """Show a description of the work, and then the lines that the block puts into the list."""
        started = time.monotonic()
        done: List[str] = []
        yield done
        self._done(done, time.monotonic() - started)

    def _done(self, done: Sequence[str], seconds: float) -> None:
        self.line(f"  {', '.join(done)} [{seconds:.1f} s]")

    @contextlib.contextmanager
    def bars(self) -> Iterator[Bars]:
        """Show bars while the block runs."""
        yield Bars(self)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table; columns whose names begin with ``>`` are aligned to the right."""
        self.line("")
        self.line(title)
        cells = [[c.lstrip(">") for c in columns], *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for row in cells:
            line = "  ".join(
                cell.rjust(width) if column.startswith(">") else cell.ljust(width)
                for cell, width, column in zip(row, widths, columns)
            )
            self.line(f"  {line}".rstrip())


class Bars:
    """Makes bars. These print a line only when they are finished."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def add(self, name: str, total: int) -> Bar:
        """Return a new bar."""
        return _PlainBar(self._screen, name, total)


class _PlainBar(Bar):
    def __init__(self, screen: Screen, name: str, total: int) -> None:
        super().__init__(name, total)
        self._screen = screen

    def finish(self, text: str) -> None:
        super().finish(text)
        self._screen.line(
            f"  {self.name}: {self.done}/{self.total} in {self.seconds or 0.0:.2f} s; {text}"
        )


class _RichBars(Bars):
    def __init__(self, screen: Screen, progress: Progress) -> None:
        super().__init__(screen)
        self._progress = progress

    def add(self, name: str, total: int) -> Bar:
        return _RichBar(self._progress, name, total)


class Terminal(Screen):
    """A terminal: colours, and bars that move."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._width = min(console.width, 100)

    def title(self, name: str, text: str) -> None:
        body = Text.assemble((name, "bold bright_white"), "\n", (text, "bright_cyan"))
        self._console.print()
        self._console.print(
            Panel(body, box=box.ROUNDED, border_style="orange3", padding=(0, 2)), width=self._width
        )

    def heading(self, text: str, remark: str = "") -> None:
        title = Text.assemble((text, "bold"), ("  " + remark if remark else "", "dim"))
        self._console.print()
        self._console.print(
            Rule(title, align="left", style="orange3", characters="─"), width=self._width
        )

    def line(self, text: str) -> None:
        self._console.print(Padding(Text(text), (0, 0, 0, 2)))

    def warn(self, text: str) -> None:
        self._console.print(Padding(Text(text, style="yellow"), (0, 0, 0, 2)))

    def good(self, text: str) -> None:
        self._console.print(Text.assemble(("  ✔ ", "bold green"), (text, "bold")))

    def status(self, doing: str) -> ContextManager[Any]:
        return self._console.status(f"[dim]{escape(doing)} …", spinner_style="orange3")

    @contextlib.contextmanager
    def step(self, doing: str) -> Iterator[List[str]]:
        started = time.monotonic()
        done: List[str] = []
        with self.status(doing):
            yield done
        self._done(done, time.monotonic() - started)

    def _done(self, done: Sequence[str], seconds: float) -> None:
        line = Text.assemble(("  ✔ ", "bold green"), (done[0], "bold"))
        if done[1:]:
            line.append("  " + "  ".join(done[1:]), "dim")
        line.append(f"  {seconds:.1f} s", "cyan")
        self._console.print(line)

    @contextlib.contextmanager
    def bars(self) -> Iterator[Bars]:
        columns = (
            TextColumn("  [bold]{task.description:<10}"),
            BarColumn(
                bar_width=max(10, min(30, self._console.width - 72)),
                style="grey30",
                complete_style="orange3",
                finished_style="green",
            ),
            TextColumn("[cyan]{task.completed:>5}/{task.total:<5}"),
            TextColumn("[dim]{task.fields[clock]:>6}"),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, refresh_per_second=20) as progress:
            yield _RichBars(self, progress)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.heading(title)
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=True)
        for column in columns:
            right = column.startswith(">")
            table.add_column(column.lstrip(">"), justify="right" if right else "left")
        for row in rows:
            table.add_row(*(Text(str(cell), style=_style(str(cell))) for cell in row))
        self._console.print(table)


def _style(cell: str) -> str:
    if cell.startswith("all "):
        return "green"
    return "bold red" if cell.startswith("DIFFERS") else ""


def make() -> Screen:
    """Return the screen that fits standard output."""
    console = Console(highlight=False)
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    if console.is_terminal and not console.is_dumb_terminal and encoding == "utf8":
        return Terminal(console)
    return Screen()
