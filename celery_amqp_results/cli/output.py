"""The output of the commands: rich on a terminal, plain text in a pipe, or JSON.

rich is optional. The output is plain text without it, in a pipe, or if ``NO_COLOR`` is set.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import unicodedata
from typing import Any, List, Mapping, Optional, Sequence, Union

import click

__all__ = ("STYLES", "Output", "age", "as_json", "clean", "counted", "size")

#: Colours of states and severities.
STYLES = {
    "SUCCESS": "green",
    "FAILURE": "bold red",
    "RETRY": "yellow",
    "REVOKED": "magenta",
    "STARTED": "cyan",
    "PENDING": "dim",
    "error": "bold red",
    "warning": "yellow",
    "info": "cyan",
    "ok": "green",
}


def clean(text: object) -> str:
    """Return *text* without characters that would control the terminal.

    Results of tasks may come from anywhere. Line breaks and tabs are kept.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd"
        for c in str(text)
    )


def as_json(value: object) -> object:
    """Return *value* in JSON's types; other types become their ``repr``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has neither infinity nor NaN.
        return value if value - value == 0 else repr(value)
    if isinstance(value, BaseException):
        return {
            "type": type(value).__name__,
            "module": type(value).__module__,
            "message": str(value),
        }
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    return repr(value)


def size(count: Optional[float]) -> str:
    """Return a number of bytes in readable form."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def counted(number: int, what: str) -> str:
    """Return *number* of *what*, in the plural if necessary."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def age(seconds: Optional[float]) -> str:
    """Return a time span in readable form."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.1f} s"


class Output:
    """The output of a command; with *json_lines*, it prints only JSON."""

    def __init__(self, json_lines: bool = False) -> None:
        self.json = json_lines
        #: rich's console, or ``None`` for plain text.
        self.console = None if json_lines or not sys.stdout.isatty() else _console()

    def data(self, value: object) -> None:
        """Print *value* as JSON, on one line."""
        click.echo(json.dumps(as_json(value), ensure_ascii=True))
        sys.stdout.flush()

    def line(self, text: str = "", style: Optional[str] = None) -> None:
        """Print a line for people; nothing with JSON output."""
        if self.json:
            return
        if self.console is None:
            click.echo(clean(text))
            sys.stdout.flush()
        else:
            self.console.print(clean(text), style=style, markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Print a remark to standard error, whatever the output format."""
        click.echo(clean(text), err=True)

    def pairs(self, title: str, rows: Mapping[str, object]) -> None:
        """Print names and values."""
        if self.json:
            return
        if self.console is None:
            self.line(title)
            width = max(map(len, rows), default=0)
            for name, value in rows.items():
                self.line(f"  {name.ljust(width)}  {_indent(value, width + 4)}")
            return
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            text = clean(value)
            grid.add_row(name, Text(text, style=STYLES.get(text, "")))
        self.console.print(
            Panel(grid, title=Text(clean(title)), title_align="left", border_style="dim")
        )

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Union[str, int]]],
    ) -> None:
        """Print a table; columns whose names begin with ``>`` are aligned to the right."""
        if self.json:
            return
        cells: List[List[str]] = [[clean(cell) for cell in row] for row in rows]
        names = [column.lstrip(">") for column in columns]
        if self.console is None:
            self.line(title)
            everything = [names, *cells]
            widths = [max(len(row[i]) for row in everything) for i in range(len(names))]
            for row in everything:
                line = "  ".join(
                    cell.rjust(width) if column.startswith(">") else cell.ljust(width)
                    for cell, width, column in zip(row, widths, columns)
                )
                self.line(f"  {line}".rstrip())
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, expand=False)
        for column, name in zip(columns, names):
            right = column.startswith(">")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        self.console.print(table)


def _console() -> Any:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=sys.stdout)


def _indent(value: object, width: int) -> str:
    return str(value).replace("\n", "\n" + " " * width)
