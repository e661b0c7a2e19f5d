"""The findings of ``results doctor``, and their output."""

from __future__ import annotations

import dataclasses
from typing import List

from celery_amqp_results.cli.output import STYLES, Output, clean, counted

__all__ = ("CLOCK_TOLERANCE", "Finding", "show")

#: The largest accepted difference between clocks, in seconds.
CLOCK_TOLERANCE = 5.0

_WORDS = {"ok": "ok", "info": "info", "warning": "WARN", "error": "ERROR"}
_SIGNS = {"ok": "✔", "info": "•", "warning": "▲", "error": "✘"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    #: Stable name of the check.
    check: str
    #: ``ok``, ``info``, ``warning`` or ``error``.
    severity: str
    text: str
    #: Advice; empty only if the severity is ``ok``.
    advice: str = ""


def show(output: Output, findings: List[Finding]) -> None:
    """Print the findings."""
    if output.json:
        output.data({"findings": [dataclasses.asdict(finding) for finding in findings]})
        return
    for finding in findings:
        if output.console is None:
            output.line(f"{_WORDS[finding.severity]:5}  {finding.check}: {finding.text}")
            if finding.advice:
                output.line(f"       -> {finding.advice}")
            continue
        from rich.table import Table
        from rich.text import Text

        style = STYLES[finding.severity]
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=2)
        grid.add_column(width=12, no_wrap=True)
        grid.add_column(overflow="fold")
        text = Text(clean(finding.text))
        if finding.advice:
            text.append(f"\n→ {clean(finding.advice)}", style=style)
        sign = Text(_SIGNS[finding.severity], style=style)
        grid.add_row(sign, Text(finding.check, style="dim"), text)
        output.console.print(grid)
    errors, warnings = (sum(f.severity == s for f in findings) for s in ("error", "warning"))
    style = "error" if errors else "warning" if warnings else "ok"
    output.line(f"{counted(errors, 'error')}, {counted(warnings, 'warning')}", STYLES[style])
