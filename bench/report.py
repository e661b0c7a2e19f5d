"""The table of a run: with rich where that is installed, plain otherwise."""

from __future__ import annotations

import statistics
import sys
from typing import Any, List, Optional, TextIO

from bench.compare import Change
from bench.figures import MORE, OURS, Row, Run, ratios

__all__ = ("Reporter", "markdown", "number")

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # pragma: no cover
    Console = Table = None  # type: ignore[assignment,misc]


def number(value: float) -> str:
    """Return *value* with about three digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    return f"{value:.3g}"


def _cells(row: Row) -> List[List[str]]:
    lines = []
    for peer, values in row.figures.items():
        spread = f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else ""
        beside = ""
        if peer != OURS and OURS in row.figures and not row.absolute:
            found = ratios(row, OURS, peer)
            beside = f"{number(statistics.median(found))}" if found else ""
        lines.append([peer, number(statistics.median(values)), row.unit, spread, beside])
    return lines


class Reporter:
    """Prints rows as they are measured.

    Parameters:
        stream: where to; standard output by default.
    """

    HEADINGS = ("peer", "median", "unit", "least to largest", f"{OURS} is better by")

    def __init__(self, stream: Optional[TextIO] = None) -> None:
        self._stream = stream or sys.stdout
        self._console: Any = Console(file=self._stream) if Console is not None else None

    def line(self, text: str) -> None:
        """Print a line as it is."""
        print(text, file=self._stream, flush=True)

    def row(self, row: Row) -> None:
        """Print a row."""
        title = f"{row.title} ({'more' if row.better == MORE else 'less'} is better)"
        if self._console is None:
            self.line(f"\n{title}")
            for peer, median, unit, spread, beside in _cells(row):
                self.line(f"  {peer:28}{median:>10} {unit:10}{spread:24}{beside:>8}")
            return
        table = Table(title=title, title_justify="left", title_style="bold", min_width=80)
        for heading in self.HEADINGS:
            table.add_column(heading, justify="left" if heading in ("peer", "unit") else "right")
        for cells in _cells(row):
            table.add_row(*cells, style="green" if cells[0] == OURS else None)
        self._console.print(table)
        self._stream.flush()

    def regressions(self, worse: List[Change], compared: int, recorded: Run) -> None:
        """Print what became worse beside the run *recorded*."""
        about = recorded.about
        self.line(
            f"\n{compared} ratios compared with the run of {about.get('date')} "
            f"(RabbitMQ {about.get('rabbitmq')}, {about.get('cores')} cores)"
        )
        for change in worse:
            self.line(
                f"WORSE  {change.title}: {change.ours} beside {change.peer} was "
                f"{number(statistics.median(change.recorded))} times as good "
                f"({number(min(change.recorded))} to {number(max(change.recorded))}), is "
                f"{number(statistics.median(change.now))} "
                f"({number(min(change.now))} to {number(max(change.now))})"
            )
        if not worse:
            self.line("none became worse")


def markdown(run: Run) -> str:
    """Return all rows of *run* as one table in Markdown: a row, a peer in each line."""
    lines = ["| measure | unit | peer | median | least to largest |", "|---|---|---|---|---|"]
    for row in run.rows:
        for index, (peer, median, unit, spread, _) in enumerate(_cells(row)):
            first = (row.title, unit) if index == 0 else ("", "")
            lines.append(f"| {first[0]} | {first[1]} | `{peer}` | {median} | {spread} |")
    return "\n".join(lines) + "\n"
